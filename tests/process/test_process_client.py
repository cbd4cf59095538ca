"""The engine in a process of its own, over a fake core: frames, and how it is loaded. No tensors in these children."""

from __future__ import annotations

import asyncio
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from math import inf
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy
import pytest

from engine.config import EngineConfig
from engine.errors import ContextLengthExceeded, EngineDead, EngineError, InvalidRequest, SourceError
from engine.incarnation import Incarnation
from engine.process import ProcessClient
from engine.request import SamplingParams
from engine.wire import Add, Loaded, encode
from tests.fakes import make_info
from tests.process.clients import child_of, loading, make_client, started, tokens_of
from tests.process.fake import make_config
from tests.process.processes import engines
from tests.server.conftest import until
from tests.unit.factories import make_request


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
        ("bug", EngineDead, r"internal error \(KeyError\)"),
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
    assert time.monotonic() - began < 20
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
