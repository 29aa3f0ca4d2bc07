"use strict";
// While a comparison runs: asks how far its cells are, every three seconds, and takes the new report when one has ended.
(() => {
  const EVERY = 3000;
  const place = document.querySelector("#cells[data-state]");
  if (!place) return;
  const bar = place.querySelector("progress");
  const words = place.querySelector(".progress span");
  const cells = place.querySelector(".inner");
  let results = place.dataset.results;

  const parsed = (text) => new DOMParser().parseFromString(text, "text/html");

  // The choosers of a new report, to which the page's own script was never told.
  function show(select) {
    for (const view of select.closest(".views").querySelectorAll("[data-view]")) view.hidden = view.dataset.view !== select.value;
  }
  document.addEventListener("change", (event) => {
    if (event.target.matches("#report .views > label select")) {
      show(event.target);
      window.dispatchEvent(new Event("resize"));
    }
  });

  async function renew() {
    const answer = await fetch(location.href, { cache: "no-store" });
    const fresh = answer.ok && parsed(await answer.text());
    const report = document.getElementById("report");
    if (!fresh || !report.querySelector(".plot")) {
      location.reload(); // the first figures need scripts that are not here yet
      return;
    }
    const chosen = [...report.querySelectorAll(".views > label select")].map((select) => select.value);
    report.replaceWith(document.adoptNode(fresh.getElementById("report")));
    document.querySelectorAll("#report .views > label select").forEach((select, place) => {
      if (place < chosen.length) select.value = chosen[place];
      show(select);
    });
    bar.value = fresh.querySelector("#cells progress").value;
    document.dispatchEvent(new Event("redraw"));
  }

  async function ask() {
    if (document.hidden) return true;
    const answer = await fetch(place.dataset.state, { cache: "no-store" });
    if (!answer.ok) return answer.status === 503;
    const news = await answer.json();
    if (words.textContent !== news.said) words.textContent = news.said;
    if (!cells.contains(document.activeElement)) cells.replaceChildren(...parsed(news.cells).body.childNodes);
    if (!news.live) {
      location.reload();
      return false;
    }
    if (news.results !== results) {
      results = news.results;
      await renew();
    }
    return true;
  }

  window.keepAsking(ask, EVERY, words);
})();
