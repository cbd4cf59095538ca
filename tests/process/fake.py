"""A core without tensors for an engine's process: says what the source of its target tells it to. Imports no torch."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from pathlib import Path

from engine.config import EngineConfig, ModelPair, ModelSource
from engine.errors import ContextLengthExceeded, SourceError
from engine.request import FinishReason, Request, TokenDelta
from engine.stats import EngineInfo, StepOutput, StepStats
from tests.fakes import make_info

FACTORY = "tests.process.fake:build"
POISON = 666  # a prompt that begins with it ends the process in its first step
TRAP = 667  # one that begins with it hangs the process after its first token


def make_config(**script: object) -> EngineConfig:
    """A config for a fake core, such as make_config(delay=0.01)."""
    source = ",".join(f"{key}={value}" for key, value in script.items())
    return EngineConfig(model=ModelPair(name="fake", target=ModelSource(source=source or "plain")))


def build(config: EngineConfig, progress: Callable[[str], None]) -> FakeCore:
    """What ProcessClient's factory names."""
    assert "torch" not in sys.modules
    script = dict(part.split("=") for part in config.model.target.source.split(",") if "=" in part)
    progress("Loading the fake")
    time.sleep(float(script.get("loads", 0)))
    match script.get("refuses"):
        case "source":
            raise SourceError("no such model")
        case "length":
            raise ContextLengthExceeded(5, 6, 7)
        case "bug":
            raise KeyError("a bug")
    if (mark := script.get("only_once")) is not None:  # a file; loading fails when it is there
        if Path(mark).exists():
            raise SourceError("the weights are gone")
        Path(mark).touch()
    return FakeCore(float(script.get("delay", 0)), int(script.get("fails_at", 0)), int(script.get("sticks_at", 0)))


class FakeCore:
    """Emits 0, 1, 2, ... for up to two answers at a time, one token a step."""

    def __init__(self, delay: float, fails_at: int, sticks_at: int):
        self.info: EngineInfo = make_info(max_model_len=10**6, max_sequences=2)
        self._delay = delay
        self._fails_at = fails_at
        self._sticks_at = sticks_at
        self._num_steps = 0
        self._open: dict[tuple[str, int], Request] = {}
        self._emitted: dict[tuple[str, int], int] = {}
        self._tell: Callable[[tuple[str, ...]], None] = lambda request_ids: None

    @property
    def has_work(self) -> bool:
        return bool(self._open)

    def add(self, request: Request) -> None:
        for choice in request.choices:
            self._open[request.id, choice.index] = request

    def abort(self, request_id: str, choice: int) -> None:
        self._open.pop((request_id, choice), None)

    def watch(self, tell: Callable[[tuple[str, ...]], None]) -> None:
        self._tell = tell

    def step(self) -> StepOutput:
        self._num_steps += 1
        self._tell(tuple({request_id: None for request_id, _ in list(self._open)[: self.info.max_sequences]}))
        if self._num_steps == self._fails_at:
            raise RuntimeError("boom")
        while self._num_steps == self._sticks_at or any(request.prompt_ids[0] == TRAP for request in self._begun()):
            ctypes.PyDLL(None).sleep(600)  # with the interpreter lock
        time.sleep(self._delay)
        deltas = [self._emit(key, request) for key, request in list(self._open.items())[: self.info.max_sequences]]
        return StepOutput(deltas=tuple(deltas), stats=self._stats())

    def _begun(self) -> list[Request]:
        return [request for key, request in self._open.items() if key in self._emitted]

    def _emit(self, key: tuple[str, int], request: Request) -> TokenDelta:
        if request.prompt_ids[0] == POISON:
            raise SystemExit("poisoned")
        num = self._emitted.get(key, 0)
        self._emitted[key] = num + 1
        is_last = num + 1 == request.sampling.max_tokens
        if is_last:
            del self._open[key], self._emitted[key]
        return TokenDelta(request_id=key[0], choice=key[1], token_ids=(num % 256,), finish_reason=FinishReason.LENGTH if is_last else None)

    def _stats(self) -> StepStats:
        counts = dict.fromkeys(StepStats.__struct_fields__, 0) | {"num_running": len(self._open), "num_used_blocks": len(self._open)}
        return StepStats(**counts | {"step_seconds": self._delay, "draft_lengths": ()})  # type: ignore[arg-type]
