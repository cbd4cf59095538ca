"""An engine's process that is lost, over a fake core: by a crash, a bug or a hang; how it comes back, and who is to blame."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

from engine.errors import CrashingRequest, EngineDead, EngineRestarting
from engine.supervision import Supervision
from tests.process.clients import back, child_of, started, tokens_of
from tests.process.fake import POISON, TRAP
from tests.server.conftest import until
from tests.unit.factories import make_request


async def test_a_crash_fails_what_is_open_and_the_engine_comes_back() -> None:
    async with started(delay=0.01) as client:
        losses: list[bool] = []
        client.on_loss(losses.append)
        before = client.info.incarnation
        stream = client.submit(make_request(max_tokens=10**5))
        await anext(stream)
        child_of(client).kill()
        with pytest.raises(EngineDead, match=r"killed by signal 9"):
            await tokens_of(stream)
        assert (client.health.is_alive, client.health.is_ready) == (True, False)
        assert client.info.incarnation == before
        with pytest.raises(EngineRestarting, match="nothing of this request was run") as caught:
            client.submit(make_request(id="meanwhile"))
        assert caught.value.retry_after >= 1
        await back(client)
        assert client.info.incarnation != before
        assert losses == [True]
        assert await tokens_of(client.submit(make_request())) == [0, 1, 2, 3]


async def test_a_step_that_raises_is_a_loss_with_its_reason() -> None:
    async with started(fails_at=3) as client:
        stream = client.submit(make_request(max_tokens=10))
        with pytest.raises(EngineDead, match=r"internal error \(RuntimeError\)"):
            await tokens_of(stream)
        await back(client)
        assert await tokens_of(client.submit(make_request(max_tokens=2))) == [0, 1]


async def test_an_engine_that_hangs_is_killed_and_comes_back() -> None:
    hasty = Supervision(heartbeat_seconds=0.05, hang_seconds=2, backoff_seconds=0.01, end_seconds=1)
    async with started(hasty, delay=0.01) as client:
        await asyncio.sleep(3)
        assert client.health.is_ready, "heartbeats of an idle engine"
        stream, stopped = client.submit(make_request(max_tokens=10**5)), child_of(client)
        await anext(stream)
        stopped.suspend()
        with pytest.raises(EngineDead, match=r"hung: nothing was heard of it for \d+ s"):
            await tokens_of(stream)
        await back(client)
        assert not stopped.is_running()
        assert await tokens_of(client.submit(make_request())) == [0, 1, 2, 3]


async def test_a_step_that_never_ends_is_killed_and_says_where_it_stood(capfd: pytest.CaptureFixture[str]) -> None:
    async with started(Supervision(heartbeat_seconds=0.05, hang_seconds=0.6, backoff_seconds=0.01), sticks_at=2) as client:
        stuck, stream = child_of(client), client.submit(make_request())
        with pytest.raises(EngineDead, match="hung"):
            await tokens_of(stream)
        await until(lambda: not stuck.is_running())
    assert re.search(r'fake.py", line \d+ in step', capfd.readouterr().err)


async def test_a_step_ten_times_as_long_as_the_longest_is_no_hang() -> None:
    async with started(Supervision(heartbeat_seconds=0.05, hang_seconds=0.2, hang_steps=10), delay=0.4) as client:
        client._longest_step = 0.4  # as after a first step
        assert await tokens_of(client.submit(make_request(max_tokens=2))) == [0, 1]


async def test_a_request_that_was_there_at_three_crashes_is_refused() -> None:
    async with started() as client:
        for attempt in range(3):
            stream = client.submit(make_request(id=f"try {attempt}", prompt=(POISON, 1)))
            with pytest.raises(EngineDead):
                await tokens_of(stream)
            await back(client)
        with pytest.raises(CrashingRequest, match="failed 3 times"):
            client.submit(make_request(id="again", prompt=(POISON, 1)))
        assert await tokens_of(client.submit(make_request(id="other"))) == [0, 1, 2, 3]


async def test_a_request_that_hangs_the_engine_is_refused_even_if_nobody_waits_for_it_to_the_end() -> None:
    hasty = Supervision(heartbeat_seconds=0.05, hang_seconds=0.6, backoff_seconds=0.01, max_losses=1)
    async with started(hasty, delay=0.01) as client:
        async with client.submit(make_request(id="left in peace", prompt=(7,))) as stream:
            await anext(stream)
        await until(lambda: not client._requests.may_be_running())
        async with client.submit(make_request(prompt=(TRAP,), max_tokens=100, num_choices=2)) as stream:
            await anext(stream)
            await asyncio.sleep(0.2)  # it hangs by now
        assert not len(client._requests)
        await until(lambda: not client.health.is_ready)
        await back(client)
        await tokens_of(client.submit(make_request(id="other", prompt=(7,))))
        with pytest.raises(CrashingRequest):
            client.submit(make_request(id="again", prompt=(TRAP,), max_tokens=100, num_choices=2))


async def test_a_request_that_comes_to_its_end_is_above_suspicion() -> None:
    async with started(delay=0.01) as client:
        for is_killed in (True, True, False, True, True, False):
            stream = client.submit(make_request(max_tokens=30))
            await anext(stream)
            if is_killed:
                child_of(client).kill()
                with pytest.raises(EngineDead):
                    await tokens_of(stream)
                await back(client)
            else:
                assert (await tokens_of(stream))[-1] == 29


async def test_when_the_budget_is_spent_the_engine_stays_away() -> None:
    async with started(Supervision(backoff_seconds=0.01, max_restarts=2)) as client:
        losses: list[bool] = []
        client.on_loss(losses.append)
        for _ in range(3):
            await back(client)
            before = len(losses)
            child_of(client).kill()
            await until(lambda: len(losses) > before)  # noqa: B023
        assert losses == [True, True, False]
        assert not client.health.is_alive
        assert "restarted 2 times within 600 s and stays away" in client.health.reason
        for call in (lambda: client.submit(make_request()), lambda: client.info):
            with pytest.raises(EngineDead, match="stays away"):
                call()


async def test_a_restart_that_cannot_load_counts_against_the_budget(tmp_path: Path) -> None:
    async with started(Supervision(backoff_seconds=0.01, max_restarts=2), only_once=tmp_path / "mark") as client:
        child_of(client).kill()
        await until(lambda: not client.health.is_alive, seconds=20)
        assert "the weights are gone" in client.health.reason
