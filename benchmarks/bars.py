"""What each speed bar measures. The bars themselves, and how results are shown, stand in speed.py.

Every comparison runs in turns within one process: prompt by prompt, several repetitions, engines of the same weights side by side.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import msgspec
import torch

from benchmarks.body import BodyMaker
from benchmarks.client import PATHS, HttpTarget, base_url_of, open_client
from benchmarks.errors import BenchmarkError, RequestFailed
from benchmarks.front_bars import FRONT_MEASURES
from benchmarks.load import closed_loop, run_load
from benchmarks.measuring import (
    NO_DRAFTER,
    BarSkipped,
    Measured,
    Setting,
    built_in,
    encoded,
    equal_texts,
    measured,
    median_of,
    rate_ratio,
    rates,
    seconds,
    spec_bench,
    time_per_token_ratio,
    time_ratio,
)
from benchmarks.pair_bars import PAIR_MEASURES
from benchmarks.passes import alone, computed, window, window_milliseconds
from benchmarks.programs import PromptEncoder, TransformersProgram, engine_program
from benchmarks.prompts import Prompt, of_text, random_words
from benchmarks.request_bars import REQUEST_MEASURES
from benchmarks.served import ServedDeployment, serve
from benchmarks.stats import Estimate, estimate, estimate_mean_per
from benchmarks.turns import Sides, compare, in_turns
from engine.core import EngineCore
from engine.errors import ConfigError
from engine.model.linear import choose
from engine.model.loader import resolve_device
from server.settings import load as load_deployment

FLOAT32: Mapping[str, Any] = {"model.target.dtype": "float32"}
NGRAM: Mapping[str, Any] = {
    "model.drafter": {"kind": "ngram", "max_n": 3, "min_n": 1},
    "speculation.draft_length": {"policy": "fixed", "max": 4},
}
INT8: Mapping[str, Any] = {"model.target.quantization": "int8"}
# A block's memory counts as resident when it is first used. With so few, all of them are in use before the first look.
FEW_BLOCKS: Mapping[str, Any] = {"engine.kv_cache": 64 << 20}
# Of spec_bench_dev.jsonl: the ten shortest questions of the category summarization, and the ten shortest of rag.
SUMMARIES_AND_RETRIEVAL = (245, 251, 259, 261, 275, 277, 283, 287, 291, 305, 501, 503, 505, 509, 519, 523, 527, 535, 549, 555)


# ---------------------------------------------------------------------- against transformers
def one_stream(setting: Setting) -> Measured:
    """Tokens a second of one float32 stream without drafts over those of transformers' generate, prompts included."""
    ours = engine_program(setting.engine(NO_DRAFTER, FLOAT32))
    theirs, num_tokens = TransformersProgram(ours.info), setting.size(128, 8)
    prompts = built_in(setting.size(6, 2))
    sides = Sides(
        encoded(ours, prompts),
        [lambda ids: ours.answer(ids, num_tokens, stops=False), lambda ids: theirs.answer(ids, num_tokens, stops=False)],
    )
    rows = in_turns(sides, setting.turns(len(prompts)))
    return measured(compare(rows, rate_ratio), rates(rows) | equal_texts(rows))


def prefill(setting: Setting) -> Measured:
    """Seconds that transformers needs for a long prompt and one token, over ours."""
    ours = engine_program(setting.engine(NO_DRAFTER))
    theirs, encoder = TransformersProgram(ours.info), PromptEncoder(ours.info.target_path)
    num_tokens = setting.size(1500, 100)
    sides = Sides(lambda _: encoder.words(num_tokens), [lambda ids: ours.answer(ids, 1), lambda ids: theirs.answer(ids, 1)])
    rows = in_turns(sides, setting.turns(setting.size(4, 2)))
    return measured(compare(rows, time_ratio), {"prompt_tokens": num_tokens} | seconds(rows) | equal_texts(rows))


# ---------------------------------------------------------------------- of the engine
def forward_window(setting: Setting) -> Measured:
    """Seconds of a pass over 6 tokens over those of a pass over 1, head included, 200 tokens into a sequence."""
    core = engine_program(setting.engine(NO_DRAFTER)).core
    encoder, context, passes = PromptEncoder(core.info.target_path), 200, setting.size(20, 2)
    sides = Sides(
        lambda _: computed(core, encoder.words(context + 1), 8),
        [lambda seq: window_milliseconds(core, seq, 5, passes), lambda seq: window_milliseconds(core, seq, 0, passes)],
    )
    rows = in_turns(sides, setting.turns(setting.size(8, 2)))
    detail = {"ms_of_6": median_of(rows, 0), "ms_of_1": median_of(rows, 1)}
    return measured(compare(rows, lambda row: row[0] / row[1]), detail)


def ngram(setting: Setting) -> Measured:
    """Tokens a second of one greedy stream with n-gram drafts over those without, on prompts whose words come back in the answer."""
    prompts = _chosen(setting)
    drafting, plain = engine_program(setting.engine(NGRAM)), engine_program(setting.engine(NO_DRAFTER))
    num_tokens = setting.size(200, 8)
    sides = Sides(encoded(plain, prompts), [lambda ids: drafting.answer(ids, num_tokens), lambda ids: plain.answer(ids, num_tokens)])
    rows = in_turns(sides, setting.turns(len(prompts)))
    detail = {"without_prompts": time_per_token_ratio(rows), "ids": [prompt.id for prompt in prompts]}
    return measured(compare(rows, rate_ratio), detail | rates(rows) | equal_texts(rows))


def eight_streams(setting: Setting) -> Measured:
    """Tokens a second of 8 streams together over those of the same prompts one after another, no drafts, prompts included."""
    engine = engine_program(setting.engine(NO_DRAFTER))
    num_streams, num_groups, num_tokens = 8, setting.size(3, 1), setting.size(64, 4)
    prompts, encoder = built_in(num_streams * num_groups), PromptEncoder(engine.info.target_path)
    groups = [prompts[i * num_streams : (i + 1) * num_streams] for i in range(num_groups)]

    def together(asked: tuple[Prompt, ...]) -> float:
        return max(run.seconds for run in engine.answers([encoder.new(prompt) for prompt in asked], num_tokens, stops=False))

    def one_by_one(asked: tuple[Prompt, ...]) -> float:
        return sum(engine.answer(encoder.new(prompt), num_tokens, stops=False).seconds for prompt in asked)

    rows = in_turns(Sides(lambda i: tuple(groups[i]), [together, one_by_one]), setting.turns(num_groups))
    rates = [[[num_streams * num_tokens / value for value in row] for row in repetition] for repetition in rows]
    detail = {"tokens_per_second": median_of(rates, 0), "one_stream_tokens_per_second": median_of(rates, 1)}
    return measured(compare(rows, lambda row: row[1] / row[0]), detail)


def int8(setting: Setting) -> Measured:
    """Tokens a second of one int8 stream over those of one float32 stream, no drafts."""
    _require_int8(setting)
    quantised, plain = engine_program(setting.engine(NO_DRAFTER, INT8)), engine_program(setting.engine(NO_DRAFTER, FLOAT32))
    prompts, num_tokens = built_in(setting.size(6, 2)), setting.size(128, 8)
    sides = Sides(
        encoded(plain, prompts),
        [lambda ids: quantised.answer(ids, num_tokens, stops=False), lambda ids: plain.answer(ids, num_tokens, stops=False)],
    )
    rows = in_turns(sides, setting.turns(len(prompts)))
    return measured(compare(rows, rate_ratio), rates(rows) | equal_texts(rows))


def int8_perplexity(setting: Setting) -> Measured:
    """exp of how much less likely, a token, int8 weights find answers that people wrote."""
    _require_int8(setting)
    if not setting.answers.exists():
        raise BarSkipped(f"{setting.answers} is not there; --answers names GSM8K (question, answer)")
    examples = [msgspec.json.decode(line, type=_Example) for line in setting.answers.read_bytes().splitlines()[: setting.size(100, 2)]]
    cores = [engine_program(setting.engine(NO_DRAFTER, change)).core for change in (INT8, FLOAT32)]
    encoder = PromptEncoder(cores[0].info.target_path)
    worse, losses, counts = list[float](), list[float](), list[int]()
    for example in examples:
        question, answer = encoder.new(of_text(example.question)), encoder.continuation(example.answer)
        quantised, plain = (_loss(core, question, answer) for core in cores)
        worse.append(quantised - plain)
        losses.append(plain)
        counts.append(len(answer))
        setting.tick()
    value = estimate_mean_per(worse, counts)
    ratio = Estimate(math.exp(value.median), math.exp(value.low), math.exp(value.high))
    return Measured(ratio, (ratio.median,), {"float32_perplexity": math.exp(sum(losses) / sum(counts)), "tokens": sum(counts)})


# ---------------------------------------------------------------------- of the server
def start(setting: Setting) -> Measured:
    """Seconds from typing `cascade serve` to /ready, for the deployment as it is. The first start, which may convert, is not counted."""
    seconds, config = list[float](), load_deployment(setting.config, {}).engine_part
    for i in range(1 + setting.repetitions):
        with serve(config) as served:
            if i:
                seconds.append(served.seconds_to_ready)
        setting.tick()
    return Measured(estimate(seconds), tuple(seconds))


def http_overhead(setting: Setting) -> Measured:
    """Milliseconds a token that a client of a server waits longer than a program that steps the same engine itself. One stream."""
    config = setting.engine(NO_DRAFTER)
    program, prompts, num_tokens = engine_program(config), built_in(setting.size(12, 2)), setting.size(64, 8)
    encoder = PromptEncoder(program.info.target_path)

    def stepped(prompt: Prompt) -> float:
        return 1000 * program.answer(encoder.new(prompt), num_tokens).seconds_per_token

    with serve(config) as served, asyncio.Runner() as runner:

        def asked(prompt: Prompt) -> float:
            conversation = replace(prompt, messages=tuple(encoder.messages(prompt)))
            return 1000 * runner.run(_tpot(served, config.model.name, conversation, num_tokens))

        rows = in_turns(Sides(lambda i: prompts[i], [asked, stepped]), setting.turns(len(prompts)))
    detail = {"client_ms_per_token": median_of(rows, 0), "engine_ms_per_token": median_of(rows, 1)}
    return measured(compare(rows, lambda row: row[0] - row[1]), detail)


def memory(setting: Setting) -> Measured:
    """Resident memory of the server and its engine after many requests over that after a tenth of them; a new server each repetition."""
    counts, config = (setting.size(20, 4), setting.size(200, 8)), setting.engine(FEW_BLOCKS)
    sizes = list[tuple[int, int]]()
    for _ in range(setting.repetitions):
        with serve(config) as served:
            early, late = asyncio.run(_sizes(served, config.model.name, counts))
        sizes.append((early, late))
        setting.tick()
    ratios = tuple(late / early for early, late in sizes)
    return Measured(estimate(ratios), ratios, {"requests": counts, "resident_bytes": sizes})


async def _tpot(served: ServedDeployment, model: str, prompt: Prompt, num_tokens: int) -> float:
    async with open_client(None, timeout=600) as client:
        url = f"{base_url_of(served.url)}/{PATHS['chat']}"
        answer = await HttpTarget(client, url, BodyMaker(model, max_tokens=num_tokens)).ask(prompt, 0)
    if answer.tpot is None:
        raise BenchmarkError("The server's answer has one token only; the time per token needs at least two.")
    return answer.tpot


async def _sizes(served: ServedDeployment, model: str, counts: tuple[int, int]) -> list[int]:
    """Resident memory after each of two numbers of requests."""
    prompts, sizes, done = [random_words(64 + i % 64, seed=i) for i in range(counts[1])], list[int](), 0
    async with open_client(None, timeout=600) as client:
        target = HttpTarget(client, f"{base_url_of(served.url)}/{PATHS['chat']}", BodyMaker(model, max_tokens=16))
        for count in counts:
            result = await run_load(target, prompts[done:count], closed_loop(count - done, 4), lambda outcome: None)
            failed = [outcome.result for outcome in result.outcomes if isinstance(outcome.result, RequestFailed)]
            if failed:
                raise failed[0]
            sizes.append(served.resident_bytes())
            done = count
    return sizes


# ---------------------------------------------------------------------- parts
def _require_int8(setting: Setting) -> None:
    """Raises BarSkipped where this device or processor has no 8-bit products."""
    try:
        choose("int8", torch.float32, resolve_device(setting.engine().engine.device))
    except ConfigError as reason:
        raise BarSkipped(str(reason)) from reason


def _chosen(setting: Setting) -> list[Prompt]:
    """The listed questions, summaries and retrieval in turns. Raises BarSkipped where the file is absent."""
    by_id = {prompt.id: prompt for prompt in spec_bench(setting)}
    if missing := [number for number in SUMMARIES_AND_RETRIEVAL if number not in by_id]:
        raise BenchmarkError(f"{setting.data} lacks the questions {', '.join(map(str, missing))}.")
    ids = SUMMARIES_AND_RETRIEVAL
    ordered = [by_id[number] for pair in zip(ids[:10], ids[10:], strict=True) for number in pair]
    return ordered[: setting.size(20, 2)]


class _Example(msgspec.Struct):
    """A line of GSM8K."""

    question: str
    answer: str


def _loss(core: EngineCore, question: tuple[int, ...], answer: tuple[int, ...]) -> float:
    """Nats of an answer behind its question, in one pass: the answer stands where drafts would."""
    seq = alone(core, question, len(answer) + 1)
    logits, _, _ = core._parts.runner.forward(*window(seq, num_tokens=len(question), drafts=answer))
    return torch.nn.functional.cross_entropy(logits[: len(answer)].float(), torch.tensor(answer), reduction="sum").item()


MEASURES: Mapping[str, Callable[[Setting], Measured]] = {
    "one-stream": one_stream,
    "forward-window": forward_window,
    "ngram": ngram,
    "eight-streams": eight_streams,
    "prefill": prefill,
    "int8": int8,
    "int8-perplexity": int8_perplexity,
    "start": start,
    "http-overhead": http_overhead,
    "memory": memory,
    **PAIR_MEASURES,
    **REQUEST_MEASURES,
    **FRONT_MEASURES,
}
