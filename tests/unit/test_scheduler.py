"""Scheduler: plans, preemption, stops, siblings, aborts, without a model."""

from __future__ import annotations

import msgspec
import pytest

from engine.draft.adaptive import AdaptiveLength
from engine.draft.costs import PassCosts
from engine.draft.length import FixedLength
from engine.kv.block_pool import BlockPool
from engine.plan import StepPlan
from engine.request import FinishReason, Round, SpeculationParams, TokenDelta
from engine.sched.scheduler import Limits, Scheduler
from tests.unit.factories import make_drafts, make_request, make_verdict


def make_scheduler(num_blocks: int = 16, block_size: int = 4, max_sequences: int = 4, budget: int = 8, length: int = 2) -> Scheduler:
    return Scheduler(BlockPool(num_blocks, block_size), Limits(max_sequences, budget), FixedLength(length))


def step(scheduler: Scheduler, *emitted: tuple[int, ...], num_draft: int | None = None) -> tuple[StepPlan, list[TokenDelta]]:
    """Schedule and commit; by default every completing chunk emits one 7 after its drafts were rejected."""
    plan = scheduler.schedule()
    lengths = [chunk.max_draft if num_draft is None else num_draft for chunk in plan.completing]
    verdict = make_verdict(*(emitted or ((7,),) * len(lengths)))
    deltas = scheduler.commit(plan, make_drafts(plan, lengths), verdict)
    scheduler.check()
    return plan, deltas


def shape(plan: StepPlan) -> list[tuple[str, int, int, bool]]:
    return [(c.seq.request.id, c.num_tokens, c.max_draft, c.completes) for c in plan.chunks]


def test_a_long_prompt_runs_in_chunks_and_emits_when_it_completes() -> None:
    scheduler = make_scheduler(budget=4)
    scheduler.add(make_request("a", tuple(range(10))))
    plans = [step(scheduler) for _ in range(3)]
    assert [shape(plan) for plan, _ in plans] == [[("a", 4, 0, False)], [("a", 4, 0, False)], [("a", 2, 2, True)]]
    assert [len(deltas) for _, deltas in plans] == [0, 0, 1]


def test_running_sequences_come_before_waiting_ones_and_drafts_take_what_is_left() -> None:
    scheduler = make_scheduler(budget=6)
    scheduler.add(make_request("a", (1, 2, 3)))
    step(scheduler)
    scheduler.add(make_request("b", (4, 5, 6, 7)))
    plan, _ = step(scheduler)
    assert shape(plan) == [("a", 1, 1, True), ("b", 4, 0, True)]


def test_the_youngest_is_preempted_and_comes_back_first() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=2, length=0)
    scheduler.add(make_request("a", (1, 2, 3), max_tokens=5))
    scheduler.add(make_request("b", (4, 5, 6), max_tokens=5))
    step(scheduler)
    scheduler.add(make_request("c", (7, 8, 9), max_tokens=5))
    plan, _ = step(scheduler)
    assert shape(plan) == [("a", 1, 0, True), ("b", 1, 0, True)]
    plan, _ = step(scheduler)  # both need a third block
    assert shape(plan) == [("a", 1, 0, True)]
    assert scheduler.counters.num_preemptions == 1
    assert [seq.request.id for seq in scheduler.waiting] == ["b", "c"]
    assert scheduler.waiting[0].tokens == [4, 5, 6, 7, 7], "what was emitted is not lost"


def test_drafts_are_given_up_before_anyone_is_preempted() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=2, length=4)
    scheduler.add(make_request("a", (1, 2, 3)))
    scheduler.add(make_request("b", (4, 5, 6)))
    plan, _ = step(scheduler)
    assert shape(plan) == [("a", 3, 1, True), ("b", 3, 1, True)], "each has one slot left in its blocks"
    assert scheduler.counters.num_preemptions == 0


def test_the_accepted_window_is_cut_at_the_first_stop_token() -> None:
    scheduler = make_scheduler(length=3)
    scheduler.add(make_request("a", max_tokens=9, stop=(5,)))
    _, [delta] = step(scheduler, (9, 5, 9, 1))
    assert delta.token_ids == (9, 5)
    assert delta.finish_reason is FinishReason.STOP
    assert delta.round == Round(2, 2), "drafts behind an end token are counted nowhere"
    assert not scheduler.has_work
    assert scheduler.pool.num_used == 0


def test_no_more_is_drafted_than_may_be_emitted() -> None:
    scheduler = make_scheduler(length=4)
    scheduler.add(make_request("a", max_tokens=2))
    plan, [delta] = step(scheduler, (9, 1))
    assert shape(plan) == [("a", 3, 1, True)]
    assert delta.finish_reason is FinishReason.LENGTH


def test_a_draft_must_be_worth_more_than_what_those_emit_who_may_not_draft() -> None:
    costs = {1: 1.0, 16: 1.6, 32: 3.2}  # a row among many takes a tenth of what sixteen tokens do
    scheduler = Scheduler(BlockPool(64, 4), Limits(16, 256), AdaptiveLength(8, PassCosts(costs), PassCosts({1: 0.05})))
    for i in range(16):
        scheduler.add(msgspec.structs.replace(make_request(f"r{i}"), speculation=SpeculationParams(enabled=i == 0)))
    step(scheduler, num_draft=0)
    plan, _ = step(scheduler, num_draft=0)
    assert shape(plan) == [(f"r{i}", 1, 0, True) for i in range(16)]


def test_a_request_may_ask_for_fewer_drafts() -> None:
    scheduler = make_scheduler(length=3)
    for max_draft in (0, 2, 9):
        request = make_request(f"max {max_draft}", (max_draft,), max_tokens=9)
        scheduler.add(msgspec.structs.replace(request, speculation=SpeculationParams(max_draft=max_draft)))
    assert [chunk.max_draft for chunk in scheduler.schedule().chunks] == [0, 2, 3]


def test_siblings_wait_for_the_first_and_then_share_its_blocks() -> None:
    scheduler = make_scheduler(budget=16, length=0)
    scheduler.add(make_request("a", tuple(range(9)), num_choices=3))
    plan, _ = step(scheduler)
    assert shape(plan) == [("a", 9, 0, True)]
    plan, _ = step(scheduler)
    assert shape(plan) == [("a", 1, 0, True), ("a", 1, 0, True), ("a", 1, 0, True)], "two blocks of four were reused"
    tables = [seq.block_table[:2] for seq in scheduler.running]
    assert tables[0] == tables[1] == tables[2]
    assert scheduler.counters.num_prefix_hit_tokens == 16


def test_equal_prompts_of_different_salts_neither_wait_for_each_other_nor_share() -> None:
    scheduler = make_scheduler(budget=32, length=0)
    for name in ("a", "b"):
        scheduler.add(msgspec.structs.replace(make_request(name, tuple(range(9))), cache_salt=name))
    plan, _ = step(scheduler)
    assert shape(plan) == [("a", 9, 0, True), ("b", 9, 0, True)]
    first, second = (set(seq.block_table) for seq in scheduler.running)
    assert first.isdisjoint(second)


def test_a_sibling_does_not_wait_for_a_leader_that_has_gone() -> None:
    scheduler = make_scheduler(budget=4, length=0)
    scheduler.add(make_request("a", tuple(range(9))))
    scheduler.add(make_request("b", tuple(range(9))))
    step(scheduler)
    assert scheduler.abort("a", 0) is not None
    plan, _ = step(scheduler)
    assert shape(plan) == [("b", 4, 0, False)]


def test_reused_blocks_without_the_drafters_mark_leave_only_the_drafter_behind() -> None:
    scheduler = make_scheduler(budget=16, length=0)
    scheduler.add(make_request("a", tuple(range(9)), max_tokens=1))
    plan = scheduler.schedule()
    scheduler.commit(plan, make_drafts(plan, [0], drafter_computed=[5]), make_verdict((7,)))
    scheduler.add(make_request("b", tuple(range(9)), max_tokens=1))
    (chunk,) = scheduler.schedule().chunks
    assert (chunk.seq.num_computed, chunk.seq.drafter_computed) == (8, 4)


def test_abort_frees_everything_at_once_whether_running_or_waiting() -> None:
    scheduler = make_scheduler(max_sequences=1)
    scheduler.add(make_request("a"))
    scheduler.add(make_request("b"))
    step(scheduler)
    assert scheduler.abort("b", 0) is not None
    assert scheduler.abort("a", 0) is not None
    assert scheduler.abort("a", 0) is None, "a second abort is no error"
    scheduler.check()
    assert not scheduler.has_work
    assert scheduler.pool.num_used == 0


def test_an_id_that_is_in_use_is_refused() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_request("a"))
    with pytest.raises(ValueError, match="'a'"):
        scheduler.add(make_request("a"))


def test_a_lagging_drafter_holds_a_sequence_back() -> None:
    scheduler = make_scheduler(length=0)
    scheduler.add(make_request("a", (1, 2, 3)))
    plan = scheduler.schedule().held_back([True])
    assert shape(plan) == [("a", 2, 0, False)]
    assert scheduler.commit(plan, make_drafts(plan, [], [1]), make_verdict()) == []
    scheduler.check()
    plan, [delta] = step(scheduler)
    assert shape(plan) == [("a", 1, 0, True)]
    assert delta.token_ids == (7,)
