// Light, dark, or as the system has it. Not a module: it runs before the first paint, so that nothing flashes.
"use strict";
(() => {
  const names = ["auto", "light", "dark"];
  const root = document.documentElement;

  const stored = () => {
    try {
      return names.includes(localStorage.getItem("theme")) ? localStorage.getItem("theme") : "auto";
    } catch {
      return "auto"; // storage is switched off: the choice lasts as long as the page
    }
  };
  const apply = (name) => {
    root.dataset.theme = name;
  };

  apply(stored());
  addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const label = () => {
      button.textContent = `Theme: ${root.dataset.theme}`;
    };
    label();
    button.addEventListener("click", () => {
      const next = names[(names.indexOf(root.dataset.theme) + 1) % names.length];
      apply(next);
      label();
      try {
        localStorage.setItem("theme", next);
      } catch {
        // as above
      }
    });
  });
})();
