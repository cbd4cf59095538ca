// One answer: asked for, streamed into its card, and counted.

import { ApiError, chat } from "./api.js";
import { copy, curlOf } from "./curl.js";
import { el } from "./dom.js";
import { apiKey, askForKey } from "./key.js";
import { Tally } from "./strip.js";
import { TokenText } from "./tokens.js";

export class Answer {
  #foot = el("p", { class: "foot" });
  #buttons = el("div", { class: "buttons" });
  #content = "";
  #reason = null;

  /** `side` is "" or a letter; `summary` says the settings. */
  constructor({ inspector, side, summary }) {
    this.text = new TokenText(inspector);
    this.side = side;
    this.state = "waiting"; // then streaming, and at last done, stopped or failed
    const title = el("h2", {}, side ? `${side}: ${summary}` : summary);
    this.element = el("article", { class: "answer", data: { side, state: this.state } }, title, this.text.element, this.#foot, this.#buttons);
  }

  get content() {
    return this.#content;
  }

  /** Asks and streams. Never throws: what goes wrong is shown in the card. `onNews` is called with the figures after each delivery. */
  async run(body, signal, onNews) {
    const tally = new Tally(performance.now());
    this.#show("streaming");
    let usage = null;
    try {
      for await (const chunk of chat(body, apiKey(), signal)) {
        usage = chunk.usage ?? usage;
        this.#take(chunk, tally);
        onNews(tally.figures(performance.now()), this);
      }
      this.#show("done");
    } catch (error) {
      this.#show(error.name === "AbortError" ? "stopped" : "failed");
      if (error.name !== "AbortError") this.#fail(error);
    }
    this.text.addRest(this.#content);
    this.#close(body, usage, tally);
    onNews(tally.figures(performance.now()), this);
  }

  /** Puts a further button into the card. */
  addButton(label, onclick) {
    const button = el("button", { type: "button", onclick }, label);
    this.#buttons.append(button);
    return button;
  }

  #take(chunk, tally) {
    if (chunk.metrics) tally.finish(chunk.usage, chunk.metrics);
    const choice = chunk.choices[0];
    if (!choice) return;
    const tokens = choice.provenance ?? [];
    this.#content += choice.delta.content ?? "";
    this.#reason = choice.finish_reason ?? this.#reason;
    this.text.add(tokens, choice.logprobs?.content);
    tally.add(tokens, performance.now());
  }

  #show(state) {
    this.state = state;
    this.element.dataset.state = state;
    this.text.element.setAttribute("aria-busy", String(state === "streaming"));
  }

  #fail(error) {
    const message = error instanceof ApiError ? error.message : `The page met an error of its own: ${error.message}`;
    this.#foot.before(el("p", { class: "error", role: "alert" }, message));
    if (error.status === 401) askForKey(message);
    if (!(error instanceof ApiError)) console.error(error);
  }

  #close(body, usage, tally) {
    const parts = { stopped: ["Stopped."], failed: [], done: [this.#reason === "length" ? "Cut at the limit of tokens." : "Complete."] }[this.state];
    if (tally.tokens) parts.push(`${tally.tokens} tokens.`);
    if (usage) parts.push(`Prompt: ${usage.prompt_tokens} tokens, ${usage.prompt_tokens_details.cached_tokens} of them cached.`);
    this.#foot.textContent = parts.join(" ");
    const named = (what) => (this.side ? `${what} of ${this.side}` : what);
    this.addButton("Copy text", () => copy(this.#content, "Text")).setAttribute("aria-label", named("Copy text"));
    this.addButton("Copy as curl", () => copy(curlOf(body, Boolean(apiKey())), "Command")).setAttribute("aria-label", named("Copy as curl"));
  }
}
