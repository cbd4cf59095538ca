"""An engine without a model, for measuring the server in front of it: every step takes a millisecond and gives every answer one token.

`python -m benchmarks.pretend FILE` serves a deployment with it, in a process of its own like any engine.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

from engine.config import EngineConfig
from engine.model.budget import ON_CPU, plan_memory
from engine.model.loader import end_token_ids, read_config
from engine.model.source import resolve
from engine.request import FinishReason, Request, TokenDelta
from engine.stats import EngineInfo, StepOutput, StepStats
from server.launch import run
from server.listener import bind
from server.settings import load

STEP_SECONDS = 0.001
_LONGEST = 1024  # tokens of the text that every answer repeats


class PretendCore:
    """What a client needs of an EngineCore."""

    def __init__(self, info: EngineInfo):
        self.info = info
        rng = random.Random(0)
        self._text = [rng.randrange(100, min(10_000, info.vocab_size)) for _ in range(_LONGEST)]
        self._answers: dict[tuple[str, int], tuple[int, int]] = {}  # tokens that were said, and that are to be
        self._due = 0.0

    @property
    def has_work(self) -> bool:
        return bool(self._answers)

    def add(self, request: Request) -> None:
        for choice in request.choices:
            self._answers[request.id, choice.index] = 0, request.sampling.max_tokens

    def abort(self, request_id: str, choice: int) -> None:
        self._answers.pop((request_id, choice), None)

    def watch(self, tell: Callable[[tuple[str, ...]], None]) -> None:
        """Nobody asks what a pretended engine runs."""

    def step(self) -> StepOutput:
        self._due = max(self._due + STEP_SECONDS, time.perf_counter())
        deltas = [self._say(*key) for key in list(self._answers)]
        time.sleep(max(0.0, self._due - time.perf_counter()))
        return StepOutput(deltas=tuple(deltas), stats=self._stats(len(deltas)))

    def _say(self, request_id: str, choice: int) -> TokenDelta:
        said, most = self._answers[request_id, choice]
        self._answers[request_id, choice] = said + 1, most
        reason = FinishReason.LENGTH if said + 1 == most else None
        if reason is not None:
            del self._answers[request_id, choice]
        token = self._text[said % len(self._text)]
        return TokenDelta(request_id=request_id, choice=choice, token_ids=(token,), finish_reason=reason, num_target_calls=said + 1)

    def _stats(self, num: int) -> StepStats:
        return StepStats(
            step_seconds=STEP_SECONDS,
            num_running=num,
            num_waiting=0,
            num_blocks=1,
            num_used_blocks=0,
            num_target_tokens=num,
            num_emitted_tokens=num,
            num_preemptions=0,
            num_prefix_queried_tokens=0,
            num_prefix_hit_tokens=0,
        )


def make(config: EngineConfig, progress: Callable[[str], None]) -> PretendCore:
    """The factory that an engine's process calls. Reads the target's tokenizer and config, and no weights."""
    path = resolve(config.model.target, None, progress)
    model = read_config(path)
    memory = plan_memory(config.engine, 1024, 8192, int(config.engine.kv_cache or ON_CPU))
    return PretendCore(
        EngineInfo(
            incarnation="pretend",
            target=config.model.target.source,
            drafter="none",
            target_path=str(path),
            device="cpu",
            dtype="float32",
            vocab_size=model.vocab_size,
            max_model_len=memory.max_model_len,
            end_token_ids=end_token_ids(path),
            rules=("exact",),
            max_draft=0,
            max_sequences=config.engine.max_sequences,
            num_blocks=memory.num_blocks,
            block_size=config.engine.block_size,
            weight_bytes=0,
            kv_bytes=1024,
        )
    )


def main(file: str) -> None:
    """Serve a deployment."""
    deployment = load(Path(file), {})
    run(deployment, bind(deployment.server), lambda text: print(text, file=sys.stderr), factory="benchmarks.pretend:make")


if __name__ == "__main__":
    main(sys.argv[1])
