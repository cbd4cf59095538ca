// The live numbers of an answer: counted while it streams, and the server's own at its end.

import { el } from "./dom.js";

/** Counts one answer. Times are in milliseconds of performance.now(). */
export class Tally {
  #accepted = 0;
  #drafted = 0;
  #calls = 0;
  #first = null;
  #final = null;

  constructor(sentAt) {
    this.sentAt = sentAt;
    this.tokens = 0;
  }

  add(tokens, now) {
    if (tokens.length) this.#first ??= now;
    for (const token of tokens) {
      this.tokens += 1;
      if (token.role === "accepted") this.#accepted += 1;
      if (token.drafted === null) continue;
      this.#drafted += token.drafted; // it ends a round, and each round is one call of the target
      this.#calls += 1;
    }
  }

  finish(usage, metrics) {
    this.tokens = usage.completion_tokens;
    this.#final = { usage, ...metrics };
  }

  /** Acceptance rate, tokens a target call, tokens a second and milliseconds to the first token; null where there is none yet. */
  figures(now) {
    if (this.#final) return this.#ofServer();
    return {
      acceptance: this.#drafted ? Math.min(1, this.#accepted / this.#drafted) : null,
      perCall: this.#calls ? this.tokens / this.#calls : null,
      perSecond: this.tokens ? (1000 * this.tokens) / (now - this.sentAt) : null,
      firstToken: this.#first === null ? null : this.#first - this.sentAt,
    };
  }

  #ofServer() {
    const { speculative_decoding: drafts, cascade, latency } = this.#final;
    return {
      acceptance: drafts ? drafts.draft_acceptance_rate : null,
      perCall: cascade.target_calls ? this.tokens / cascade.target_calls : null,
      perSecond: latency.tokens_per_second,
      firstToken: latency.time_to_first_token_ms,
    };
  }
}

const SHOWN = {
  acceptance: ["drafts accepted", (value) => `${Math.round(100 * value)} %`],
  perCall: ["tokens / target call", (value) => value.toFixed(2)],
  perSecond: ["tokens / s", (value) => value.toFixed(value < 100 ? 1 : 0)],
  firstToken: ["first token", (value) => (value < 1000 ? `${Math.round(value)} ms` : `${(value / 1000).toFixed(2)} s`)],
};

/** One row of numbers. */
export class Strip {
  #values = {};

  constructor(side = "") {
    const cells = Object.entries(SHOWN).map(([name, [label]]) => {
      this.#values[name] = el("dd", { data: { figure: name } }, "–");
      return el("div", {}, el("dt", {}, label), this.#values[name]);
    });
    const mark = side ? el("div", { class: "side" }, el("dt", { class: "hidden" }, "Side"), el("dd", {}, side)) : null;
    this.element = el("dl", { class: "strip" }, ...(mark ? [mark] : []), ...cells);
  }

  show(figures) {
    for (const [name, [, format]] of Object.entries(SHOWN)) {
      this.#values[name].textContent = figures[name] === null ? "–" : format(figures[name]);
    }
  }
}
