"""What each bar of a request's own wishes measures: a prediction of the answer, and a schema that it is held to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import engine.sched.scheduler
from benchmarks.measuring import EXACT, Measured, Setting, built_in, measured, median_of, rates
from benchmarks.programs import EngineProgram, PromptEncoder, Run, engine_program
from benchmarks.turns import Sides, compare, in_turns
from engine.model.runner import ModelRunner, Passed
from engine.plan import DraftBatch, StepPlan
from engine.request import Request, SamplingParams
from server.grammar_checker import Checker
from server.structure import Structure, grammar_of_structure

_FILE, _OLD, _NEW = Path(engine.sched.scheduler.__file__), "_leaders", "_ahead"  # 300 lines in which a name is changed
_TASK = "Write the scheduler of an inference engine, with its waiting and running sequences, in Python."
_CARD = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 3, "maxLength": 60},
        "topics": {"type": "array", "items": {"type": "string", "maxLength": 30}, "minItems": 2, "maxItems": 5},
        "difficulty": {"enum": ["easy", "medium", "hard"]},
        "answer": {"type": "object", "properties": {"text": {"type": "string"}, "confidence": {"type": "number"}}, "required": ["text"]},
    },
    "required": ["title", "topics", "difficulty", "answer"],
    "additionalProperties": False,
}


def prediction(setting: Setting) -> Measured:
    """Time of an answer that repeats a file but for a name, with the file as prediction over without. The target is made to give it, at the
    cost of its real passes; the prompt does not hold the file, or copying would draft from there."""
    program = engine_program(setting.engine(EXACT))
    encoder = PromptEncoder(program.info.target_path)
    lines = _FILE.read_text("utf-8").splitlines(keepends=True)[: setting.size(300, 12)]
    text = "".join(lines)
    before, script = encoder.continuation(text), encoder.continuation(text.replace(_OLD, _NEW))
    _Scripted.of(program, script)
    accepted: list[int] = []

    def asked(ids: tuple[int, ...], predicted: tuple[int, ...]) -> float:
        sampling = SamplingParams(max_tokens=len(script), temperature=0.0)
        run = program.run([Request(id=program.new_id(), prompt_ids=ids, sampling=sampling, prediction_ids=predicted)], may_be_cached=True)[
            0
        ]
        assert run.token_ids == script, "the target did not keep to its script"
        accepted.append(run.num_target_calls)
        return run.seconds

    sides = Sides(lambda i: encoder.continuation(f"{i}. {_TASK}"), [lambda ids: asked(ids, before), lambda ids: asked(ids, ())])
    rows = in_turns(sides, setting.turns(1))
    calls = {"target_calls": min(accepted), "target_calls_without": max(accepted)}
    seconds = {"seconds": median_of(rows, 0), "seconds_without": median_of(rows, 1)}
    detail = {"tokens": len(script), "lines": len(lines), "changed": text.count(_OLD), **calls, **seconds}
    return measured(compare(rows, lambda row: row[0] / row[1]), detail)


@dataclass
class _Scripted:
    """The target in whose place it stands, whose rows all say what the script has next."""

    own: ModelRunner
    script: tuple[int, ...]

    @classmethod
    def of(cls, program: EngineProgram, script: tuple[int, ...]) -> None:
        """Script a program's target."""
        core = program.core
        core._parts = replace(core._parts, runner=cls(core._parts.runner, script))  # type: ignore[arg-type]  # it has what a step needs

    def forward(self, plan: StepPlan, drafts: DraftBatch) -> Passed:
        logits, rows, states = self.own.forward(plan, drafts)
        logits = logits.clone()  # made in inference mode, and not to be written to here
        for row, (seq, offset) in enumerate(zip(rows.seqs, rows.offsets, strict=True)):
            place = len(seq.tokens) - len(seq.request.prompt_ids) + offset
            logits[row, self.script[min(place, len(self.script) - 1)]] += 1e4
        return Passed(logits, rows, states)


def schema(setting: Setting) -> Measured:
    """Tokens a second of one stream that is held to a schema over those of the same prompts without."""
    program = engine_program(setting.engine(EXACT))
    encoder, prompts, num_tokens = PromptEncoder(program.info.target_path), built_in(setting.size(10, 2)), setting.size(128, 12)
    with closing(Checker(Path(program.info.target_path), program.info.end_token_ids)) as checker:
        grammar = asyncio.run(grammar_of_structure(Structure("json", _CARD, "schema"), checker))

    def asked(ids: tuple[int, ...], grammar: str | None) -> Run:
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0, stop_token_ids=program.info.end_token_ids)
        return program.run([Request(id=program.new_id(), prompt_ids=ids, sampling=sampling, grammar=grammar)], may_be_cached=True)[0]

    def cached(i: int) -> tuple[int, ...]:
        ids = encoder.new(prompts[i])
        program.warm([ids])
        return ids

    sides = Sides(cached, [lambda ids: asked(ids, grammar), lambda ids: asked(ids, None)])
    rows = in_turns(sides, setting.turns(len(prompts)))
    calls = [[[len(run.token_ids) / run.num_target_calls for run in row] for row in repetition] for repetition in rows]
    detail = {**rates(rows), "tokens_per_call": median_of(calls, 0), "other_tokens_per_call": median_of(calls, 1)}
    return measured(compare(rows, lambda row: row[0].tokens_per_second / row[1].tokens_per_second), detail)


REQUEST_MEASURES: Mapping[str, Callable[[Setting], Measured]] = {"prediction": prediction, "schema": schema}
