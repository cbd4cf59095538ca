// The settings of one side: preset, rule, alpha, draft length and sampling, within the bounds that the server names.

import { el } from "./dom.js";

const SHORT = (value) => String(Math.round(value * 1000) / 1000);

export class Controls {
  #said;
  #parts = {};
  #touched = new Set(); // of what a preset decides: only what somebody moved is sent

  /** `said` is GET /v1/cascade; `side` is "" or a letter. */
  constructor(said, side, modelId) {
    this.#said = said;
    this.side = side;
    this.element = el("fieldset", { class: "controls" }, el("legend", {}, side ? `Side ${side}` : "Settings"));
    this.#build();
    this.#choose(modelId);
  }

  get modelId() {
    return this.#parts.model.value;
  }

  /** What of the request these settings decide. */
  body() {
    const { temperature, seed, maxTokens, enabled, rule, alpha, draft } = this.#parts;
    const speculation = { provenance: true };
    if (this.#touched.has("enabled")) speculation.enabled = enabled.checked;
    if (enabled.checked) {
      if (this.#touched.has("rule")) speculation.rule = rule.value;
      if (this.#touched.has("alpha") && alpha.value !== "") speculation.alpha = Number(alpha.value);
      if (this.#touched.has("draft")) speculation.max_draft = Number(draft.value);
    }
    const body = { model: this.modelId, temperature: Number(temperature.value), speculation };
    if (maxTokens.value) body.max_tokens = Number(maxTokens.value);
    if (seed.value !== "") body.seed = Number(seed.value);
    return body;
  }

  /** The same in a few words. */
  summary() {
    const { enabled, rule, alpha, draft, temperature } = this.#parts;
    const judged = enabled.checked ? `${rule.value}${alpha.value === "" ? "" : ` ${alpha.value}`}, up to ${draft.value} drafts` : "no drafts";
    return `${this.modelId} · ${judged} · temperature ${temperature.value}`;
  }

  /** Whether all settings can be sent; says what is wrong with the first that cannot. */
  check() {
    return this.element.querySelector(":invalid")?.reportValidity() ?? true;
  }

  get isValid() {
    return this.element.querySelector(":invalid") === null;
  }

  /** Takes over what another side is set to, as far as the server still knows it. */
  adopt(other) {
    const { rule } = this.#parts;
    this.#choose(other.modelId);
    if (this.#said.rules.some(({ name }) => name === other.#parts.rule.value)) rule.value = other.#parts.rule.value;
    this.#ruleChanged();
    for (const name of ["enabled", "alpha", "draft", "temperature", "seed", "maxTokens"]) this.#take(name, other.#parts[name]);
    this.#touched = new Set(other.#touched);
    this.#showEnabled();
  }

  #choose(modelId) {
    const { models, model } = this.#said;
    this.#parts.model.value = models.some(({ id }) => id === modelId) ? modelId : model;
    this.#presetChanged();
  }

  #take(name, from) {
    const part = this.#parts[name];
    part.value = from.value;
    part.checked = from.checked;
    if (part.type === "range") this.#follow(part);
    if (name === "alpha") this.#followAlpha();
  }

  #build() {
    const { models, max_draft: most } = this.#said;
    const parts = this.#parts;
    parts.model = this.#select("Preset", models.map(({ id, preset }) => [id, preset ?? "as deployed"]), () => this.#presetChanged());
    parts.enabled = this.#checkbox("Draft ahead", () => this.#touch("enabled"));
    parts.rule = this.#select("Rule", [], () => this.#ruleChanged());
    parts.keeps = el("p", { class: "hint" });
    this.element.append(parts.keeps);
    this.#buildAlpha();
    parts.draft = this.#range("Drafts at a time, at most", { min: 0, max: most, step: 1 }, () => this.#touch("draft"));
    parts.temperature = this.#range("Temperature", { min: 0, max: 2, step: 0.05, value: 0 });
    parts.seed = this.#number("Seed", { min: 0, max: Number.MAX_SAFE_INTEGER, step: 1, placeholder: "random" });
    parts.maxTokens = this.#number("Max tokens", { min: 1, max: this.#said.context_length, step: 1, value: 256, placeholder: "as many as fit" });
  }

  #buildAlpha() {
    const parts = this.#parts;
    parts.alpha = this.#number("Alpha", { step: "any" }, () => {
      this.#touch("alpha");
      this.#followAlpha();
    });
    parts.dial = el("input", { type: "range", step: 0.01, oninput: () => this.#dialMoved(), "aria-label": this.#named("Alpha, as a slider") });
    parts.ends = el("p", { class: "hint" });
    this.element.append(parts.dial, parts.ends);
  }

  // ------------------------------------------------------------------ what follows from a change
  #presetChanged() {
    const variant = this.#said.models.find(({ id }) => id === this.modelId);
    const { enabled, rule, draft } = this.#parts;
    this.#touched.clear();
    enabled.checked = variant.enabled;
    enabled.disabled = this.#said.max_draft === 0;
    const rules = this.#said.rules.filter(({ name, allowed }) => allowed || name === variant.rule);
    rule.replaceChildren(...rules.map(({ name }) => el("option", { value: name }, name)));
    rule.value = variant.rule;
    draft.value = String(variant.max_draft);
    this.#follow(draft);
    this.#showRule(variant.alpha);
    this.#showEnabled();
  }

  #ruleChanged() {
    this.#touched.delete("alpha");
    this.#touch("rule");
    const { alpha } = this.#rule();
    this.#showRule(alpha?.default ?? null);
  }

  #showRule(value) {
    const { keeps, alpha, dial, ends } = this.#parts;
    const range = this.#rule().alpha;
    keeps.textContent = this.#rule().keeps;
    for (const part of [alpha.parentElement, dial, ends]) part.hidden = range === null;
    if (range === null) {
      alpha.value = "";
      alpha.min = alpha.max = "";
      return;
    }
    alpha.min = range.low ?? "";
    alpha.max = range.high ?? "";
    alpha.value = value === null ? "" : SHORT(value);
    dial.min = range.low ?? -1;
    dial.max = range.high ?? 2;
    const end = (at, who) => (at === null ? [] : [`${SHORT(at)}: the ${who} alone`]);
    ends.textContent = [...end(range.target_at, "target"), ...end(range.drafter_at, "drafter")].join(" · ");
    this.#followAlpha();
  }

  #showEnabled() {
    const { enabled, rule, alpha, dial, draft } = this.#parts;
    for (const part of [rule, alpha, dial, draft]) part.disabled = !enabled.checked;
  }

  #followAlpha() {
    this.#parts.dial.value = this.#parts.alpha.value;
  }

  #dialMoved() {
    this.#parts.alpha.value = SHORT(Number(this.#parts.dial.value));
    this.#touch("alpha");
  }

  #touch(name) {
    this.#touched.add(name);
    this.#showEnabled();
  }

  #rule() {
    return this.#said.rules.find(({ name }) => name === this.#parts.rule.value);
  }

  // ------------------------------------------------------------------ fields
  #named(label) {
    return this.side ? `${label} (${this.side})` : label;
  }

  #field(label, input, extra = null) {
    input.dataset.name = label;
    input.setAttribute("aria-label", this.#named(label)); // a label around it would be named by its options and outputs, too
    this.element.append(el("label", { class: "row" }, el("span", {}, label), extra, input));
    return input;
  }

  #select(label, options, changed) {
    const choices = options.map(([value, text]) => el("option", { value }, text));
    return this.#field(label, el("select", { onchange: changed }, ...choices));
  }

  #checkbox(label, changed) {
    const input = el("input", { type: "checkbox", onchange: changed });
    this.#field(label, input);
    input.parentElement.classList.add("check");
    return input;
  }

  #number(label, bounds, changed = () => {}) {
    return this.#field(label, el("input", { type: "number", inputMode: "decimal", oninput: changed, ...bounds }));
  }

  #range(label, bounds, changed = () => {}) {
    const shown = el("output", {});
    const input = el("input", { type: "range", ...bounds });
    this.#field(label, input, shown);
    input.addEventListener("input", () => {
      this.#follow(input);
      changed();
    });
    this.#follow(input);
    return input;
  }

  #follow(range) {
    range.parentElement.querySelector("output").textContent = SHORT(Number(range.value));
  }
}
