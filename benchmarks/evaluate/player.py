"""An engine that is stepped by hand, with a clock beside it: requests in, answers and times out."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import msgspec

from benchmarks.evaluate.points import GREEDY, Point
from engine.core import EngineCore
from engine.request import Request, SamplingParams, SpeculationParams, TokenDelta
from engine.sched.admission import Admission


@dataclass(frozen=True)
class Question:
    """A prompt as the engine sees it, and the numbers its answer is drawn with: the same under every point."""

    prompt_ids: tuple[int, ...]
    sampling: SamplingParams

    @property
    def greedy(self) -> Question:
        return replace(self, sampling=msgspec.structs.replace(self.sampling, temperature=0.0))


@dataclass
class Played:
    """An answer and how it came about; seconds from when its group was asked."""

    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    first_seconds: float = 0.0
    seconds: float = 0.0
    num_first: int = 0
    num_target_calls: int = 0
    num_drafter_calls: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_lossy_tokens: int = 0
    num_cached_tokens: int = 0

    def add(self, delta: TokenDelta, seconds: float) -> None:
        if not self.token_ids:
            self.first_seconds, self.num_first, self.num_cached_tokens = seconds, len(delta.token_ids), delta.num_cached_tokens
        self.token_ids += delta.token_ids
        self.seconds = seconds
        self.num_target_calls, self.num_drafter_calls = delta.num_target_calls, delta.num_drafter_calls
        if delta.round is not None:
            self.num_draft_tokens += delta.round.num_draft
            self.num_accepted_tokens += delta.round.num_accepted
            self.num_lossy_tokens += delta.round.lossy_mask.bit_count()
        if delta.finish_reason is not None:
            self.finish_reason = delta.finish_reason.value


class Player:
    """One engine."""

    def __init__(self, core: EngineCore):
        self.core = core
        self._ids = itertools.count()

    def check(self, question: Question) -> None:
        """Raise ClientError if it can never be answered."""
        Admission(self.core.info, max_queued=1).check(self._request(question, SpeculationParams()), num_open=0)

    def warm(self, question: Question) -> None:
        """Compute the prompt's KV in target and drafter, so that every point finds it, whoever comes first."""
        sampling = SamplingParams(max_tokens=1, temperature=1.0, is_seeded=True)  # a seed asks for the drafter's row, too
        self.answer([Question(question.prompt_ids, sampling)], SpeculationParams())

    def play(self, questions: Sequence[Question], point: Point) -> list[Played]:
        """Ask them together under one point."""
        asked = [question.greedy for question in questions] if point == GREEDY else questions
        return self.answer(asked, point.speculation)

    def answer(self, questions: Sequence[Question], speculation: SpeculationParams) -> list[Played]:
        requests = [self._request(question, speculation) for question in questions]
        played = {request.id: Played() for request in requests}
        start = time.perf_counter()
        for request in requests:
            self.core.add(request)
        while self.core.has_work:
            deltas = self.core.step().deltas
            now = time.perf_counter() - start
            for delta in deltas:
                played[delta.request_id].add(delta, now)
        return list(played.values())

    def _request(self, question: Question, speculation: SpeculationParams) -> Request:
        return Request(id=str(next(self._ids)), prompt_ids=question.prompt_ids, sampling=question.sampling, speculation=speculation)
