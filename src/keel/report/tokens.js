"use strict";
// Colours the tokens of every completion by the chosen number, and shows all numbers of the token under the pointer.
(() => {
  const about = JSON.parse(document.getElementById("quantities").textContent);
  const select = document.querySelector(".chooser select");
  const says = document.querySelector(".chooser .says");
  const ramp = document.querySelector(".ramp");
  const [low, bar, high] = ramp.children;
  const tokens = [...document.querySelectorAll(".tokens span[data-v]")];
  const STRONGEST = 70; // percent of the colour, so that text stays readable on it
  const panel = document.createElement("div");
  panel.className = "card hover";
  panel.hidden = true;
  document.body.append(panel);

  const numbers = (token) => token.dataset.v.split(",").map((text) => (text === "" ? NaN : Number(text)));
  const said = (value) => (Number.isNaN(value) ? "–" : String(Number(value.toPrecision(4))).replace("-", "−"));

  function share(value, scale) {
    const start = scale.centre === null ? scale.low : scale.centre;
    if (Number.isNaN(value) || scale.high === start) return 0;
    return Math.max(-1, Math.min(1, (value - start) / (scale.high - start)));
  }

  function colour() {
    const place = select.selectedIndex;
    const scale = about[place];
    for (const token of tokens) {
      const part = share(numbers(token)[place], scale);
      token.style.setProperty("--side", part < 0 ? "var(--plain)" : "var(--medium)");
      token.style.setProperty("--share", `${(STRONGEST * Math.abs(part)).toFixed(1)}%`);
    }
    says.textContent = scale.says + (scale.unit ? ` (${scale.unit})` : "");
    low.textContent = said(scale.low);
    high.textContent = said(scale.high);
    const end = (name) => `color-mix(in srgb, var(--${name}) calc(${STRONGEST}% * var(--strength)), transparent)`;
    bar.style.background = `linear-gradient(90deg, ${scale.centre === null ? "" : `${end("plain")}, `}transparent, ${end("medium")})`;
    bar.title = scale.centre === null ? "" : `neutral at ${scale.centre}`;
    ramp.style.visibility = scale.low === scale.high ? "hidden" : "visible";
  }

  let picked = null;
  function show(token) {
    if (picked) picked.classList.remove("picked");
    picked = token;
    panel.hidden = !token;
    if (!token) return;
    token.classList.add("picked");
    const values = numbers(token);
    const rows = about.map((scale, place) => {
      const row = document.createElement("tr");
      if (place === select.selectedIndex) row.className = "now";
      for (const [tag, text] of [["th", scale.name], ["td", said(values[place])]]) {
        const cell = document.createElement(tag);
        cell.textContent = text;
        row.append(cell);
      }
      return row;
    });
    const name = document.createElement("b");
    name.textContent = token.title || token.textContent;
    const table = document.createElement("table");
    table.append(...rows);
    panel.replaceChildren(name, table);
    const box = token.getClientRects()[0];
    const left = Math.min(box.left, document.documentElement.clientWidth - panel.offsetWidth - 12);
    const above = box.top - panel.offsetHeight - 6;
    panel.style.left = `${Math.max(8, left) + window.scrollX}px`;
    panel.style.top = `${(above > 60 ? above : box.bottom + 6) + window.scrollY}px`;
  }

  for (const place of document.querySelectorAll(".tokens")) {
    place.addEventListener("mouseover", (event) => show(event.target.closest("span[data-v]")));
    place.addEventListener("mouseleave", () => show(null));
    place.addEventListener("click", (event) => show(event.target.closest("span[data-v]")));
    place.addEventListener("keydown", (event) => {
      const own = [...place.querySelectorAll("span[data-v]")];
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (event.key === "Escape") show(null);
      if (!step || !own.length) return;
      event.preventDefault();
      show(own[Math.max(0, Math.min(own.length - 1, own.indexOf(picked) + step))]);
    });
    place.addEventListener("blur", () => show(null));
  }
  select.addEventListener("change", () => {
    colour();
    show(picked);
  });
  colour();
  const wanted = new URLSearchParams(location.hash.slice(1)).get("token"); // #token=3 opens the numbers of one
  if (wanted !== null) show(tokens[Number(wanted) - 1] || null);
})();
