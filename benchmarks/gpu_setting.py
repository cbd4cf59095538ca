"""With what the bars of a GPU are measured, and a batch of sequences that decodes while it is watched."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.errors import BenchmarkError
from benchmarks.gpu_models import Asked, Ids, Models, Shape, program_of
from benchmarks.programs import EngineProgram
from benchmarks.turns import Turns
from engine.model.member import Member
from engine.request import Request, SamplingParams


@dataclass(frozen=True)
class GpuSetting:
    """With what, and how thoroughly."""

    models: Models
    config: Path  # the deployment of the bar of real text
    repetitions: int
    seconds: float  # of a bar's turns
    tick: Callable[[], None] = lambda: None

    @property
    def shape(self) -> Shape:
        return self.models.shape

    @property
    def device(self) -> torch.device:
        return self.models.device

    def turns(self, num_prompts: int) -> Turns:
        return Turns(num_prompts, self.repetitions, self.tick, self.seconds)

    @property
    def num_turns(self) -> int:
        return self.shape.prompts * self.repetitions

    def program(self, asked: Asked, drafter: Member | None = None) -> EngineProgram:
        return program_of(self.shape, asked, self.models.pair.target, drafter)

    def prompts(self, num: int, num_tokens: int) -> list[Ids]:
        return [self.models.prompts.new(num_tokens) for _ in range(num)]


# ---------------------------------------------------------------------- a batch that decodes
class Decoding:
    """A batch whose prompts are computed, stepped a few steps at a time."""

    def __init__(self, program: EngineProgram, prompts: Sequence[Ids], num_tokens: int):
        self._core = program.core
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0.0)
        self._requests = [Request(id=program.new_id(), prompt_ids=ids, sampling=sampling) for ids in prompts]
        for request in self._requests:
            self._core.add(request)
        begun = set[str]()
        while len(begun) < len(self._requests):
            begun |= {delta.request_id for delta in self._core.step().deltas}

    @property
    def num_context(self) -> int:
        """Tokens of all sequences together."""
        return sum(len(seq.tokens) for seq in self._core._parts.scheduler.running)

    def seconds(self, num_steps: int) -> float:
        """Of a step, over so many."""
        start = time.perf_counter()
        for _ in range(num_steps):
            self._core.step()
        if len(self._core._parts.scheduler.running) < len(self._requests):
            raise BenchmarkError("A sequence ended while its steps were timed.")
        return (time.perf_counter() - start) / num_steps

    def close(self) -> None:
        for request in self._requests:
            self._core.abort(request.id, 0)


@contextmanager
def decoding(setting: GpuSetting, num_streams: int, context: int, steps_a_turn: int) -> Iterator[Decoding]:
    """No drafts. The batch has room for all turns of a bar, and has made a few steps."""
    shape = setting.shape
    meanwhile = num_streams * context // shape.chunk + 2  # tokens of the first while the last still computes its prompt
    num_tokens = steps_a_turn * setting.num_turns + 2 * shape.steps + meanwhile
    program = setting.program(Asked(num_streams, context + num_tokens))
    batch = Decoding(program, setting.prompts(num_streams, context), num_tokens)
    batch.seconds(2 * shape.steps)
    try:
        yield batch
    finally:
        batch.close()
