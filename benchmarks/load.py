"""Sends a load: when each request is due, how many may be open at once, and what became of every one. Knows no HTTP and no engine.

Closed loop: everything is due at once and `max_open` requests are open, so each answer makes room for the next request.
Open loop: requests are due at random times that do not depend on the answers (a Poisson process), as those of real users do not.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from benchmarks.errors import RequestFailed
from benchmarks.prompts import Prompt


@dataclass(frozen=True)
class Drafting:
    """What became of the drafts of one answer, as the server says it."""

    num_draft_tokens: int
    num_accepted_tokens: int
    num_rounds: int  # in which something was drafted


@dataclass(frozen=True)
class Answer:
    """One complete answer. Times are of time.perf_counter in this process."""

    sent_at: float
    delivered_at: tuple[float, ...]  # when text arrived; what arrives together is one delivery
    ended_at: float  # when the finish reason arrived
    num_prompt_tokens: int
    num_cached_tokens: int  # of the prompt, not computed again
    num_output_tokens: int  # the server's own count, an end token included
    finish_reason: str
    drafting: Drafting | None = None
    num_target_calls: int | None = None
    fingerprint: str | None = None
    text: str = ""

    @property
    def ttft(self) -> float:
        """Time to the first token; an answer without text has it when it ends."""
        return (self.delivered_at[0] if self.delivered_at else self.ended_at) - self.sent_at

    @property
    def e2e(self) -> float:
        return self.ended_at - self.sent_at

    @property
    def tpot(self) -> float | None:
        """Time per output token behind the first: (end to end - first token) / (n - 1)."""
        return (self.e2e - self.ttft) / (self.num_output_tokens - 1) if self.num_output_tokens > 1 else None

    @property
    def gaps(self) -> list[float]:
        """Between deliveries; their mean is not the TPOT, since a delivery may hold several tokens."""
        return [after - before for before, after in itertools.pairwise(self.delivered_at)]


@dataclass(frozen=True)
class Outcome:
    """What became of one request of the load."""

    number: int
    category: str | None
    due_at: float
    result: Answer | RequestFailed


class Target(Protocol):
    """Whatever answers prompts."""

    async def ask(self, prompt: Prompt, number: int) -> Answer:
        """Raises RequestFailed. `number` tells requests with equal prompts apart."""


@dataclass(frozen=True)
class Load:
    """Seconds from the start at which each request is due, and how many may be open at the same time."""

    due: tuple[float, ...]
    max_open: int | None


@dataclass(frozen=True)
class LoadResult:
    """Outcomes in the order of the requests, and the time from the first that was due to the last that ended."""

    outcomes: tuple[Outcome, ...]
    seconds: float
    cpu_seconds: float  # of this process, in that time


def closed_loop(num_requests: int, concurrency: int) -> Load:
    """`concurrency` clients, each of which asks again as soon as it has its answer."""
    return Load((0.0,) * num_requests, concurrency)


def open_loop(num_requests: int, rate: float, seed: int, max_open: int | None = None) -> Load:
    """`rate` requests a second on average, with exponential gaps; the first is due at once."""
    draw, due, now = random.Random(seed), list[float](), 0.0
    for _ in range(num_requests):
        due.append(now)
        now += draw.expovariate(rate)
    return Load(tuple(due), max_open)


async def run_load(target: Target, prompts: Sequence[Prompt], load: Load, on_done: Callable[[Outcome], None]) -> LoadResult:
    """Ask every prompt when it is due. A failed request is an outcome; any other error ends the run."""
    limit: contextlib.AbstractAsyncContextManager[object] = (
        contextlib.nullcontext() if load.max_open is None else asyncio.Semaphore(load.max_open)
    )
    start, cpu = time.perf_counter(), time.process_time()

    async def one(number: int, prompt: Prompt) -> Outcome:
        due_at = start + load.due[number]
        await asyncio.sleep(due_at - time.perf_counter())
        async with limit:
            try:
                result: Answer | RequestFailed = await target.ask(prompt, number)
            except RequestFailed as failure:
                result = failure
        outcome = Outcome(number, prompt.category, due_at, result)
        on_done(outcome)
        return outcome

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(number, prompt)) for number, prompt in enumerate(prompts)]
    outcomes = tuple(task.result() for task in tasks)
    return LoadResult(outcomes, time.perf_counter() - start, time.process_time() - cpu)
