// Copying: an answer's request as a command, and texts.

import { addressOf } from "./api.js";
import { announce, byId } from "./dom.js";

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;

/** The request as one would type it in a shell. A key is not in it: the shell has it in a variable. */
export function curlOf(body, hasKey) {
  const lines = [`curl -N ${quoted(addressOf("chat/completions"))}`, "-H 'Content-Type: application/json'"];
  if (hasKey) lines.push('-H "Authorization: Bearer $OPENAI_API_KEY"');
  lines.push(`-d ${quoted(JSON.stringify(body, null, 2))}`);
  return lines.join(" \\\n  ");
}

export async function copy(text, what) {
  try {
    await navigator.clipboard.writeText(text);
    announce(`${what} copied.`);
    return true;
  } catch {
    byId("copy-text").value = text; // no clipboard on a page that came over plain HTTP from another machine
    byId("copy-dialog").showModal();
    byId("copy-text").select();
    return false;
  }
}

export function installCopyDialog() {
  byId("copy-close").addEventListener("click", () => byId("copy-dialog").close());
}
