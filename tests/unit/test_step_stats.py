"""What a step says of itself: why others wait, which blocks are worth something, and whether drafts paid. Without a model."""

from __future__ import annotations

import pytest

from engine.draft.costs import PassCosts
from engine.draft.length import FixedLength
from engine.draft.worth import StepWork, WithoutDrafts
from engine.kv.block_pool import BlockPool
from engine.sched.scheduler import Limits, Scheduler, WaitingFor
from tests.unit.factories import make_drafts, make_request, make_verdict


def make_scheduler(num_blocks: int = 16, max_sequences: int = 4, budget: int = 64) -> Scheduler:
    return Scheduler(BlockPool(num_blocks, 4), Limits(max_sequences, budget), FixedLength(0))


def step(scheduler: Scheduler) -> None:
    plan = scheduler.schedule()
    lengths = [0] * len(plan.completing)
    scheduler.commit(plan, make_drafts(plan, lengths), make_verdict(*((7,),) * len(lengths)))
    scheduler.check()


def test_nobody_waits_where_there_is_room() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a"))
    step(scheduler)
    assert scheduler.waiting_for == WaitingFor()


def test_some_wait_for_a_place() -> None:
    scheduler = make_scheduler(max_sequences=1)
    for name in "abc":
        scheduler.add(make_request(name, prompt=(ord(name), 2)))
    step(scheduler)
    assert scheduler.waiting_for == WaitingFor(place=2)


def test_some_wait_for_the_next_steps_tokens() -> None:
    scheduler = make_scheduler(budget=4)
    scheduler.add(make_request("a", prompt=tuple(range(4))))
    scheduler.add(make_request("b", prompt=tuple(range(10, 14))))
    step(scheduler)
    assert scheduler.waiting_for == WaitingFor(budget=1)


def test_some_wait_for_memory_at_first_and_when_it_was_taken_from_them() -> None:
    scheduler = make_scheduler(num_blocks=3)
    scheduler.add(make_request("a", prompt=tuple(range(8)), max_tokens=4))
    scheduler.add(make_request("b", prompt=tuple(range(10, 18)), max_tokens=4))
    step(scheduler)
    assert scheduler.waiting_for == WaitingFor(memory=1)
    preempting = make_scheduler(num_blocks=2)
    preempting.add(make_request("a", prompt=(1, 2, 3, 4), max_tokens=4))
    preempting.add(make_request("b", prompt=(5, 6, 7, 8), max_tokens=4))
    step(preempting)
    step(preempting)
    assert preempting.counters.num_preemptions == 1
    assert preempting.waiting_for == WaitingFor(memory=1)


def test_some_wait_for_the_one_that_computes_their_blocks() -> None:
    scheduler = make_scheduler(budget=6)
    prompt = tuple(range(10))
    scheduler.add(make_request("a", prompt=prompt))
    scheduler.add(make_request("b", prompt=prompt))
    step(scheduler)
    assert scheduler.waiting_for == WaitingFor(budget=1), "nothing was left to give out, so nobody looked at it"
    step(scheduler)
    assert scheduler.waiting_for == WaitingFor(leader=1)


def test_blocks_that_nobody_holds_count_as_cached_while_they_can_be_found() -> None:
    scheduler = make_scheduler(num_blocks=4)
    pool = scheduler.pool
    scheduler.add(make_request("a", prompt=tuple(range(9)), max_tokens=1))
    step(scheduler)
    assert (pool.num_used, pool.num_cached, pool.num_free) == (0, 2, 4)
    scheduler.add(make_request("b", prompt=(*range(8), 99), max_tokens=2))
    step(scheduler)
    assert (pool.num_used, pool.num_cached) == (3, 0), "both are held again"
    step(scheduler)
    assert (pool.num_used, pool.num_cached) == (0, 2)
    scheduler.add(make_request("c", prompt=tuple(range(20, 35)), max_tokens=1))
    step(scheduler)
    assert pool.num_cached == 3, "its own; those of before were taken for it"


def test_what_tokens_would_have_cost_without_drafts() -> None:
    without = WithoutDrafts(PassCosts({1: 1.0, 4: 1.0, 8: 2.0}))
    nothing_drafted = without.seconds(StepWork(num_plain_rows=3, num_drafts=0, num_answers=3, num_emitted=3), 0.9, 0.1)
    assert nothing_drafted == pytest.approx(1.0), "what it took, without a guess"
    without = WithoutDrafts(PassCosts({1: 1.0, 4: 1.0, 8: 2.0}))
    drafted = without.seconds(StepWork(num_plain_rows=2, num_drafts=6, num_answers=2, num_emitted=6), 2.0, 0.1)
    assert drafted == pytest.approx(3 * 1.1), "three passes over two rows, each planned"
    prompt = without.seconds(StepWork(num_plain_rows=4, num_drafts=0, num_answers=0, num_emitted=0), 1.0, 0.0)
    assert prompt == pytest.approx(1.0)


def test_it_learns_what_passes_cost() -> None:
    without = WithoutDrafts()
    for _ in range(50):
        without.seconds(StepWork(1, 0, 1, 1), 0.02, 0.0)
        without.seconds(StepWork(1, 4, 1, 1), 0.03, 0.0)
    assert without.seconds(StepWork(1, 4, 1, 1), 0.03, 0.0) == pytest.approx(0.02, rel=0.05), "a pass that brought nothing"
    assert without.seconds(StepWork(1, 4, 1, 4), 0.03, 0.0) == pytest.approx(0.08, rel=0.05)
