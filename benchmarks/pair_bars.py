"""What each bar of the pair measures: what its drafter costs and how much of it stands, draft lengths, and what a client gets of it all.

The deployment's own drafter is used; bars that need Spec-Bench's questions are skipped where those are absent. Greedy unless said.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter
from statistics import median
from typing import Any

from torch import Tensor

from benchmarks.body import BodyMaker
from benchmarks.client import PATHS, HttpTarget, base_url_of, open_client
from benchmarks.load import Answer
from benchmarks.measuring import EXACT, NO_DRAFTER, BarSkipped, Measured, Setting, built_in, measured, median_of, spec_bench
from benchmarks.programs import EngineProgram, PromptEncoder, Run, Running, engine_program, side_by_side
from benchmarks.prompts import Prompt
from benchmarks.served import ServedDeployment, serve
from benchmarks.stats import Estimate, estimate_mean_per
from benchmarks.turns import Comparison, Sides, compare, in_turns
from engine.config import ModelDrafterConfig
from engine.model.source import resolve
from engine.plan import DraftBatch, Drafter, StepPlan, Verdict
from engine.sequence import Sequence as EngineSequence

CHAT = ("writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities")
NUM_DRAFT = 5
FIXED: Mapping[str, Any] = {"speculation.draft_length": {"policy": "fixed", "max": NUM_DRAFT}}
TOKEN_V3: Mapping[str, Any] = {**EXACT, "speculation.rule": "token_v3"}
Group = list[tuple[int, ...]]  # prompts that are asked together
# drafts in every step, and reads confidences as the adaptive policy does, which costs something
READING: Mapping[str, Any] = {"speculation.draft_length": {"policy": "confidence", "max": NUM_DRAFT, "threshold": 0.0}}
LENGTHS = (0, 1, 2, 3, 4, 5, 6, 8)  # that the adaptive policy is compared with; 0 is no drafts at all


# ---------------------------------------------------------------------- the drafter
def drafter_step(setting: Setting, temperature: float) -> Measured:
    """Seconds of one drafted token, its drawing included, over those of a step of the target alone. One stream."""
    _require_model(setting)
    drafting, plain = engine_program(setting.engine(EXACT, READING)), engine_program(setting.engine(NO_DRAFTER))
    watch, prompts, num_tokens = Watch.of(drafting), built_in(setting.size(8, 2)), setting.size(96, 12)
    encoder = PromptEncoder(plain.info.target_path)

    def a_draft(ids: tuple[int, ...]) -> float:
        watch.seconds.clear()
        drafting.answer(ids, num_tokens, stops=False, temperature=temperature)
        return 1000 * median(watch.seconds)

    def a_step(ids: tuple[int, ...]) -> float:
        return 1000 * plain.answer(ids, num_tokens, stops=False, temperature=temperature).seconds_per_token

    rows = in_turns(Sides(lambda i: encoder.new(prompts[i]), [a_draft, a_step]), setting.turns(len(prompts)))
    detail = {"drafter_ms": median_of(rows, 0), "target_ms": median_of(rows, 1), "temperature": temperature}
    return measured(compare(rows, lambda row: 100 * row[0] / row[1]), detail)


@dataclass
class Watch:
    """A drafter in whose place it stands, and how long its passes took, all else that a proposal costs included."""

    own: Drafter
    wait: Callable[[], None] = lambda: None  # for the device, where asking is not having
    seconds: list[float] = field(default_factory=list)

    @classmethod
    def of(cls, program: EngineProgram, wait: Callable[[], None] = lambda: None) -> Watch:
        core = program.core
        watch = cls(core._parts.drafter, wait)
        core._parts = replace(core._parts, drafter=watch)  # nothing public times a part of a step
        return watch

    def propose(self, plan: StepPlan, budget: int) -> DraftBatch:
        self.wait()
        start = time.perf_counter()
        drafts = self.own.propose(plan, budget)
        self.wait()
        if drafts.num_draft_tokens and drafts.num_rows <= drafts.num_passes + 1:  # no prompt to catch up with
            self.seconds.append((time.perf_counter() - start) / drafts.num_passes)
        return drafts

    @property
    def reads_states(self) -> bool:
        return self.own.reads_states

    def observe(self, plan: StepPlan, verdict: Verdict, states: Tensor | None) -> None:
        self.own.observe(plan, verdict, states)

    def forget(self, seq: EngineSequence) -> None:
        self.own.forget(seq)


def tokens_per_call(setting: Setting, change: Mapping[str, Any], categories: Sequence[str]) -> Measured:
    """Tokens over passes of the target that they took, five drafts at a time, over all of an answer; four streams together."""
    prompts = [prompt for prompt in spec_bench(setting) if not categories or prompt.category in categories]
    prompts = prompts[: setting.size(len(prompts), 4)]
    program, num_tokens = engine_program(setting.engine(FIXED, change, {"engine.max_step_tokens": 2048})), setting.size(128, 8)
    encoder, pairs = PromptEncoder(program.info.target_path), list[tuple[str, int, int]]()
    for i in range(0, len(prompts), 4):
        group = prompts[i : i + 4]
        runs = program.answers([encoder.new(prompt) for prompt in group], num_tokens)
        pairs += [(str(prompt.category), len(run.token_ids), run.num_target_calls) for prompt, run in zip(group, runs, strict=True)]
        setting.tick()

    def of(category: str | None) -> Estimate:
        chosen = [pair for pair in pairs if category in (None, pair[0])]
        return estimate_mean_per([tokens for _, tokens, _ in chosen], [calls for _, _, calls in chosen])

    by_category = {category: of(category).median for category in sorted({pair[0] for pair in pairs})}
    return Measured(of(None), (of(None).median,), {"prompts": len(pairs), "by_category": by_category})


# ---------------------------------------------------------------------- draft lengths
def best_fixed(setting: Setting, num_streams: int) -> Measured:
    """Tokens a second of so many streams under the adaptive policy over those of the fixed length that is best for them, prompts cached."""
    adaptive, fixed = (
        engine_program(setting.engine(EXACT, {"speculation.draft_length": {"policy": policy, "max": max(LENGTHS)}}))
        for policy in ("adaptive", "fixed")
    )
    make = _groups(num_streams, PromptEncoder(adaptive.info.target_path), built_in(24))

    def cached(i: int) -> Group:
        asked = make(i)
        for program in (adaptive, fixed):
            program.warm(asked)
        return asked

    num_tokens = setting.size(96, 8)

    def side(length: int) -> Callable[[Group], float]:
        return lambda asked: _over(adaptive.begin(asked, num_tokens, None, True), fixed.begin(asked, num_tokens, length, True))

    sides = Sides(cached, [side(length) for length in LENGTHS])
    rows = in_turns(sides, setting.turns(setting.size(max(3, 12 // num_streams), 1)))
    over = {length: compare(rows, itemgetter(i)) for i, length in enumerate(LENGTHS)}
    best = min(over, key=lambda length: over[length].value.median)
    return measured(over[best], {"best": best, "over": {str(length): comparison.value.median for length, comparison in over.items()}})


def never_slower(setting: Setting) -> Measured:
    """The least, over kinds of prompts and numbers of streams, of tokens a second with drafts over those without."""
    kinds: dict[str, list[Prompt]] = {}
    for prompt in spec_bench(setting):
        kinds.setdefault("chat" if prompt.category in CHAT else str(prompt.category), []).append(prompt)
    drafting, plain = engine_program(setting.engine(EXACT)), engine_program(setting.engine(NO_DRAFTER))
    encoder, num_tokens = PromptEncoder(plain.info.target_path), setting.size(96, 8)
    found: dict[str, Comparison] = {}
    for kind, prompts in kinds.items():
        for num_streams in (1, 4, 16)[: setting.size(3, 1)]:
            make = _groups(num_streams, encoder, prompts)
            sides = Sides(make, [lambda asked: _over(drafting.begin(asked, num_tokens), plain.begin(asked, num_tokens))])
            rows = in_turns(sides, setting.turns(setting.size(6 if num_streams == 1 else 3, 1)))
            found[f"{kind}, {num_streams}"] = compare(rows, itemgetter(0))
    least = min(found, key=lambda name: found[name].value.median)
    return measured(found[least], {"least": least, "all": {name: comparison.value.median for name, comparison in found.items()}})


def _groups(num_streams: int, encoder: PromptEncoder, prompts: list[Prompt]) -> Callable[[int], Group]:
    """Makes the i-th prompts that are asked together."""
    return lambda i: [encoder.new(prompts[(i * num_streams + k) % len(prompts)]) for k in range(num_streams)]


def _rate(runs: list[Run]) -> float:
    """Tokens a second of all streams together, prompts included."""
    return sum(len(run.token_ids) for run in runs) / max(run.seconds for run in runs)


def _over(running: Running, other: Running) -> float:
    """Tokens a second of the one over those of the other."""
    mine, theirs = side_by_side([running, other])
    return _rate(mine) / _rate(theirs)


# ---------------------------------------------------------------------- what a client gets
def http(setting: Setting, speculation: Mapping[str, Any]) -> Measured:
    """Tokens a second that a client of a server gets over those without drafts, chat questions, prompts included. One stream."""
    _require_model(setting)
    config = setting.engine()
    prompts = [prompt for prompt in spec_bench(setting) if prompt.category in CHAT][:: setting.size(2, 20)]
    encoder, num_tokens = PromptEncoder(resolve(config.model.target)), setting.size(128, 8)
    with serve(config) as served, asyncio.Runner() as runner:

        def asked(prompt: Prompt, extra: Mapping[str, Any]) -> Answer:
            conversation = replace(prompt, messages=tuple(encoder.messages(prompt)))
            return runner.run(_ask(served, BodyMaker(config.model.name, max_tokens=num_tokens, extra=extra), conversation))

        ours, theirs = {"speculation": dict(speculation)} if speculation else {}, {"speculation": {"enabled": False}}
        sides = Sides(lambda i: prompts[i], [lambda prompt: asked(prompt, ours), lambda prompt: asked(prompt, theirs)])
        rows = in_turns(sides, setting.turns(len(prompts)))
    rates = [[[answer.num_output_tokens / answer.e2e for answer in row] for row in repetition] for repetition in rows]
    detail = {"tokens_per_second": median_of(rates, 0), "other_tokens_per_second": median_of(rates, 1), "prompts": len(prompts)}
    return measured(compare(rates, lambda row: row[0] / row[1]), detail)


async def _ask(served: ServedDeployment, maker: BodyMaker, prompt: Prompt) -> Answer:
    async with open_client(None, timeout=600) as client:
        return await HttpTarget(client, f"{base_url_of(served.url)}/{PATHS['chat']}", maker).ask(prompt, 0)


def _require_model(setting: Setting) -> None:
    """Raises BarSkipped for a deployment whose drafter is no model."""
    drafter = setting.engine().model.drafter
    if not isinstance(drafter, ModelDrafterConfig):
        raise BarSkipped(f"the drafter of {setting.config.name} is of kind {drafter.kind}, and this is about one that is a model")


PAIR_MEASURES: Mapping[str, Callable[[Setting], Measured]] = {
    "drafter-step": lambda setting: drafter_step(setting, 0.0),
    "drafter-step-sampled": lambda setting: drafter_step(setting, 1.0),
    "accepted-chat": lambda setting: tokens_per_call(setting, EXACT, CHAT),
    "accepted-all": lambda setting: tokens_per_call(setting, EXACT, ()),
    "accepted-chat-token_v3": lambda setting: tokens_per_call(setting, TOKEN_V3, CHAT),
    "accepted-all-token_v3": lambda setting: tokens_per_call(setting, TOKEN_V3, ()),
    "lengths-1": lambda setting: best_fixed(setting, 1),
    "lengths-4": lambda setting: best_fixed(setting, 4),
    "lengths-16": lambda setting: best_fixed(setting, 16),
    "never-slower": never_slower,
    "http-exact": lambda setting: http(setting, {"rule": "exact"}),
    "http-default": lambda setting: http(setting, {}),
}
