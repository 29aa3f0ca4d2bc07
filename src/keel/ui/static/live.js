"use strict";
// While a run trains: asks for the points that are new, every two seconds, and adds them to the figures.
(() => {
  const EVERY = 2000;
  const PARTS = 30; // as the server's running mean: over one part in so many
  const place = document.querySelector("[data-points]");
  if (!place) return;
  const bar = place.querySelector("progress");
  const words = place.querySelector("span");
  let since = Number(place.dataset.since);

  const figures = [...document.querySelectorAll(".plot")]
    .map((plot) => document.getElementById(plot.dataset.figure))
    .filter((source) => source.id.startsWith("training-"));
  const raw = new Map(); // values of each curve so far, as far as they are drawn
  const key = (source, trace) => `${source.id} ${trace.meta}`;
  for (const source of figures) {
    for (const trace of JSON.parse(source.textContent).data) {
      if (!raw.has(key(source, trace)) || trace.hoverinfo === "skip") raw.set(key(source, trace), [...trace.y]);
    }
  }

  const mean = (values) => {
    const known = values.filter((value) => value !== null);
    return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
  };

  function add(trace, before, points) {
    const values = [...before];
    const faint = trace.hoverinfo === "skip";
    for (const [step, value] of points) {
      values.push(value);
      trace.x.push(step);
      trace.y.push(faint ? value : mean(values.slice(-Math.max(1, Math.floor(values.length / PARTS / 2)))));
    }
    return values;
  }

  function grow(source, metrics) {
    const figure = JSON.parse(source.textContent);
    const fresh = figure.data.filter((trace) => metrics[trace.meta]);
    if (!fresh.length) return;
    const added = fresh.map((trace) => {
      const at = key(source, trace);
      return [at, add(trace, raw.get(at), metrics[trace.meta])];
    });
    for (const [at, values] of added) raw.set(at, values);
    const { range } = figure.layout.yaxis;
    if (range) {
      const highest = Math.max(range[0], ...figure.data.flatMap((trace) => trace.y.filter((value) => value !== null)));
      range[1] = Math.max(range[1], range[0] + 1.06 * (highest - range[0]));
    }
    source.textContent = JSON.stringify(figure).replaceAll("<", "\\u003c");
  }

  async function ask() {
    if (document.hidden) return true;
    const answer = await fetch(`${place.dataset.points}?since=${since}`, { cache: "no-store" });
    if (!answer.ok) return answer.status === 503;
    const news = await answer.json();
    words.textContent = news.said;
    if (bar) bar.value = Math.min(news.step, news.planned);
    const steps = Object.values(news.metrics).flatMap((points) => points.map(([step]) => step));
    if (news.status !== "running" || (steps.length && !figures.length)) {
      location.reload(); // the whole page has something new to say
      return false;
    }
    if (steps.length) {
      since = Math.max(...steps);
      for (const source of figures) grow(source, news.metrics);
      document.dispatchEvent(new Event("redraw"));
    }
    return true;
  }

  window.keepAsking(ask, EVERY, words);
})();
