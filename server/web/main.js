// The page: the conversation, what is sent and stopped, and the two ways to ask, one answer or A and B.

import { Answer } from "./answer.js";
import { describe } from "./api.js";
import { markParting } from "./compare.js";
import { Controls } from "./controls.js";
import { installCopyDialog } from "./curl.js";
import { announce, byId, el } from "./dom.js";
import { Inspector } from "./inspector.js";
import { apiKey, askForKey, installKeyDialog } from "./key.js";
import { Strip } from "./strip.js";
import { showLegend } from "./tokens.js";

const RETRY_MS = 2000;
const EXAMPLES = ["What is the capital of France?", "Name the seven days of the week.", "Write a short story about a lighthouse keeper."];

const inspector = new Inspector(byId("inspector"));
let controls = []; // of one side, or of A and B
let strips = [];
let history = []; // the conversation, without the comparisons
let running = null; // an AbortController while something streams
let said = null; // GET /v1/cascade

// ---------------------------------------------------------------------- the server
async function connect() {
  try {
    said = await describe(apiKey());
  } catch (error) {
    byId("served").textContent = error.message;
    if (error.status === 401) askForKey(error.message);
    else setTimeout(connect, RETRY_MS); // not there, or still loading its model
    return;
  }
  byId("served").textContent = `${said.target}, drafted by ${said.drafter}`;
  byId("served").title = `Cascade Serve ${said.version}, model ${said.model}`;
  build(byId("compare").getAttribute("aria-pressed") === "true");
  byId("send").disabled = running !== null;
}

// ---------------------------------------------------------------------- settings
function build(isComparing) {
  const before = controls;
  const first = before[0]?.modelId ?? said.model;
  const sides = isComparing ? [["A", first], ["B", other(first)]] : [["", first]];
  controls = sides.map(([side, modelId]) => new Controls(said, side, modelId));
  before.slice(0, controls.length).forEach((settings, i) => controls[i].adopt(settings));
  strips = sides.map(([side]) => new Strip(side));
  removeAgain();
  byId("sides").replaceChildren(...controls.map(({ element }) => element));
  byId("strips").replaceChildren(...strips.map(({ element }) => element));
  byId("compare").setAttribute("aria-pressed", String(isComparing));
  byId("together-row").hidden = !isComparing;
}

/** A model id that answers in another way than `modelId`. */
function other(modelId) {
  const key = ({ enabled, rule, alpha, max_draft: most }) => [enabled, rule, alpha, most].join();
  const mine = said.models.find(({ id }) => id === modelId) ?? said.models[0];
  return (said.models.find((model) => key(model) !== key(mine)) ?? mine).id;
}

function bodyOf(settings, messages) {
  const body = { ...settings.body(), messages, stream: true, stream_options: { include_usage: true } };
  return byId("probabilities").checked ? { ...body, logprobs: true, top_logprobs: 5 } : body;
}

// ---------------------------------------------------------------------- asking
async function ask(prompt) {
  if (running || !said || !check()) return;
  byId("welcome").hidden = true;
  removeAgain();
  const isPair = controls.length > 1;
  const messages = [...(isPair ? [] : history), { role: "user", content: prompt }];
  const answers = controls.map((settings) => new Answer({ inspector, side: settings.side, summary: settings.summary() }));
  const turn = el("div", { class: isPair ? "turn pair" : "turn" });
  turn.append(el("p", { class: "asked" }, prompt), ...answers.map(({ element }) => element));
  byId("talk").append(turn);
  scrollDown();
  await whileRunning(() => (isPair ? runPair(answers, messages, turn) : runOne(answers[0], messages, turn)));
}

/** Whether everything can be sent; shows the settings where something cannot. */
function check() {
  if (controls.every(({ isValid }) => isValid)) return true;
  showPanel(true);
  controls.find(({ isValid }) => !isValid).check();
  return false;
}

async function whileRunning(work) {
  running = new AbortController();
  byId("send").hidden = true;
  byId("stop").hidden = false;
  announce("Answering.");
  try {
    announce((await work()) ?? "");
  } finally {
    running = null;
    byId("send").hidden = false;
    byId("stop").hidden = true;
    byId("send").disabled = said === null;
  }
}

async function runOne(answer, messages, turn) {
  await answer.run(bodyOf(controls[0], messages), running.signal, shower(strips[0]));
  if (!turn.isConnected) return ""; // a new chat was begun meanwhile
  history = answer.content ? [...messages, { role: "assistant", content: answer.content }] : messages.slice(0, -1);
  offerAgain(answer, messages, turn);
  return ended(answer);
}

/** A button at the latest answer that asks once more, with what is set then. */
function offerAgain(answer, messages, turn) {
  const button = answer.addButton("Regenerate", () => {
    if (running || !check()) return;
    turn.remove();
    if (controls.length === 1) history = messages.slice(0, -1);
    ask(messages.at(-1).content);
  });
  button.classList.add("again");
}

function removeAgain() {
  for (const button of document.querySelectorAll(".again")) button.remove();
}

async function runPair(answers, messages, turn) {
  const verdict = el("p", { class: "verdict" });
  turn.append(verdict);
  const { signal } = running;
  const run = (i) =>
    answers[i].run(bodyOf(controls[i], messages), signal, (figures, answer) => {
      shower(strips[i])(figures, answer);
      verdict.textContent = markParting(answers[0].text, answers[1].text, false);
    });
  if (byId("together").checked) await Promise.all([run(0), run(1)]);
  else for (const i of [0, 1]) if (!signal.aborted) await run(i); // one by one, so that neither slows the other
  const isWhole = answers.every(({ state }) => state === "done");
  verdict.textContent = markParting(answers[0].text, answers[1].text, isWhole);
  offerAgain(answers[1], messages, turn);
  return `${answers.map(ended).join(" ")} ${verdict.textContent}`;
}

function ended({ side, state, text }) {
  return `${side ? `${side}: ` : ""}${{ done: "answer complete", stopped: "stopped", failed: "failed", waiting: "not asked" }[state]}, ${text.tokens.length} tokens.`;
}

function shower(strip) {
  return (figures) => {
    strip.show(figures);
    const talk = byId("talk");
    if (talk.scrollHeight - talk.scrollTop - talk.clientHeight < 120) scrollDown();
  };
}

const scrollDown = () => byId("talk").scrollTo({ top: byId("talk").scrollHeight });

function submit(event) {
  event.preventDefault();
  const prompt = byId("prompt").value.trim();
  if (!prompt || running || !said || !check()) return;
  byId("prompt").value = "";
  ask(prompt);
}

function startAfresh() {
  running?.abort();
  history = [];
  for (const turn of document.querySelectorAll(".turn")) turn.remove();
  byId("welcome").hidden = false;
  byId("prompt").focus();
}

// ---------------------------------------------------------------------- wiring
function showPanel(isOpen) {
  document.body.classList.toggle("panel-open", isOpen);
  byId("panel-toggle").setAttribute("aria-expanded", String(isOpen));
  if (isOpen) byId("panel").querySelector("select")?.focus();
  else byId("panel-toggle").focus();
}

byId("composer").addEventListener("submit", submit);
byId("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
});
byId("stop").addEventListener("click", () => running?.abort());
byId("fresh").addEventListener("click", startAfresh);
byId("compare").addEventListener("click", () => {
  if (said && !running) build(controls.length === 1);
});
byId("panel-toggle").addEventListener("click", () => showPanel(!document.body.classList.contains("panel-open")));
byId("panel-close").addEventListener("click", () => showPanel(false));
addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  inspector.hide();
  if (document.body.classList.contains("panel-open")) showPanel(false);
  else running?.abort();
});
byId("examples").append(...EXAMPLES.map((text) => el("button", { type: "button", onclick: () => ask(text) }, text)));
showLegend(byId("legend"));
byId("strips").replaceChildren(new Strip().element);
installKeyDialog(connect);
installCopyDialog();
connect();
