"""What each bar of `benchmarks.gpu` measures. The bars themselves, predictions and how results are shown stand in gpu.py.

A rate is compared with what this very device does in the turn beside it; two engines, or an engine and transformers, share their weights.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from statistics import median
from typing import Any

from benchmarks.gpu_models import NONE, Asked, Ids, member, pass_operations, program_of, read_bytes
from benchmarks.gpu_rates import busy_seconds, copy_rate, matrix_rate, wait_for
from benchmarks.gpu_setting import GpuSetting, decoding
from benchmarks.measuring import (
    EXACT,
    NO_DRAFTER,
    BarSkipped,
    Measured,
    built_in,
    encoded,
    equal_texts,
    measured,
    median_of,
    rate_ratio,
    rates,
)
from benchmarks.pair_bars import Watch
from benchmarks.passes import computed, window_milliseconds
from benchmarks.programs import EngineProgram, Run, TransformersProgram, engine_program, variant
from benchmarks.turns import Rows, Sides, compare, in_turns
from engine.build import Costs
from engine.config import AdaptiveLengthConfig, FixedLengthConfig, Quantization
from engine.errors import ConfigError, SourceError
from engine.model.cuda_graphs import recorder_of
from engine.model.layer_math import TORCH, LayerMath
from engine.model.linear import choose
from engine.model.paged import kv_bytes_per_token
from engine.model.timing import measure
from engine.model.triton_layer import TritonMath, why_not
from server.settings import load as load_deployment

_log = logging.getLogger(__name__)

NUM_DRAFT = 5
FIXED = FixedLengthConfig(max=NUM_DRAFT)
ADAPTIVE = AdaptiveLengthConfig()


# ---------------------------------------------------------------------- a batch that decodes
def decode(setting: GpuSetting, num_streams: int, context: int) -> Measured:
    """Bytes of weights and KV that a step reads over its time, as a share of the bytes that the device copies a second."""
    shape, pair = setting.shape, setting.models.pair
    weights, per_token = read_bytes(pair.model), kv_bytes_per_token(pair.target.stack)
    step_bytes = list[float]()
    with decoding(setting, num_streams, context, shape.steps) as batch:

        def ours(_: int) -> float:
            before = batch.num_context
            seconds = batch.seconds(shape.steps)
            step_bytes.append(weights + per_token * (before + batch.num_context) / 2)
            return step_bytes[-1] / seconds

        rows = in_turns(Sides(lambda i: i, [ours, lambda _: copy_rate(setting.device, shape.copy_bytes)]), setting.turns(shape.prompts))
    ours_rate = median_of(rows, 0)
    detail = {
        "gb_per_second": ours_rate / 1e9,
        "copy_gb_per_second": median_of(rows, 1) / 1e9,
        "gb_per_step": median(step_bytes) / 1e9,
        "ms_per_step": 1000 * median(step_bytes) / ours_rate,
    }
    return measured(compare(rows, lambda row: 100 * row[0] / row[1]), detail)


def idle(setting: GpuSetting, num_streams: int) -> Measured:
    """The share of a step's time in which no kernel runs: kernels by the profiler, time without it."""
    shape, counts = setting.shape, list[int]()
    with decoding(setting, num_streams, shape.prompt, 2 * shape.steps) as batch:

        def busy(_: int) -> float:
            seconds, num = busy_seconds(setting.device, lambda: batch.seconds(shape.steps))
            counts.append(num // shape.steps)
            return seconds / shape.steps

        busy(0)  # the profiler's own beginning takes a second
        rows = in_turns(Sides(lambda i: i, [busy, lambda _: batch.seconds(shape.steps)]), setting.turns(shape.prompts - 1))
    detail = {"busy_ms": 1000 * median_of(rows, 0), "step_ms": 1000 * median_of(rows, 1), "kernels_per_step": median(counts)}
    return measured(compare(rows, lambda row: 100 * (1 - row[0] / row[1])), detail)


# ---------------------------------------------------------------------- passes
def verify(setting: GpuSetting) -> Measured:
    """Time of a pass over 6 tokens over that of a pass over 1."""
    shape, passes = setting.shape, 4 * setting.shape.steps
    # with the drafter, so that windows of its drafts are recorded as well as single tokens
    core = setting.program(Asked(1, shape.prompt + 16, FIXED), setting.models.pair.drafter).core

    def side(num_draft: int) -> Callable[[Any], float]:
        return lambda seq: window_milliseconds(core, seq, num_draft, passes)

    sides = Sides(lambda _: computed(core, setting.prompts(1, shape.prompt)[0], 8), [side(NUM_DRAFT), side(0)])
    _warm(sides)
    rows = in_turns(sides, setting.turns(shape.prompts))
    detail = {"ms_of_6": median_of(rows, 0), "ms_of_1": median_of(rows, 1)}
    return measured(compare(rows, lambda row: row[0] / row[1]), detail)


def prefill(setting: GpuSetting) -> Measured:
    """Floating-point operations a second of a long prompt, its first token included, as a share of the device's matrix rate."""
    shape = setting.shape
    program = setting.program(Asked(1, shape.prefill + 1))
    operations = pass_operations(setting.models.pair.model, shape.prefill)
    sides: Sides[Ids, float] = Sides(
        lambda _: setting.prompts(1, shape.prefill)[0],
        [
            lambda ids: operations / program.answer(ids, 1, stops=False).seconds,
            lambda _: matrix_rate(setting.device, shape.dtype, shape.matrix),
        ],
    )
    _warm(sides)
    rows = in_turns(sides, setting.turns(shape.prompts))
    detail = {
        "teraflops": median_of(rows, 0) / 1e12,
        "matrix_teraflops": median_of(rows, 1) / 1e12,
        "seconds": operations / median_of(rows, 0),
        "tokens_a_step": shape.chunk,
    }
    return measured(compare(rows, lambda row: 100 * row[0] / row[1]), detail)


def draft_step(setting: GpuSetting) -> Measured:
    """Time of a drafted token, its drawing included, over the time in which the drafter's weights would be copied."""
    shape, drafter = setting.shape, setting.models.drafter
    program = setting.program(Asked(1, shape.prompt + shape.answer, FIXED), drafter)
    watch, weights = Watch.of(program, partial(wait_for, setting.device)), read_bytes(setting.models.small)

    def a_draft(ids: Ids) -> float:
        watch.seconds.clear()
        program.answer(ids, shape.answer, stops=False)
        return median(watch.seconds)

    def reading(_: Ids) -> float:
        return weights / copy_rate(setting.device, shape.copy_bytes)

    sides = Sides(lambda _: setting.prompts(1, shape.prompt)[0], [a_draft, reading])
    _warm(sides)
    rows = in_turns(sides, setting.turns(shape.prompts))
    detail = {"draft_ms": 1000 * median_of(rows, 0), "read_ms": 1000 * median_of(rows, 1), "read_gb": weights / 1e9}
    return measured(compare(rows, lambda row: row[0] / row[1]), detail)


def quantised(setting: GpuSetting, quantization: Quantization) -> Measured:
    """Tokens a second of one stream with fewer bits over those of the very same model with all of them, no drafts, prompts included."""
    shape, pair = setting.shape, setting.models.pair
    try:
        kind = choose(quantization, shape.dtype, setting.device)
    except ConfigError as reason:
        raise BarSkipped(str(reason)) from reason
    asked = Asked(1, shape.prompt + shape.answer)
    fewer = member(pair.model, kind)
    programs = [program_of(shape, asked, target) for target in (fewer, pair.target)]
    sides = Sides(
        lambda _: setting.prompts(1, shape.prompt)[0],
        [partial(_answer, program, shape.answer) for program in programs],
    )
    _warm(sides)
    rows = in_turns(sides, setting.turns(shape.prompts))
    sizes = {"weight_gb": fewer.stack.num_weight_bytes / 1e9, "other_weight_gb": pair.target.stack.num_weight_bytes / 1e9}
    return measured(compare(rows, rate_ratio), sizes | rates(rows) | equal_texts(rows))


def fused(setting: GpuSetting) -> Measured:
    """Time of a pass over one token with torch's operations between products over that with our kernels, of the very same weights."""
    shape, pair = setting.shape, setting.models.pair
    if (reason := why_not(shape.dtype, setting.device)) is not None:
        raise BarSkipped(reason)
    few, many = 1, 64

    def side(by: LayerMath) -> Callable[[int], dict[int, float]]:
        stack = member(pair.model, math=by).stack
        return lambda _: measure(stack, (few, many), recorder_of("auto", setting.device))  # as a deployment's passes are

    sides = Sides(lambda i: i, [side(TORCH), side(TritonMath(setting.device, _log.info))])
    _warm(sides)
    rows = in_turns(sides, setting.turns(shape.prompts))
    milliseconds = {num: [[[1000 * found[num] for found in row] for row in turn] for turn in rows] for num in (few, many)}
    detail = {f"ms_of_{num}": median_of(own, 1) for num, own in milliseconds.items()}
    others = {f"other_ms_of_{num}": median_of(own, 0) for num, own in milliseconds.items()}
    return measured(compare(rows, lambda row: row[0][few] / row[1][few]), detail | others)


# ---------------------------------------------------------------------- speculation, end to end
def against_generate(setting: GpuSetting, is_assisted: bool) -> Measured:
    """Tokens a second of the pair over those of transformers' generate over the very same weights, prompts included. One stream."""
    shape, pair = setting.shape, setting.models.pair
    agreement = pair.agree(0.8)
    drafting = setting.program(Asked(1, shape.prompt + shape.answer, FIXED), pair.drafter)
    theirs, assistant = TransformersProgram(drafting.info, pair.model), None
    if is_assisted:
        assistant, settings = pair.drafting_model, pair.drafting_model.generation_config
        settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = NUM_DRAFT, "constant"
        settings.assistant_confidence_threshold = 0.0  # random models are never sure: it would end every draft at once
    sides = Sides(
        lambda _: setting.prompts(1, shape.prompt)[0],
        [
            lambda ids: drafting.answer(ids, shape.answer, stops=False),
            lambda ids: theirs.answer(ids, shape.answer, stops=False, assistant=assistant),
        ],
    )
    _warm(sides)
    rows = in_turns(sides, setting.turns(shape.prompts))
    return measured(compare(rows, rate_ratio), agreement | _drafting(rows) | equal_texts(rows))


def agreement(setting: GpuSetting, goal: float) -> Measured:
    """Tokens a second of one stream with five drafts at a time over the same engine without a drafter, prompts included."""
    return _over_none(setting, goal, 1, FIXED)


def adaptive(setting: GpuSetting, num_streams: int) -> Measured:
    """The same under the adaptive policy, for so many streams at a time."""
    return _over_none(setting, 0.8, num_streams, ADAPTIVE)


def _over_none(setting: GpuSetting, goal: float, num_streams: int, length: FixedLengthConfig | AdaptiveLengthConfig) -> Measured:
    shape, pair = setting.shape, setting.models.pair
    found = pair.agree(goal)
    costs = None
    if isinstance(length, AdaptiveLengthConfig):
        recorder = recorder_of("auto", setting.device)
        costs = Costs(measure(pair.target.stack, recorder=recorder), measure(pair.drafter.stack, recorder=recorder))
    num_tokens = shape.prompt + shape.answer
    drafting = setting.program(Asked(num_streams, num_tokens, length, costs), pair.drafter)
    plain = setting.program(Asked(num_streams, num_tokens))

    def side(program: EngineProgram) -> Callable[[list[Ids]], list[Run]]:
        return lambda asked: program.answers(asked, shape.answer, stops=False)

    sides = Sides(lambda _: setting.prompts(num_streams, shape.prompt), [side(drafting), side(plain)])
    _warm(sides)
    together = in_turns(sides, setting.turns(shape.prompts))
    rows = [[[_as_one(runs) for runs in row] for row in repetition] for repetition in together]
    return measured(compare(rows, rate_ratio), {"streams": num_streams} | found | _drafting(rows))


def recorded(setting: GpuSetting, length: FixedLengthConfig | None) -> Measured:
    """Tokens a second of one stream whose passes are recorded over those of one whose kernels are launched one by one."""
    shape, pair = setting.shape, setting.models.pair
    found, drafter = (pair.agree(0.8), pair.drafter) if length else ({}, None)
    asked = Asked(1, shape.prompt + shape.answer, length or NONE)
    programs = [setting.program(each, drafter) for each in (asked, replace(asked, is_recorded=False))]
    sides = Sides(
        lambda _: setting.prompts(1, shape.prompt)[0],
        [partial(_answer, program, shape.answer) for program in programs],
    )
    _warm(sides)
    rows = in_turns(sides, setting.turns(shape.prompts))
    return measured(compare(rows, rate_ratio), found | rates(rows) | equal_texts(rows))


def real_text(setting: GpuSetting) -> Measured:
    """Tokens a second of the deployment's pair over those without drafts, built-in prompts, one greedy stream."""
    content = load_deployment(setting.config, {}).engine_part.model_dump()["model"]
    models = ["model.target", *(["model.drafter"] if content["drafter"]["kind"] == "model" else [])]
    dtype = str(setting.shape.dtype).removeprefix("torch.")
    changes: dict[str, Any] = {"engine.device": str(setting.device)}
    changes |= {f"{model}.{key}": value for model in models for key, value in (("dtype", dtype), ("quantization", "none"))}
    try:
        drafting, plain = (engine_program(variant(setting.config, {**changes, **extra})) for extra in (EXACT, NO_DRAFTER))
    except SourceError as reason:
        raise BarSkipped(str(reason)) from reason
    prompts, num_tokens = built_in(setting.shape.prompts), setting.shape.answer
    sides = Sides(encoded(plain, prompts), [lambda ids: drafting.answer(ids, num_tokens), lambda ids: plain.answer(ids, num_tokens)])
    _warm(sides)
    rows = in_turns(sides, setting.turns(len(prompts)))
    return measured(compare(rows, rate_ratio), _drafting(rows) | equal_texts(rows))


# ---------------------------------------------------------------------- parts
def _answer(program: EngineProgram, num_tokens: int, ids: Ids) -> Run:
    return program.answer(ids, num_tokens, stops=False)


def _warm(sides: Sides[Any, Any]) -> None:
    """Whatever is compiled, allocated or looked up at the first time of a shape."""
    for measure_side in sides.measure:
        measure_side(sides.make(0))


def _as_one(runs: list[Run]) -> Run:
    """Streams that were begun together, as if they were one."""
    tokens = tuple(token for run in runs for token in run.token_ids)
    totals = {name: sum(getattr(run, name) for run in runs) for name in ("num_target_calls", "num_draft", "num_accepted")}
    return Run(tokens, max(run.seconds for run in runs), **totals)


def _drafting(rows: Rows[Run]) -> dict[str, float]:
    """Rates of both sides, how many drafts of the first one stood, and how many tokens it got of a pass of the target."""
    runs = [row[0] for repetition in rows for row in repetition]
    rates = [[[run.tokens_per_second for run in row] for row in repetition] for repetition in rows]
    num_draft, num_calls = sum(run.num_draft for run in runs), sum(run.num_target_calls for run in runs)
    return {
        "tokens_per_second": median_of(rates, 0),
        "other_tokens_per_second": median_of(rates, 1),
        "accepted_of_drafts": sum(run.num_accepted for run in runs) / num_draft if num_draft else math.nan,
        "tokens_a_target_call": sum(len(run.token_ids) for run in runs) / num_calls if num_calls else math.nan,
    }


GPU_MEASURES: Mapping[str, Callable[[GpuSetting], Measured]] = {
    "decode-1": lambda setting: decode(setting, 1, setting.shape.prompt),
    "decode-64": lambda setting: decode(setting, 64, setting.shape.context),
    "verify-6": verify,
    "idle-32": lambda setting: idle(setting, 32),
    "prefill": prefill,
    "draft-step": draft_step,
    "fused": fused,
    "int8": lambda setting: quantised(setting, "int8"),
    "fp8": lambda setting: quantised(setting, "fp8"),
    "recorded-1": lambda setting: recorded(setting, None),
    "recorded-drafts": lambda setting: recorded(setting, FIXED),
    "generate": lambda setting: against_generate(setting, is_assisted=False),
    "generate-assisted": lambda setting: against_generate(setting, is_assisted=True),
    "agreement-0.8": lambda setting: agreement(setting, 0.8),
    "agreement-0.7": lambda setting: agreement(setting, 0.7),
    "agreement-0.6": lambda setting: agreement(setting, 0.6),
    "adaptive-1": lambda setting: adaptive(setting, 1),
    "adaptive-8": lambda setting: adaptive(setting, 8),
    "adaptive-32": lambda setting: adaptive(setting, 32),
    "adaptive-128": lambda setting: adaptive(setting, 128),
    "real-text": real_text,
}
