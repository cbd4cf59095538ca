"""An engine and transformers' generate as programs: token ids in, token ids and seconds out. No server, no event loop, no text.

Every prompt that is timed must be new to the engine: its prefix cache would otherwise answer for the peer that has none. `PromptEncoder`
makes prompts differ from the first tokens on, and `EngineProgram` refuses a figure that the cache had a part in.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from msgspec.structs import replace
from transformers import GenerationConfig

from benchmarks.errors import BenchmarkError
from benchmarks.prompts import Message, Prompt, random_words
from engine.build import build
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.model.loader import load as load_model
from engine.request import Request, SamplingParams, SpeculationParams
from engine.stats import EngineInfo
from server.settings import load as load_deployment
from server.text import TextTokenizer

KV_CACHE = 256 << 20  # bytes; engines and peers are in memory at the same time
_TURN = 0.2  # seconds of an engine among others


@dataclass(frozen=True)
class Run:
    """One answer of a program."""

    token_ids: tuple[int, ...]
    seconds: float
    first_seconds: float | None = None  # until the first tokens; None where the program does not show it
    num_first: int = 1  # tokens that came then: more than one where drafts were accepted with the prompt
    num_target_calls: int = 0  # of an engine: steps that the answer was part of
    num_draft: int = 0  # tokens that were drafted for it
    num_accepted: int = 0  # and stand

    @property
    def tokens_per_second(self) -> float:
        return len(self.token_ids) / self.seconds

    @property
    def seconds_per_token(self) -> float:
        """Of the tokens behind the first ones. Raises BenchmarkError where there are none."""
        if self.first_seconds is None or self.num_behind_first < 1:
            raise BenchmarkError("The time per token needs tokens behind the first, and the time of the first.")
        return (self.seconds - self.first_seconds) / self.num_behind_first

    @property
    def num_behind_first(self) -> int:
        return len(self.token_ids) - self.num_first


class PromptEncoder:
    """Prompts as token ids, under the model's own template; no two have the same beginning."""

    def __init__(self, folder: str | Path):
        self._tokenizer = TextTokenizer.from_folder(folder)
        self._numbers = itertools.count(1)

    def new(self, prompt: Prompt) -> tuple[int, ...]:
        """Ids that no call before has given."""
        if self._tokenizer.has_chat_template:
            return tuple(self._tokenizer.encode_chat(self.messages(prompt)))
        return tuple(self._tokenizer.encode(f"{next(self._numbers)}. {prompt.messages[-1]['content']}"))

    def messages(self, prompt: Prompt) -> list[Message]:
        """A conversation that no call before has given: a number stands at its head."""
        head = {"role": "system", "content": f"{next(self._numbers)}. You are a helpful assistant."}
        return [head, *(message for message in prompt.messages if message["role"] != "system")]

    def continuation(self, text: str) -> tuple[int, ...]:
        """Ids of what goes on where a prompt ends."""
        return tuple(self._tokenizer.encode(text)[len(self._tokenizer.encode("")) :])

    def words(self, num_tokens: int) -> tuple[int, ...]:
        """Exactly so many tokens of random words."""
        text = random_words(num_tokens, seed=next(self._numbers)).messages[0]["content"]
        return tuple(self._tokenizer.encode(text)[:num_tokens])


class EngineProgram:
    """An engine that is stepped by hand."""

    def __init__(self, core: EngineCore, speculation: SpeculationParams):
        """`speculation` counts for every request."""
        self.core = core
        self._speculation = speculation
        self._ids = itertools.count()

    @property
    def info(self) -> EngineInfo:
        return self.core.info

    def answer(self, prompt_ids: Sequence[int], num_tokens: int, stops: bool = True, temperature: float = 0.0) -> Run:
        """One stream: at most `num_tokens` tokens, exactly so many unless it `stops` at an end token."""
        return self.answers([prompt_ids], num_tokens, stops, temperature)[0]

    def answers(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, stops: bool = True, temperature: float = 0.0, max_draft: int | None = None
    ) -> list[Run]:
        """As many streams as there are prompts, begun together. `max_draft` drafts at most at a time; 0 is the target alone."""
        return self.run(self._requests(prompts, num_tokens, stops, temperature, max_draft))

    def warm(self, prompts: Sequence[Sequence[int]]) -> None:
        """Have the KV of prompts cached by target and drafter: a seed makes the drafter run them, too."""
        sampling = SamplingParams(max_tokens=1, temperature=0.0, is_seeded=True)
        for ids in prompts:
            self.core.add(Request(id=self.new_id(), prompt_ids=tuple(ids), sampling=sampling, speculation=self._speculation))
        while self.core.has_work:
            self.core.step()

    def _requests(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, stops: bool, temperature: float, max_draft: int | None
    ) -> list[Request]:
        ends = self.info.end_token_ids if stops else ()
        sampling = SamplingParams(max_tokens=num_tokens, temperature=temperature, stop_token_ids=ends)
        speculation = replace(self._speculation, enabled=max_draft != 0, max_draft=max_draft or None)
        return [Request(id=self.new_id(), prompt_ids=tuple(ids), sampling=sampling, speculation=speculation) for ids in prompts]

    def new_id(self) -> str:
        """A name for a request."""
        return f"run-{next(self._ids)}"

    def begin(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, max_draft: int | None = None, may_be_cached: bool = False
    ) -> Running:
        """Streams to be stepped: greedy answers that end by themselves."""
        return Running(self.core, self._requests(prompts, num_tokens, True, 0.0, max_draft), may_be_cached)

    def run(self, requests: Sequence[Request], may_be_cached: bool = False) -> list[Run]:
        """Requests of one choice each, begun together, to their ends."""
        running = Running(self.core, requests, may_be_cached)
        while running.has_work:
            running.step()
        return running.runs()


class Running:
    """Requests of one choice each, begun together in an engine that nobody else uses. Its clock runs only while it steps."""

    def __init__(self, core: EngineCore, requests: Sequence[Request], may_be_cached: bool):
        self._core = core
        self._may_be_cached = may_be_cached
        self.seconds = 0.0
        self._tokens: dict[str, list[int]] = {request.id: [] for request in requests}
        self._first, self._last_at, self._calls = dict[str, tuple[float, int]](), dict[str, float](), dict[str, int]()
        self._drafts = {request.id: (0, 0) for request in requests}
        for request in requests:
            core.add(request)

    @property
    def has_work(self) -> bool:
        return self._core.has_work

    def step(self) -> None:
        """Raises BenchmarkError where the prefix cache helps a prompt that was to be new."""
        start = time.perf_counter()
        deltas = self._core.step().deltas
        self.seconds += time.perf_counter() - start
        for delta in deltas:
            name = delta.request_id
            if delta.num_cached_tokens and not self._may_be_cached:
                raise BenchmarkError(f"The prefix cache held {delta.num_cached_tokens} tokens of a timed prompt; prompts must be new.")
            self._tokens[name] += delta.token_ids
            self._first.setdefault(name, (self.seconds, len(delta.token_ids)))
            self._last_at[name], self._calls[name] = self.seconds, delta.num_target_calls
            if delta.round is not None:
                num_draft, num_accepted = self._drafts[name]
                self._drafts[name] = num_draft + delta.round.num_draft, num_accepted + delta.round.num_accepted

    def runs(self) -> list[Run]:
        """Of each request, once none has work left."""
        return [
            Run(tuple(ids), self._last_at[name], *self._first[name], self._calls[name], *self._drafts[name])
            for name, ids in self._tokens.items()
        ]


def side_by_side(all_running: Sequence[Running]) -> list[list[Run]]:
    """The runs of several engines that take turns of a few steps, each by its own clock.

    A machine that others use is a tenth faster or slower for seconds at a time. Whole answers one after the other would be measured in
    different moments of it; so each engine has its share of every moment.
    """
    while any(running.has_work for running in all_running):
        for running in all_running:
            until = running.seconds + _TURN
            while running.has_work and running.seconds < until:
                running.step()
    return [running.runs() for running in all_running]


class TransformersProgram:
    """transformers' own generate over the same weights, with its own attention. Greedy."""

    def __init__(self, info: EngineInfo, model: Any = None):
        """`model` is one that is there; None loads it."""
        self._device = torch.device(info.device)
        self._model: Any = load_model(Path(info.target_path), getattr(torch, info.dtype), self._device) if model is None else model
        self._end_token_ids = list(info.end_token_ids)

    def answer(
        self, prompt_ids: Sequence[int], num_tokens: int, stops: bool = True, prompt_lookup: int | None = None, assistant: Any = None
    ) -> Run:
        """At most `num_tokens` tokens, exactly so many unless it `stops`; `prompt_lookup` is generate's prompt_lookup_num_tokens, and
        `assistant` its assistant_model."""
        # the model's own config would bring its end tokens back in, and its sampling
        config = GenerationConfig(do_sample=False, eos_token_id=self._end_token_ids if stops else None, pad_token_id=0)
        self._model.generation_config = config
        options: dict[str, Any] = {} if prompt_lookup is None else {"prompt_lookup_num_tokens": prompt_lookup}
        if assistant is not None:
            options["assistant_model"] = assistant
        start = time.perf_counter()
        row = torch.tensor([list(prompt_ids)], device=self._device)
        out = self._model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=num_tokens, **options)
        token_ids = tuple(out[0, len(prompt_ids) :].tolist())
        return Run(token_ids, time.perf_counter() - start)


def variant(config: Path, changes: Mapping[str, Any]) -> EngineConfig:
    """The engine's part of a deployment with some keys changed, such as `model.drafter`. Raises ConfigError or ValidationError."""
    content = load_deployment(config, {}).engine_part.model_dump()
    for key, value in ({"engine.kv_cache": KV_CACHE} | dict(changes)).items():
        *path, last = key.split(".")
        section = content
        for part in path:
            section = section[part]
        section[last] = value
    return EngineConfig.model_validate(content)


def engine_program(config: EngineConfig) -> EngineProgram:
    """Load an engine, whose requests are judged as the config says."""
    rule, alpha = config.speculation.judged_by()
    return EngineProgram(build(config), SpeculationParams(rule=rule, alpha=alpha))
