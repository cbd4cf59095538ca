// What is known of one token, beside it: who wrote it, its round, and how likely the target found it.

import { el } from "./dom.js";
import { KINDS } from "./tokens.js";

const percent = (logprob) => {
  const share = 100 * Math.exp(logprob);
  return share < 0.05 ? "< 0.1 %" : `${share.toFixed(1)} %`;
};
const visible = (text) => text.replaceAll(" ", "·").replaceAll("\n", "⏎").replaceAll("\t", "⇥");

export class Inspector {
  #span = null;

  constructor(element) {
    this.element = element;
    addEventListener("scroll", () => this.#follow(), { capture: true, passive: true });
    addEventListener("pointerdown", (event) => event.target.closest?.(".text") || this.hide());
  }

  /** Shows a token beside its span. Returns the same as a sentence. */
  show(span, token) {
    const lines = [
      el("p", { class: "head" }, el("code", { class: `token ${token.kind}` }, visible(token.text)), ` ${KINDS[token.kind].name}`),
      el("p", {}, KINDS[token.kind].meaning),
    ];
    const round = roundOf(token);
    if (round) lines.push(el("p", {}, round));
    lines.push(token.likelihood ? table(token) : el("p", { class: "hint" }, "“Probabilities” in the settings shows how likely it was, from the next answer on."));
    this.element.replaceChildren(...lines);
    this.element.hidden = false;
    this.#span = span;
    this.#place(span);
    const chance = token.likelihood ? `, ${percent(token.likelihood.logprob)}` : "";
    return `${visible(token.text)}: ${KINDS[token.kind].name}${chance}`;
  }

  hide() {
    this.element.hidden = true;
  }

  #follow() {
    if (!this.element.hidden) this.#place(this.#span);
  }

  #place(span) {
    const at = span.getClientRects()[0] ?? span.getBoundingClientRect();
    const { width, height } = this.element.getBoundingClientRect();
    const left = Math.max(8, Math.min(at.left, innerWidth - width - 8));
    const below = at.bottom + 8;
    this.element.style.left = `${left}px`;
    this.element.style.top = `${below + height < innerHeight ? below : Math.max(8, at.top - height - 8)}px`;
  }
}

function roundOf(token) {
  if (!token.drafted) return "";
  return `It ended a round of ${token.drafted} ${token.drafted === 1 ? "draft" : "drafts"}.`;
}

function table(token) {
  const { likelihood } = token;
  const others = likelihood.top_logprobs;
  const rows = others.some((other) => same(other, likelihood)) ? others : [likelihood, ...others];
  return el(
    "table",
    {},
    el("caption", {}, "The target’s own probabilities"),
    el("tbody", {}, ...rows.map((row) => rowOf(row, same(row, likelihood)))),
  );
}

function rowOf(row, isEmitted) {
  const bar = el("div", { class: "bar" });
  bar.style.width = `${100 * Math.exp(row.logprob)}%`;
  return el(
    "tr",
    { class: isEmitted ? "emitted" : "" },
    el("th", { scope: "row" }, el("code", {}, visible(row.token) || "(no text)")),
    el("td", {}, percent(row.logprob)),
    el("td", { class: "chart", "aria-hidden": "true" }, bar),
  );
}

const same = (a, b) => a.token === b.token && String(a.bytes) === String(b.bytes);
