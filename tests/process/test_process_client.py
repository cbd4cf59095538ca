"""The engine in a process of its own, over a fake core: frames, losses, restarts, endings. No tensors in these children."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy
import psutil
import pytest

from engine.client import Stream
from engine.config import EngineConfig
from engine.errors import ContextLengthExceeded, CrashingRequest, EngineDead, EngineError, EngineRestarting, InvalidRequest, SourceError
from engine.incarnation import Incarnation
from engine.process import ProcessClient
from engine.request import SamplingParams
from engine.supervision import Supervision
from engine.wire import Add, Loaded, encode
from tests.fakes import make_info
from tests.process.fake import FACTORY, POISON, TRAP, make_config
from tests.process.processes import engines, folders
from tests.server.conftest import until
from tests.unit.factories import make_request

ROOT = Path(__file__).parents[2]
QUICK = Supervision(backoff_seconds=0.01, max_backoff_seconds=0.05, end_seconds=2, max_restarts=100)


def make_client(supervision: Supervision = QUICK, **script: object) -> ProcessClient:
    return ProcessClient(make_config(**script), 10, supervision=supervision, factory=FACTORY)


def loading(said: list[str], **script: object) -> ProcessClient:
    """One whose progress is written down."""
    return ProcessClient(make_config(**script), 10, said.append, QUICK, FACTORY)


@asynccontextmanager
async def started(supervision: Supervision = QUICK, **script: object) -> AsyncIterator[ProcessClient]:
    client = make_client(supervision, **script)
    await client.start()
    try:
        yield client
    finally:
        await client.close()


def child_of(client: ProcessClient) -> psutil.Process:
    assert client._child is not None
    return psutil.Process(client._child._process.pid)


async def tokens_of(stream: Stream) -> list[int]:
    return [token for batch in [batch async for batch in stream] for delta in batch for token in delta.token_ids]


async def back(client: ProcessClient) -> None:
    await until(lambda: client.health.is_ready, seconds=20)


# ---------------------------------------------------------------------- while all is well
async def test_answers_progress_and_statistics_arrive() -> None:
    said: list[str] = []
    client = loading(said, delay=0.001)
    assert client.health.reason == "the model is being loaded"
    with pytest.raises(EngineDead, match="not started"):
        client.submit(make_request())
    await client.start()
    steps: list[tuple[int, int]] = []
    client.on_step(lambda stats: steps.append((stats.num_running, threading.get_ident())))
    try:
        assert said == ["Loading the fake"]
        assert client.info.incarnation != "fake-1"
        streams = [client.submit(make_request(id=name, max_tokens=num)) for name, num in (("a", 3), ("b", 5), ("c", 2))]
        assert [await tokens_of(stream) for stream in streams] == [[0, 1, 2], [0, 1, 2, 3, 4], [0, 1]]
        assert 5 <= len(steps) <= 8, "one frame a step, not one a sequence"
        assert {ident for _, ident in steps} == {threading.get_ident()}
        with pytest.raises(InvalidRequest, match="outside the vocabulary"):
            client.submit(make_request(prompt=(5000,)))
    finally:
        await client.close()
    with pytest.raises(EngineDead, match="closed"):
        client.submit(make_request())
    assert not client.health.is_alive


async def test_an_abort_reaches_the_process() -> None:
    async with started(delay=0.01) as client:
        running: list[int] = []
        client.on_step(lambda stats: running.append(stats.num_running))
        async with client.submit(make_request(max_tokens=10**5, num_choices=2)) as stream:
            await anext(stream)
        assert [d.finish_reason async for batch in client.submit(make_request(id="next", max_tokens=4)) for d in batch][-1]
        assert running[-1] == 0
        assert len(client._requests) == 0


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [({"prompt_ids": (numpy.int64(3),)}, TypeError), ({"sampling": SamplingParams(max_tokens=2, seed=2**70)}, OverflowError)],
)
async def test_what_cannot_be_sent_harms_only_its_caller(wrong: dict[str, Any], kind: type[Exception]) -> None:
    """Sent as something else it would end the process, and all others' answers with it."""
    async with started(delay=0.001) as client:
        neighbour = client.submit(make_request(max_tokens=30))
        with pytest.raises(kind):
            client.submit(msgspec.structs.replace(make_request(id="wrong"), **wrong))
        assert len(client._requests) == 1
        assert len(await tokens_of(neighbour)) == 30


async def test_an_engine_takes_no_thread_from_the_event_loop() -> None:
    """They are few, and it would hold one as long as it lives: the server tokenises long texts in them."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    async with started(), started() as client:
        assert await asyncio.wait_for(asyncio.to_thread(threading.active_count), 5)
        child_of(client).kill()
        await until(lambda: not client.health.is_ready)


class _Unbounded(EngineConfig):
    dial: float = inf


def test_a_number_without_bound_arrives_as_it_was_sent() -> None:
    config = _Unbounded(model=make_config().model)
    start = ProcessClient(config)._start_frame(cast("Incarnation", SimpleNamespace(id="i")))
    assert _Unbounded.model_validate_json(start.config) == config


async def test_a_frame_of_another_incarnation_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """In both directions. A socket belongs to one incarnation, so the wrong frame has to be forged."""
    said: list[str] = []
    client = loading(said, delay=0.01)
    await client.start()
    try:
        child, running = client._child, list[int]()
        assert child is not None
        client.on_step(lambda stats: running.append(stats.num_running))
        child.send(Add(incarnation="earlier", request=make_request(id="old")))
        stream = client.submit(make_request(max_tokens=3))
        assert await tokens_of(stream) == [0, 1, 2]
        assert running == [1, 1, 0]
        forged = Loaded(incarnation="earlier", info=make_info())
        recv = child._line.socket.recv
        frames = [encode(forged)]
        monkeypatch.setattr(child._line.socket, "recv", lambda *flags: done(frames.pop()) if frames else recv(*flags))
        await tokens_of(client.submit(make_request(id="next", max_tokens=3)))
        assert not frames
        assert client.info.incarnation == child.id
    finally:
        await client.close()


def done(value: bytes) -> asyncio.Future[bytes]:
    future = asyncio.get_running_loop().create_future()
    future.set_result(value)
    return future


# ---------------------------------------------------------------------- loading
@pytest.mark.parametrize(
    ("script", "kind", "message"),
    [
        ("source", SourceError, "no such model"),
        ("length", ContextLengthExceeded, "maximum context length is 7"),
        ("bug", EngineDead, r"internal error \(KeyError: 'a bug'\)"),
    ],
)
async def test_what_loading_raises_comes_out_of_start(script: str, kind: type[EngineError], message: str) -> None:
    client = make_client(refuses=script)
    with pytest.raises(kind, match=message) as caught:
        await client.start()
    assert type(caught.value) is kind
    assert script != "length" or vars(caught.value)["max_model_len"] == 7
    assert not client.health.is_alive
    await client.close()


async def test_a_process_that_is_killed_while_it_loads() -> None:
    said: list[str] = []
    client = loading(said, loads=60)
    start = asyncio.ensure_future(client.start())
    await until(lambda: said)
    (child,) = engines()
    child.kill()
    with pytest.raises(EngineDead, match=r"process was killed by signal 9 \(Killed; .* while it loaded the model"):
        await start
    await client.close()


async def test_closing_does_not_wait_for_loading() -> None:
    said: list[str] = []
    client = loading(said, loads=60)
    start = asyncio.ensure_future(client.start())
    await until(lambda: said)
    began = time.monotonic()
    await client.close()
    assert time.monotonic() - began < 1.5
    with pytest.raises(EngineDead, match="closed"):
        await start
    assert not engines()


async def test_a_socket_that_cannot_be_made_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (long := tmp_path / ("x" * 100)).mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    client = make_client()
    with pytest.raises(EngineError, match=r"socket cannot be made in .*Set TMPDIR"):
        await client.start()
    assert not list(long.iterdir())


async def test_the_working_directory_does_not_lend_its_modules(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "__init__.py").write_text("raise SystemExit('the wrong engine')")
    monkeypatch.chdir(tmp_path)
    async with started() as client:
        assert client.health.is_ready


# ---------------------------------------------------------------------- losses
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
        with pytest.raises(EngineDead, match=r"internal error \(RuntimeError: boom\)"):
            await tokens_of(stream)
        await back(client)
        assert await tokens_of(client.submit(make_request(max_tokens=2))) == [0, 1]


async def test_an_engine_that_hangs_is_killed_and_comes_back() -> None:
    hasty = Supervision(heartbeat_seconds=0.05, hang_seconds=0.6, backoff_seconds=0.01, end_seconds=1)
    async with started(hasty, delay=0.01) as client:
        await asyncio.sleep(1)
        assert client.health.is_ready, "heartbeats of an idle engine"
        stream, stopped = client.submit(make_request(max_tokens=10**5)), child_of(client)
        await anext(stream)
        stopped.suspend()
        with pytest.raises(EngineDead, match="hung: nothing was heard of it for 1 s"):
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
        await until(lambda: not client._leaving)
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


# ---------------------------------------------------------------------- endings
async def test_closing_fails_open_streams_and_leaves_nothing() -> None:
    client = make_client(delay=0.01)
    await client.start()
    child, stream = child_of(client), client.submit(make_request(max_tokens=10**5))
    await anext(stream)
    await client.close()
    await client.close()
    with pytest.raises(EngineDead, match="closed"):
        await tokens_of(stream)
    assert not child.is_running()
    assert not engines()
    assert not folders()


async def test_a_process_that_does_not_end_is_killed() -> None:
    client = make_client(Supervision(end_seconds=0.2))
    await client.start()
    child = child_of(client)
    child.suspend()
    await client.close()
    assert not child.is_running()


async def test_ctrl_c_is_the_parents_business_and_sigterm_ends() -> None:
    async with started(delay=0.005) as client:
        stream = client.submit(make_request(max_tokens=40))
        child_of(client).send_signal(signal.SIGINT)
        assert len(await tokens_of(stream)) == 40
        child_of(client).terminate()
        await until(lambda: not client.health.is_ready)
        await back(client)


async def test_twenty_restarts_leave_nothing_behind() -> None:
    process = psutil.Process()
    async with started(delay=0.001) as client:
        counts: list[tuple[int, int, int]] = []
        for attempt in range(20):
            stream = client.submit(make_request(prompt=(attempt,), max_tokens=10**5))
            await anext(stream)
            child_of(client).kill()
            with pytest.raises(EngineDead):
                await tokens_of(stream)
            await back(client)
            gc.collect()
            counts.append((process.num_fds(), process.num_threads(), process.memory_info().rss))
        assert len(engines()) == 1
        assert counts[-1][:2] == counts[1][:2]
        assert counts[-1][2] - counts[4][2] < 8 << 20
        assert len(asyncio.all_tasks()) <= 6
        assert not folders()


PARENT = """
import asyncio, sys
from engine.process import ProcessClient
from tests.fakes import make_info
from tests.process.fake import FACTORY, make_config
from tests.unit.factories import make_request

async def main():
    client = ProcessClient(make_config({script}), factory=FACTORY, progress=lambda text: print(text, flush=True))
    await client.start()
    stream = client.submit(make_request(max_tokens=10**5))
    await anext(stream)
    print("stepping", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize(("script", "line"), [("loads=600", "Loading the fake"), ("delay=0.01", "stepping"), ("sticks_at=2", "stepping")])
def test_the_engine_ends_with_its_parent(script: str, line: str) -> None:
    """Killed, so that nothing of the parent runs any more: while the engine loads, between steps, and in a step that keeps the lock."""
    code = PARENT.replace("{script}", script)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        while parent.stdout.readline().strip() != line:
            pass
        time.sleep(0.2)  # the second step has begun
        (child,) = engines(parent.pid)
        parent.kill()
    _, alive = psutil.wait_procs([child], timeout=5)
    for process in alive:
        process.kill()
    assert not alive
    assert not folders()
