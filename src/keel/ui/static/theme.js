"use strict";
// Before anything is drawn: the theme that the reader chose with the switch, if there is one.
(() => {
  let chosen = null;
  try {
    chosen = localStorage.getItem("keel-theme");
  } catch {
    // without storage the system's theme is shown
  }
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
})();
