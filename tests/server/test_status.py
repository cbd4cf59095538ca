"""The line that tells whoever started the server how it is doing."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from engine.stats import StepStats
from server.status import Status, report

STEP = StepStats(
    step_seconds=0.02,
    num_running=3,
    num_waiting=1,
    num_blocks=64,
    num_used_blocks=16,
    num_target_tokens=15,
    num_emitted_tokens=9,
    num_preemptions=0,
    num_prefix_queried_tokens=0,
    num_prefix_hit_tokens=0,
    undrafted_seconds=0.03,
    num_draft_tokens=12,
    num_accepted_tokens=6,
    draft_lengths=(0, 0, 0, 0, 3),
)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("server.status.time.monotonic", lambda: now[0])
    return now


def test_it_says_what_the_last_seconds_were_like(clock: list[float]) -> None:
    it = Status()
    for _ in range(20):
        it.observe_step(STEP)
    clock[0] += 10
    assert it.line() == "18 tokens/s, 3 running, 1 waiting, KV 25%, 50% of drafts stand, about 1.50x the speed without them"
    assert it.line() is None, "nothing happened since"


def test_without_drafts_it_says_so(clock: list[float]) -> None:
    it = Status()
    it.observe_step(msgspec.structs.replace(STEP, num_draft_tokens=0, num_accepted_tokens=0))
    clock[0] += 1
    assert it.line() == "9 tokens/s, 3 running, 1 waiting, KV 25%, nothing drafted"


async def test_it_is_printed_while_there_is_work_and_not_while_idle() -> None:
    it, said = Status(), list[str]()
    task = asyncio.ensure_future(report(it, said.append, seconds=0.01))
    await asyncio.sleep(0.05)
    assert said == []
    it.observe_step(STEP)
    await asyncio.sleep(0.05)
    task.cancel()
    assert len(said) == 1
