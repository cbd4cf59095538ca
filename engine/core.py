"""The step loop. Everything a request goes through is one of the verbs of `EngineCore.step`.

Synchronous and single-threaded: whoever owns the core calls `add`, `abort` and `step` from one thread, commands between steps.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from engine.draft.worth import StepWork, WithoutDrafts
from engine.model.memory import ADVICE, is_out_of_memory
from engine.model.runner import ModelRunner
from engine.model.source import first_line
from engine.plan import DraftBatch, Drafter, Logprobs, RowBatch, StepPlan, StepTiming, Verdict
from engine.request import Request, TokenDelta
from engine.sampling.distributions import Distributions
from engine.sampling.logprobs import logprobs_of
from engine.sched.scheduler import Scheduler, SchedulerCounters
from engine.sequence import Sequence
from engine.stats import EngineInfo, StepOutput, StepStats
from engine.transfer import to_device
from engine.verify.verifier import Verifier

_log = logging.getLogger(__name__)
_PAUSE = 0.002  # seconds


@dataclass(frozen=True, slots=True)
class Parts:
    """What build.py puts together."""

    scheduler: Scheduler
    drafter: Drafter
    runner: ModelRunner
    distributions: Distributions
    verifier: Verifier
    max_drafter_tokens: int
    without_drafts: WithoutDrafts = field(default_factory=WithoutDrafts)
    let_go: Callable[[], None] = lambda: None  # of memory that is kept for the next step


@dataclass(frozen=True, slots=True)
class _Ran:
    """A step that only has to be committed."""

    plan: StepPlan
    drafts: DraftBatch
    verdict: Verdict
    logprobs: Logprobs
    states: Tensor | None  # [B, hidden] of the target, those that the last token of each window followed from; None where nobody reads them


def windows_of(logits: Tensor, rows: RowBatch) -> tuple[Tensor, RowBatch]:
    """The rows of the verify windows; nearly always that is all of them, and nothing is copied."""
    windows = rows.windows()
    if len(windows) == len(rows.offsets):
        return logits, rows
    return logits.index_select(0, to_device(windows, logits.device, torch.long)), rows.select(windows)


@torch.inference_mode()
def last_states(states: Tensor, rows: RowBatch, drafts: DraftBatch, verdict: Verdict) -> Tensor:
    """Of states [R, hidden] of a pass, for each window the one that its last token followed from: behind the last draft that stands."""
    windows, ends = rows.windows(), accumulate(length + 1 for length in drafts.lengths)
    starts = [end - length - 1 for end, length in zip(ends, drafts.lengths, strict=True)]
    last = [windows[start + stands] for start, stands in zip(starts, verdict.num_accepted, strict=True)]
    return states.index_select(0, to_device(last, states.device, torch.long))


class EngineCore:
    """One engine: a scheduler, a drafter, a target and a verifier."""

    def __init__(self, parts: Parts, info: EngineInfo):
        self._parts = parts
        self._info = info
        self._ended = time.perf_counter()  # the last step; at first, loading
        self._tell: Callable[[tuple[str, ...]], None] = lambda request_ids: None
        self._told: tuple[str, ...] = ()

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def has_work(self) -> bool:
        return self._parts.scheduler.has_work

    def add(self, request: Request) -> None:
        """Queue a request that Admission has let through."""
        if request.grammar is not None:  # it may be made ready from now on
            self._say(*self._told, request.id)
        self._parts.scheduler.add(request)

    def abort(self, request_id: str, choice: int) -> None:
        """Drop a choice now; its blocks are free for the next step. No further delta of it is made."""
        seq = self._parts.scheduler.abort(request_id, choice)
        if seq is not None:
            self._parts.drafter.forget(seq)
        if not self.has_work:
            self._told = ()

    def step(self) -> StepOutput:
        """Run one pass of the target over whatever is due, and say what it emitted. Where memory runs out, over less."""
        clock, parts, before = _Clock(self._ended), self._parts, replace(self._parts.scheduler.counters)
        given_up: list[TokenDelta] = []
        plan = parts.scheduler.schedule()
        if not plan.chunks:  # whoever is here waits for what is made ready beside the steps
            time.sleep(_PAUSE)
        while (ran := self._run(plan, clock)) is None:
            parts.let_go()
            if not parts.scheduler.take_back(plan):
                given_up.append(self._give_up(plan.chunks[0].seq))
            plan = StepPlan(()) if given_up else parts.scheduler.schedule()
        if ran.plan.chunks:
            parts.scheduler.policy.observe_step(_timing(ran, clock))
        deltas = given_up + parts.scheduler.commit(ran.plan, ran.drafts, ran.verdict, ran.logprobs)
        self._observe(ran)
        if not self.has_work:
            self._told = ()  # whoever listens takes an idle engine's silence for an end of that
        clock.ended = self._ended = time.perf_counter()
        return StepOutput(deltas=tuple(deltas), stats=self._stats(ran.plan, ran.drafts, deltas, before, clock))

    def watch(self, tell: Callable[[tuple[str, ...]], None]) -> None:
        """Have the ids of the requests told that a pass is about to begin for, or a grammar to be made ready, when they are others than
        before: whoever is to blame if that is the end of the process."""
        self._tell = tell

    def check(self) -> None:
        """Raise AssertionError unless the bookkeeping is consistent."""
        self._parts.scheduler.check()

    def _say(self, *request_ids: str) -> None:
        preparing = self._parts.scheduler.followed.preparing
        told = tuple(dict.fromkeys(request_ids + (() if preparing is None else (preparing.request.id,))))
        if told != self._told:
            self._told = told
            self._tell(told)

    def _run(self, plan: StepPlan, clock: _Clock) -> _Ran | None:
        """All of a step that is in front of the commit: what it leaves behind is KV that counts for nothing. None where memory ran out."""
        parts = self._parts
        self._say(*(chunk.seq.request.id for chunk in plan.chunks))
        clock.planned = time.perf_counter()
        try:
            drafts = parts.drafter.propose(plan, int(min(parts.max_drafter_tokens, parts.scheduler.bound.now)))
            clock.drafted = time.perf_counter()
            plan = plan.held_back(drafts.lagging)
            clock.num_plain_rows = sum(chunk.num_tokens for chunk in plan.chunks)
            logits, rows, states = parts.runner.forward(plan, drafts)
            window_logits, windows = windows_of(logits, rows)
            p = parts.distributions.of(window_logits, windows)
            verdict = parts.verifier.verify(drafts, p, windows)
            behind = last_states(states, rows, drafts, verdict) if parts.drafter.reads_states else None
            ran = _Ran(plan, drafts, verdict, logprobs_of(logits, rows, verdict), behind)
        except RuntimeError as error:
            if not (is_out_of_memory(error) and plan.chunks):
                raise
            _log.warning(
                "Memory ran out in a step over %d sequences; it is tried with less. To be rid of this, %s. %s",
                len(plan.chunks),
                ADVICE,
                first_line(error),
            )
            return None
        clock.verified = time.perf_counter()
        return ran

    def _give_up(self, seq: Sequence) -> TokenDelta:
        _log.error("Memory ran out over a single token of request %s, which is given up; %s", seq.request.id, ADVICE)
        self._parts.drafter.forget(seq)
        return self._parts.scheduler.give_up(seq)

    def _observe(self, ran: _Ran) -> None:
        parts = self._parts
        parts.drafter.observe(ran.plan, ran.verdict, ran.states)
        for chunk in ran.plan.chunks:
            if not parts.scheduler.holds(chunk.seq):
                parts.drafter.forget(chunk.seq)

    def _stats(self, plan: StepPlan, drafts: DraftBatch, deltas: list[TokenDelta], before: SchedulerCounters, clock: _Clock) -> StepStats:
        scheduler, now = self._parts.scheduler, self._parts.scheduler.counters
        rounds = [delta.round for delta in deltas if delta.round is not None]
        num_emitted = [len(delta.token_ids) for delta in deltas if delta.token_ids]
        what = StepWork(clock.num_plain_rows, drafts.num_draft_tokens, len(num_emitted), sum(num_emitted))
        return StepStats(
            step_seconds=clock.ended - clock.began,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_blocks=scheduler.pool.num_blocks,
            num_used_blocks=scheduler.pool.num_used,
            num_target_tokens=clock.num_plain_rows + drafts.num_draft_tokens,
            num_emitted_tokens=sum(num_emitted),
            num_preemptions=now.num_preemptions - before.num_preemptions,
            num_prefix_queried_tokens=now.num_prefix_queried_tokens - before.num_prefix_queried_tokens,
            num_prefix_hit_tokens=now.num_prefix_hit_tokens - before.num_prefix_hit_tokens,
            schedule_seconds=clock.schedule_seconds,
            draft_seconds=clock.draft_seconds,
            verify_seconds=clock.verify_seconds,
            wait_seconds=clock.began - clock.ended_before,
            undrafted_seconds=self._parts.without_drafts.seconds(what, clock.verify_seconds, clock.schedule_seconds),
            num_sequences=sum(chunk.num_tokens > 0 for chunk in plan.chunks),
            num_draft_tokens=sum(became.num_draft for became in rounds),
            num_accepted_tokens=sum(became.num_accepted for became in rounds),
            draft_lengths=_counts(drafts.lengths),
            num_cached_blocks=scheduler.pool.num_cached,
            num_waiting_for_place=scheduler.waiting_for.place,
            num_waiting_for_memory=scheduler.waiting_for.memory,
            num_waiting_for_leader=scheduler.waiting_for.leader,
            num_waiting_for_budget=scheduler.waiting_for.budget,
        )


@dataclass(slots=True)
class _Clock:
    """When the parts of a step began and ended, and how many tokens its pass ran beside drafts."""

    ended_before: float  # the step before
    began: float = field(default_factory=time.perf_counter)
    planned: float = 0.0
    drafted: float = 0.0
    verified: float = 0.0
    ended: float = 0.0
    num_plain_rows: int = 0

    @property
    def schedule_seconds(self) -> float:
        return self.planned - self.began + self.ended - self.verified

    @property
    def draft_seconds(self) -> float:
        return self.drafted - self.planned

    @property
    def verify_seconds(self) -> float:
        return self.verified - self.drafted


def _timing(ran: _Ran, clock: _Clock) -> StepTiming:
    return StepTiming(
        num_target_rows=clock.num_plain_rows + ran.drafts.num_draft_tokens,
        num_drafts=ran.drafts.num_draft_tokens,
        target_seconds=clock.verify_seconds,
        num_drafter_calls=ran.drafts.num_passes,
        num_drafter_rows=ran.drafts.num_rows,
        num_late_rows=ran.drafts.num_late_rows,
        drafter_seconds=clock.draft_seconds,
    )


def _counts(lengths: tuple[int, ...]) -> tuple[int, ...]:
    """How often each number occurs, from 0 to the largest."""
    return tuple(map(lengths.count, range(max(lengths, default=-1) + 1)))
