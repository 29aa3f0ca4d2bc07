"use strict";
// Draws every figure of the page in the colours of the reader's theme, and again when the theme changes.
(() => {
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const wide = document.getElementById("palette");
  const palette = JSON.parse(wide.textContent);

  function resolve(value, theme) {
    if (Array.isArray(value)) return value.map((inner) => resolve(inner, theme));
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, inner]) => [key, resolve(inner, theme)]));
    }
    if (typeof value !== "string" || value[0] !== "@") return value;
    const [name, opacity] = value.slice(1).split("/");
    const colour = palette[theme][name];
    if (!opacity) return colour;
    const [red, green, blue] = [1, 3, 5].map((start) => parseInt(colour.slice(start, start + 2), 16));
    return `rgba(${red}, ${green}, ${blue}, ${opacity})`;
  }

  function draw(theme) {
    for (const place of document.querySelectorAll(".plot")) {
      const figure = resolve(JSON.parse(document.getElementById(place.dataset.figure).textContent), theme);
      Plotly.react(place, figure.data, figure.layout, { responsive: true, displayModeBar: false, scrollZoom: false });
    }
  }

  const now = () => draw(document.documentElement.dataset.theme || (dark.matches ? "dark" : "light"));
  dark.addEventListener("change", now);
  document.addEventListener("redraw", now); // a page may choose the theme, or have new data
  window.addEventListener("beforeprint", () => draw("light"));
  window.addEventListener("afterprint", now);
  now();

  // A chooser shows one of several groups of figures; those that were hidden have yet to learn their width.
  for (const views of document.querySelectorAll(".views")) {
    const choice = views.querySelector("select");
    choice.addEventListener("change", () => {
      for (const view of views.querySelectorAll("[data-view]")) view.hidden = view.dataset.view !== choice.value;
      window.dispatchEvent(new Event("resize"));
    });
  }
})();
