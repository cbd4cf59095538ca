// The tokens of an answer: what kind each one is, and how it is shown.

import { announce, el } from "./dom.js";

/** Every kind with its name and what it means, in the order of the legend. */
export const KINDS = {
  accepted: { name: "Drafter, accepted", meaning: "The drafter wrote it, and the target agreed." },
  lossy: { name: "Drafter, kept by the rule", meaning: "The drafter wrote it; exact verification would have rejected it." },
  recovered: { name: "Target, after a rejection", meaning: "A draft was rejected here, and this was drawn in its place." },
  bonus: { name: "Bonus", meaning: "All drafts of the round stood, and this one came with them." },
  plain: { name: "Target alone", meaning: "Nothing was drafted in front of it." },
};

/** The kind of a token as the API describes it. */
export function kindOf(token) {
  if (token.lossy) return "lossy";
  if (token.role === "bonus" || token.role === "accepted") return token.role;
  return token.by === "drafter" ? "accepted" : token.role;
}

export function showLegend(list) {
  const items = Object.entries(KINDS).map(([kind, { name, meaning }]) =>
    el("li", { title: meaning }, el("span", { class: `sample token ${kind}`, "aria-hidden": "true" }, "abc"), ` ${name}`),
  );
  list.replaceChildren(...items);
}

/** The text of one answer, token by token. */
export class TokenText {
  #spans = [];
  #here = -1;
  #inspector;

  constructor(inspector) {
    this.#inspector = inspector;
    this.tokens = [];
    this.element = el("div", {
      class: "text",
      role: "group",
      "aria-label": "Answer; the left and right arrow keys walk through its tokens",
      tabIndex: 0,
      onkeydown: (event) => this.#step(event),
      onblur: () => this.#leave(),
      onpointerover: (event) => this.#point(event),
      onpointerleave: () => this.#inspector.hide(),
      onclick: (event) => this.#point(event),
    });
  }

  get text() {
    return this.tokens.map((token) => token.text).join("");
  }

  /** Adds tokens; `likelihoods` are the logprobs entries of those that are part of the text, if they were asked for. */
  add(tokens, likelihoods = []) {
    const spans = [];
    tokens.forEach((origin, i) => {
      if (!origin.text) return; // an end token, or a piece of a character
      const token = { ...origin, kind: kindOf(origin), likelihood: likelihoods[i] ?? null };
      spans.push(el("span", { class: `token ${token.kind}`, data: { i: String(this.tokens.length) } }, token.text));
      this.tokens.push(token);
    });
    this.#spans.push(...spans);
    this.element.append(...spans);
  }

  /** What the answer's text has beyond its tokens: the end of a text that broke off within a character. */
  addRest(text) {
    const rest = text.slice(this.text.length);
    if (rest) this.element.append(rest);
  }

  /** Puts a mark in front of the token that holds character `offset`, or takes it away. */
  markAt(offset) {
    this.element.querySelector(".parting")?.remove();
    if (offset === null) return;
    let end = 0;
    const i = this.tokens.findIndex((token) => (end += token.text.length) > offset);
    const mark = el("span", { class: "parting" }, "parts here");
    if (i < 0) this.element.append(mark);
    else this.#spans[i].before(mark);
  }

  #point(event) {
    const span = event.target.closest(".token");
    if (span) this.#inspector.show(span, this.tokens[Number(span.dataset.i)]);
    else this.#inspector.hide();
  }

  #step(event) {
    const moves = { ArrowRight: this.#here + 1, ArrowLeft: this.#here - 1, Home: 0, End: this.#spans.length - 1 };
    if (!(event.key in moves) || !this.#spans.length || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    this.#spans[this.#here]?.classList.remove("here");
    this.#here = Math.max(0, Math.min(this.#spans.length - 1, moves[event.key]));
    const span = this.#spans[this.#here];
    span.classList.add("here");
    span.scrollIntoView({ block: "nearest" });
    announce(this.#inspector.show(span, this.tokens[this.#here]));
  }

  #leave() {
    this.#spans[this.#here]?.classList.remove("here");
    this.#here = -1;
    this.#inspector.hide();
  }
}
