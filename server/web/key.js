// The API key: asked for, and kept for this tab alone.

import { byId } from "./dom.js";

const NAME = "cascade-api-key";
let kept = "";

try {
  kept = sessionStorage.getItem(NAME) ?? "";
} catch {
  // storage is switched off: the key lasts as long as the page
}

export const apiKey = () => kept;

function keep(key) {
  kept = key;
  try {
    if (key) sessionStorage.setItem(NAME, key);
    else sessionStorage.removeItem(NAME);
  } catch {
    // as above
  }
}

/** Opens the dialog, with the reason if the server has one. */
export function askForKey(reason = "") {
  byId("key-reason").textContent = reason;
  byId("key-reason").hidden = !reason;
  byId("key-input").value = kept;
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
  byId("key-input").focus();
}

/** Wires the dialog; `changed` is called when there is another key. */
export function installKeyDialog(changed) {
  const dialog = byId("key-dialog");
  const use = (key) => {
    keep(key);
    dialog.close();
    changed();
  };
  byId("key").addEventListener("click", () => askForKey());
  byId("key-forget").addEventListener("click", () => use(""));
  byId("key-cancel").addEventListener("click", () => dialog.close());
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    use(byId("key-input").value.trim());
  });
}
