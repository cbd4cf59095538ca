"""Priority: who starts, who is preempted, who waits for whom, and who may have been running."""

from __future__ import annotations

import msgspec
import pytest

from engine.errors import InvalidRequest
from engine.request import Request
from tests.unit.factories import make_request
from tests.unit.test_admission import ADMISSION
from tests.unit.test_scheduler import make_scheduler, shape, step


def with_priority(priority: int, request: Request) -> Request:
    return msgspec.structs.replace(request, priority=priority)


def test_the_more_important_starts_first_and_equals_as_they_come() -> None:
    scheduler = make_scheduler(max_sequences=1, length=0)
    for name, priority in (("first", 0), ("low", 7), ("late", 0), ("high", -3), ("high too", -3)):
        scheduler.add(with_priority(priority, make_request(name, (len(name),), max_tokens=1)))
    order = [delta.request_id for _ in range(5) for delta in step(scheduler)[1]]
    assert order == ["high", "high too", "first", "late", "low"]


def test_the_less_important_is_preempted_although_it_is_older() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=2, length=0)
    scheduler.add(with_priority(1, make_request("low", (1, 2, 3), max_tokens=5)))
    step(scheduler)
    scheduler.add(make_request("high", (4, 5, 6), max_tokens=5))
    scheduler.add(with_priority(1, make_request("low too", (7, 8, 9), max_tokens=5)))
    plans = [shape(step(scheduler)[0]) for _ in range(2)]
    assert plans[0] == [("low", 1, 0, True), ("high", 3, 0, True)]
    assert [name for name, *_ in plans[1]] == ["high"], "memory is short"
    assert scheduler.counters.num_preemptions == 1
    assert [seq.request.id for seq in scheduler.waiting] == ["low", "low too"], "it goes on before its equals"


def test_nobody_waits_for_a_block_of_a_less_important_one() -> None:
    scheduler = make_scheduler(budget=4, length=0)
    prompt = tuple(range(9))
    scheduler.add(with_priority(1, make_request("low", prompt)))
    step(scheduler)
    scheduler.add(make_request("high", prompt))
    for name, priority in (("high too", 0), ("low too", 1)):
        scheduler.add(with_priority(priority, make_request(name, prompt)))
    scheduler._limits.max_step_tokens = 9
    plan, _ = step(scheduler)
    assert [name for name, *_ in shape(plan)] == ["low", "high"], "the others wait for a block of high, which does not wait for low"
    while scheduler.has_work:
        step(scheduler)
    assert scheduler.pool.num_used == 0


def test_any_request_of_32_bits_is_let_in() -> None:
    for priority in (-(2**31), 0, 2**31 - 1):
        ADMISSION.check(with_priority(priority, make_request()), num_open=0)
    for priority in (-(2**31) - 1, 2**31):
        with pytest.raises(InvalidRequest, match="32 bits") as caught:
            ADMISSION.check(with_priority(priority, make_request()), num_open=0)
        assert caught.value.param == "priority"
