"use strict";
// Calls `ask` every so many milliseconds, as long as it says true; a server that is away is told of in `words`.
window.keepAsking = (ask, every, words) => {
  async function go() {
    let on = true;
    try {
      on = await ask();
    } catch {
      words.textContent = "The server does not answer; trying again.";
    }
    if (on) setTimeout(go, every);
  }
  setTimeout(go, every);
};
