"""The step loop. Everything a request goes through is one of the verbs of `EngineCore.step`.

Synchronous and single-threaded: whoever owns the core calls `add`, `abort` and `step` from one thread, commands between steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from engine.model.runner import ModelRunner
from engine.plan import DraftBatch, Drafter, RowBatch, StepPlan, StepTiming, Verdict
from engine.request import Request, TokenDelta
from engine.sampling.distributions import Distributions
from engine.sampling.logprobs import logprobs_of
from engine.sched.scheduler import Scheduler, SchedulerCounters
from engine.sequence import Sequence
from engine.stats import EngineInfo, StepOutput, StepStats
from engine.verify.verifier import Verifier


@dataclass(frozen=True, slots=True)
class Parts:
    """What build.py puts together."""

    scheduler: Scheduler
    drafter: Drafter
    runner: ModelRunner
    distributions: Distributions
    verifier: Verifier
    max_drafter_tokens: int
    is_lost: Callable[[Sequence], bool]  # nothing can follow a sequence


def windows_of(logits: Tensor, rows: RowBatch) -> tuple[Tensor, RowBatch]:
    """The rows of the verify windows; nearly always that is all of them, and nothing is copied."""
    windows = rows.windows()
    return (logits, rows) if len(windows) == len(rows.offsets) else (logits[windows], rows.select(windows))


class EngineCore:
    """One engine: a scheduler, a drafter, a target and a verifier."""

    def __init__(self, parts: Parts, info: EngineInfo):
        self._parts = parts
        self._info = info

    @property
    def info(self) -> EngineInfo:
        return self._info

    @property
    def has_work(self) -> bool:
        return self._parts.scheduler.has_work

    def add(self, request: Request) -> None:
        """Queue a request that Admission has let through."""
        self._parts.scheduler.add(request)

    def abort(self, request_id: str, choice: int) -> None:
        """Drop a choice now; its blocks are free for the next step. No further delta of it is made."""
        seq = self._parts.scheduler.abort(request_id, choice)
        if seq is not None:
            self._parts.drafter.forget(seq)

    def step(self) -> StepOutput:
        """Run one pass of the target over whatever is due, and say what it emitted."""
        began, parts, before = time.perf_counter(), self._parts, replace(self._parts.scheduler.counters)
        plan = parts.scheduler.schedule()
        drafts = parts.drafter.propose(plan, parts.max_drafter_tokens)
        drafted = time.perf_counter()
        plan = plan.held_back(drafts.lagging)
        logits, rows = parts.runner.forward(plan, drafts)
        logits, rows = windows_of(logits, rows)
        p = parts.distributions.of(logits, rows)
        verdict = parts.verifier.verify(drafts, p, rows)
        parts.scheduler.policy.observe_step(_timing(plan, drafts, (began, drafted, time.perf_counter())))
        deltas = parts.scheduler.commit(plan, drafts, verdict, logprobs_of(logits, rows, verdict), parts.is_lost)
        self._observe(plan, verdict)
        stats = self._stats(plan, drafts, deltas, before, time.perf_counter() - began)
        return StepOutput(deltas=tuple(deltas), stats=stats)

    def check(self) -> None:
        """Raise AssertionError unless the bookkeeping is consistent."""
        self._parts.scheduler.check()

    def _observe(self, plan: StepPlan, verdict: Verdict) -> None:
        parts = self._parts
        parts.drafter.observe(plan, verdict)
        for chunk in plan.chunks:
            if not parts.scheduler.holds(chunk.seq):
                parts.drafter.forget(chunk.seq)

    def _stats(self, plan: StepPlan, drafts: DraftBatch, deltas: list[TokenDelta], before: SchedulerCounters, seconds: float) -> StepStats:
        scheduler = self._parts.scheduler
        now = scheduler.counters
        return StepStats(
            step_seconds=seconds,
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_blocks=scheduler.pool.num_blocks,
            num_used_blocks=scheduler.pool.num_used,
            num_target_tokens=sum(chunk.num_tokens for chunk in plan.chunks) + drafts.num_draft_tokens,
            num_emitted_tokens=sum(len(delta.token_ids) for delta in deltas),
            num_preemptions=now.num_preemptions - before.num_preemptions,
            num_prefix_queried_tokens=now.num_prefix_queried_tokens - before.num_prefix_queried_tokens,
            num_prefix_hit_tokens=now.num_prefix_hit_tokens - before.num_prefix_hit_tokens,
        )


def _timing(plan: StepPlan, drafts: DraftBatch, times: tuple[float, float, float]) -> StepTiming:
    began, drafted, ended = times
    return StepTiming(
        num_target_rows=sum(chunk.num_tokens for chunk in plan.chunks) + drafts.num_draft_tokens,
        target_seconds=ended - drafted,
        num_drafter_calls=drafts.num_passes,
        num_drafter_rows=drafts.num_rows,
        drafter_seconds=drafted - began,
    )
