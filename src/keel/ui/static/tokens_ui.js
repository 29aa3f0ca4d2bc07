"use strict";
// The number that colours the tokens stays the same from page to page.
(() => {
  const select = document.querySelector(".chooser select");
  if (!select) return;
  try {
    const kept = sessionStorage.getItem("keel-coloured-by");
    if ([...select.options].some((option) => option.value === kept) && select.value !== kept) {
      select.value = kept;
      select.dispatchEvent(new Event("change"));
    }
    select.addEventListener("change", () => sessionStorage.setItem("keel-coloured-by", select.value));
  } catch {
    // without storage every page begins with the first one
  }
})();
