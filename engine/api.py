"""The engine as a library: prompts of token ids in, answers out, in the calling thread. For benchmarks, for making training data, and for
whoever embeds an engine in a batch program. Serves nobody else meanwhile, and knows no text.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType

import msgspec

from engine.build import build
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.errors import EngineDead, InvalidRequest
from engine.model.source import Progress, silent
from engine.request import FinishReason, Request, SamplingParams, SpeculationParams, TokenDelta
from engine.sched.admission import Admission
from engine.stats import EngineInfo


@dataclass(frozen=True)
class Answer:
    """What became of one prompt."""

    token_ids: tuple[int, ...]  # a stop token included
    finish_reason: FinishReason
    num_target_calls: int  # passes of the target that it took part in
    num_drafter_calls: int
    num_draft_tokens: int
    num_accepted_tokens: int  # of these, those that stand
    num_cached_tokens: int  # leading prompt tokens that were not computed again


class Engine:
    """An engine that works while it is called.

        with Engine(config) as engine:
            answers = engine.generate(prompts, SamplingParams(max_tokens=64, stop_token_ids=engine.info.end_token_ids))

    Loads at once; raises ConfigError and its kin. One call at a time.
    """

    def __init__(self, config: EngineConfig, progress: Progress = silent):
        self._core: EngineCore | None = build(config, progress)

    @property
    def info(self) -> EngineInfo:
        return self._live_core().info

    def generate(
        self,
        prompts: Iterable[Sequence[int]],
        sampling: SamplingParams,
        speculation: SpeculationParams | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Answer]:
        """An answer for each prompt, in order; more prompts than run at the same time are fine.

        `on_progress` is told how many answers are complete and how many there will be. A prompt gets a seed of its own unless `sampling`
        has one. Raises ClientError before anything runs if any prompt can never be served.
        """
        requests = [_request(str(i), prompt, sampling, speculation or SpeculationParams()) for i, prompt in enumerate(prompts)]
        made = [_Made() for _ in requests]
        num_complete = 0
        for delta in self.stream(requests):
            made[int(delta.request_id)].add(delta)
            if delta.finish_reason is not None:
                num_complete += 1
                if on_progress is not None:
                    on_progress(num_complete, len(requests))
        return [parts.answer() for parts in made]

    def stream(self, requests: Iterable[Request]) -> Iterator[TokenDelta]:
        """The deltas of all requests as they come. What is left is aborted when the iterator is closed.

        Raises ClientError, now and not at the first delta, if any request can never be served.
        """
        asked = tuple(requests)
        core = self._live_core()
        admission = Admission(core.info, max_queued=sum(len(request.choices) for request in asked))
        for request in asked:
            admission.check(request, num_open=0)
        if len({request.id for request in asked}) < len(asked):
            raise InvalidRequest("Two requests have the same id.", "id")
        return _run(core, deque(asked))

    def close(self) -> None:
        """Let go of the models and the KV cache. Later calls raise EngineDead."""
        self._core = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _live_core(self) -> EngineCore:
        if self._core is None:
            raise EngineDead("The engine was closed.")
        return self._core


def _run(core: EngineCore, pending: deque[Request]) -> Iterator[TokenDelta]:
    """Feed the core as places become free, rather than have it look through thousands that wait."""
    if core.has_work:
        raise InvalidRequest("An engine answers one call at a time: exhaust or close the other stream first.", "requests")
    num_held = 2 * core.info.max_sequences
    unfinished: set[tuple[str, int]] = set()
    try:
        while pending or unfinished:
            while pending and len(unfinished) < num_held:
                request = pending.popleft()
                core.add(request)
                unfinished |= {(request.id, choice.index) for choice in request.choices}
            for delta in core.step().deltas:
                if delta.finish_reason is not None:
                    unfinished.discard((delta.request_id, delta.choice))
                yield delta
    finally:
        for request_id, choice in unfinished:
            core.abort(request_id, choice)


@dataclass
class _Made:
    """An answer in the making."""

    token_ids: list[int] = field(default_factory=list)
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    last: TokenDelta | None = None

    def add(self, delta: TokenDelta) -> None:
        self.token_ids += delta.token_ids
        if delta.round is not None:
            self.num_draft_tokens += delta.round.num_draft
            self.num_accepted_tokens += delta.round.num_accepted
        self.last = delta

    def answer(self) -> Answer:
        last = self.last
        assert last is not None, "a stream ends when every request has"
        assert last.finish_reason is not None
        return Answer(
            token_ids=tuple(self.token_ids),
            finish_reason=last.finish_reason,
            num_target_calls=last.num_target_calls,
            num_drafter_calls=last.num_drafter_calls,
            num_draft_tokens=self.num_draft_tokens,
            num_accepted_tokens=self.num_accepted_tokens,
            num_cached_tokens=last.num_cached_tokens,
        )


def _request(id: str, prompt: Sequence[int], sampling: SamplingParams, speculation: SpeculationParams) -> Request:
    if not sampling.is_seeded:
        sampling = msgspec.structs.replace(sampling, seed=secrets.randbits(63))
    return Request(id=id, prompt_ids=tuple(prompt), sampling=sampling, speculation=speculation)
