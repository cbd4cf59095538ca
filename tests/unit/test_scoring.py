"""Prompts that are scored, as the scheduler sees them: which rows are wanted, what may be reused, who waits. Without a model."""

from __future__ import annotations

import msgspec
import pytest

from engine.draft.length import FixedLength
from engine.errors import InvalidRequest
from engine.kv.block_pool import BlockPool
from engine.plan import RowsWanted, StepPlan
from engine.request import FinishReason, Request, TokenDelta
from engine.sched.admission import Admission
from engine.sched.scheduler import Limits, Scheduler
from tests.fakes import make_info
from tests.unit.factories import make_drafts, make_request, make_scores, make_verdict


def make_scheduler(num_blocks: int = 16, block_size: int = 4, budget: int = 8) -> Scheduler:
    return Scheduler(BlockPool(num_blocks, block_size), Limits(4, budget), FixedLength(0))


def scoring(id: str, num_tokens: int, max_tokens: int = 4, num_choices: int = 1) -> Request:
    request = make_request(id, tuple(range(num_tokens)), max_tokens, num_choices=num_choices)
    return msgspec.structs.replace(request, sampling=msgspec.structs.replace(request.sampling, num_prompt_logprobs=0))


def step(scheduler: Scheduler) -> tuple[StepPlan, list[TokenDelta]]:
    """Schedule and commit; every row that is wanted tells the position of the token that it chooses."""
    plan = scheduler.schedule()
    verdict = make_verdict(*((7,),) * len(plan.completing))
    deltas = scheduler.commit(plan, make_drafts(plan, [0] * len(plan.completing)), verdict, make_scores(plan))
    scheduler.check()
    return plan, deltas


def positions(deltas: list[TokenDelta]) -> list[float]:
    return [token.logprob for delta in deltas for token in delta.prompt_logprobs]


def test_all_rows_of_the_prompt_are_wanted_and_told_as_they_come() -> None:
    scheduler = make_scheduler(budget=4)
    scheduler.add(scoring("a", 9, max_tokens=2))
    steps = [step(scheduler) for _ in range(4)]
    wanted = [chunk.rows_wanted for plan, _ in steps for chunk in plan.chunks]
    assert wanted == [RowsWanted.ALL, RowsWanted.ALL, RowsWanted.WINDOW, RowsWanted.WINDOW], "the last row of a prompt chooses the answer"
    assert [positions(deltas) for _, deltas in steps] == [[1, 2, 3, 4], [5, 6, 7, 8], [], []]
    assert [delta.token_ids for _, deltas in steps for delta in deltas] == [(), (), (7,), (7,)]


def test_published_blocks_are_not_reused_for_rows_that_are_wanted() -> None:
    scheduler = make_scheduler(budget=16)
    for request in (make_request("a", tuple(range(9)), max_tokens=1), scoring("b", 9, max_tokens=1), make_request("c", tuple(range(9)))):
        scheduler.add(request)
        plan, deltas = step(scheduler)
        (chunk,) = plan.chunks
        assert chunk.num_tokens == (1 if request.id == "c" else 9)
        assert positions(deltas) == ([1, 2, 3, 4, 5, 6, 7, 8] if request.id == "b" else [])


def test_nobody_waits_for_blocks_that_it_may_not_reuse() -> None:
    scheduler = make_scheduler(budget=16)
    scheduler.add(make_request("a", tuple(range(9))))
    scheduler.add(scoring("b", 9))
    assert [chunk.seq.request.id for chunk in scheduler.schedule().chunks] == ["a", "b"]


def test_a_preempted_prompt_goes_on_where_it_was() -> None:
    """Blocks in front of the last row that was told may be found again; nothing is told twice, and nothing left out."""
    scheduler = make_scheduler(num_blocks=5, budget=6)
    scheduler.add(make_request("a", (91, 92, 93, 94), max_tokens=9))
    step(scheduler)
    scheduler.add(scoring("b", 16, max_tokens=1))
    told, hits = list[float](), list[int]()
    while scheduler.has_work:
        plan, deltas = step(scheduler)
        told += positions(deltas)
        hits += [chunk.seq.num_computed for chunk in plan.chunks if chunk.seq.request.id == "b"]
    assert scheduler.counters.num_preemptions > 0
    assert told == list(range(1, 16))
    assert scheduler.counters.num_prefix_hit_tokens > 0


def test_siblings_wait_until_the_prompt_is_scored() -> None:
    scheduler = make_scheduler(budget=16)
    scheduler.add(scoring("a", 3, num_choices=2))  # less than a block: nobody leads
    plans = [[chunk.seq.choice.index for chunk in step(scheduler)[0].chunks] for _ in range(2)]
    assert plans == [[0], [0, 1]]
    scheduler.add(scoring("b", 3, num_choices=2))
    assert scheduler.abort("b", 0) is not None
    assert [seq.is_scoring for seq in scheduler.waiting] == [False], "nobody waits for one that has gone"


def test_a_request_for_no_tokens_runs_its_prompt_and_ends() -> None:
    scheduler = make_scheduler()
    scheduler.add(scoring("a", 5, max_tokens=0))
    _, [scores, end] = step(scheduler)
    assert positions([scores]) == [1, 2, 3, 4]
    assert (end.token_ids, end.finish_reason) == ((), FinishReason.LENGTH)
    assert not scheduler.has_work
    assert scheduler.pool.num_used == 0


def test_admission_knows_the_bounds() -> None:
    admission = Admission(make_info(vocab_size=100, max_model_len=5), max_queued=1)
    admission.check(scoring("a", 5, max_tokens=0), num_open=0)
    request = scoring("a", 2)
    bad = msgspec.structs.replace(request, sampling=msgspec.structs.replace(request.sampling, num_prompt_logprobs=21))
    with pytest.raises(InvalidRequest, match="num_prompt_logprobs is 21"):
        admission.check(bad, num_open=0)
