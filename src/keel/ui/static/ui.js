"use strict";
// The switch between the system's theme, light and dark; and forms that need no button to be sent.
(() => {
  const root = document.documentElement;
  const button = document.querySelector("button.theme");
  const order = ["", "light", "dark"];
  const names = { "": "as the system", light: "light", dark: "dark" };
  const short = { "": "◐ Auto", light: "☀ Light", dark: "☾ Dark" };

  function say() {
    const now = root.dataset.theme || "";
    button.textContent = short[now];
    button.setAttribute("aria-label", `Colours: ${names[now]}`);
    button.hidden = false;
  }

  button.addEventListener("click", () => {
    const next = order[(order.indexOf(root.dataset.theme || "") + 1) % order.length];
    if (next) root.dataset.theme = next;
    else delete root.dataset.theme;
    try {
      localStorage.setItem("keel-theme", next);
    } catch {
      // kept for this page only
    }
    say();
    document.dispatchEvent(new Event("redraw"));
  });
  say();

  for (const form of document.querySelectorAll("form[data-auto]")) {
    form.addEventListener("change", (event) => {
      if (event.target.matches("select, input[type=checkbox]")) form.requestSubmit();
    });
  }
  // Empty fields stay out of the address, so that it can be read and shared.
  for (const form of document.querySelectorAll("form[method=get]")) {
    form.addEventListener("submit", () => {
      for (const field of form.elements) if (field.name && field.value === "") field.disabled = true;
    });
  }
})();
