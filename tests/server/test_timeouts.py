"""Answers that take too long, bodies that do not come, and clients that read nothing."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import uvicorn

from server.app import create_app
from server.listener import bind
from server.settings import ServerSettings
from tests.fakes import FakeEngine, Part, make_info
from tests.server.conftest import USER, Served, chunks_of, error_of, events_of, make_deployment, serve, serve_socket, until

HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"


async def connect(served: Served) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = urlsplit(str(served.http.base_url))
    return await asyncio.open_connection(address.hostname, address.port)


# ---------------------------------------------------------------------- answers
@pytest.mark.parametrize("socket_too", [False, True])
async def test_an_answer_that_takes_too_long_is_a_408(folder: Path, socket_too: bool) -> None:
    async with (serve_socket if socket_too else serve)(folder, make_deployment(request_timeout_seconds=0.2)) as served:
        served.answer_with(endless=True, delay=0.01)
        begin = time.monotonic()
        response = await served.complete(["hello", "world"], n=2)
        assert 0.2 <= time.monotonic() - begin < 5
        error = error_of(response, 408)
        assert (error["code"], error["type"], error["param"]) == ("request_timeout", "server_error", None)
        assert "0.2 s" in error["message"]
        assert response.headers["x-should-retry"] == "false"
        assert not served.engine.streams
        assert len(served.engine.aborted) == 4, "the engine works at it no more"
        metrics = (await served.http.get("/metrics")).text
        assert 'cascade_requests_total{finish_reason="timeout",model="tiny",preset=""} 4.0' in metrics
        assert 'cascade_refusals_total{code="request_timeout",status="408"} 1.0' in metrics


async def test_the_sdk_does_not_ask_again(folder: Path) -> None:
    async with serve(folder, make_deployment(request_timeout_seconds=0.5)) as served:
        served.answer_with(endless=True, delay=0.01)
        client = served.openai.with_options(max_retries=2)
        with pytest.raises(openai.APIStatusError) as caught:
            await client.chat.completions.create(model="tiny", messages=USER)
        assert (caught.value.status_code, caught.value.code) == (408, "request_timeout")
        assert len(served.engine.requests) == 1


async def test_a_stream_that_takes_too_long_ends_with_an_error(both: Served) -> None:
    object.__setattr__(both.app.state.deployment.server, "request_timeout_seconds", 1.0)
    both.answer_with(parts=[Part((40,))], endless=True, delay=0.05)
    events = events_of(await both.complete("hello", stream=True))
    assert json.loads(events[-2])["error"]["code"] == "request_timeout"
    assert events[-1] == "[DONE]"
    assert 3 < len(events) < 40
    assert not both.engine.streams


async def test_time_counts_from_arrival(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt whose text took all the time is refused before the engine hears of it, streamed or not."""
    async with serve(folder, make_deployment(request_timeout_seconds=0.05)) as served:
        encode = served.app.state.serving.tokenizer.encode

        def slow(*given: Any) -> list[int]:
            time.sleep(0.1)
            ids: list[int] = encode(*given)
            return ids

        monkeypatch.setattr(served.app.state.serving.tokenizer, "encode", slow)
        for stream in (False, True):
            assert error_of(await served.complete("hello", stream=stream), 408)["code"] == "request_timeout"
        assert not served.engine.requests
        assert served.app.state.draining.num_running == 0


async def test_an_answer_in_time_leaves_no_clock_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut: list[Any] = []
    monkeypatch.setattr("server.generate.Generation.cut", lambda *given: cut.append(given))
    async with serve(folder, make_deployment(request_timeout_seconds=1)) as served:
        assert chunks_of(await served.complete("hello", stream=True))
        assert (await served.complete("hello")).status_code == 200
        await asyncio.sleep(1.1)
        assert not cut


# ---------------------------------------------------------------------- bodies
@pytest.mark.parametrize("framing", [b"Content-Length: 100\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"])
async def test_a_body_that_comes_too_slowly_is_a_408(folder: Path, framing: bytes) -> None:
    async with serve_socket(folder, make_deployment(body_timeout_seconds=0.3)) as served:
        reader, writer = await connect(served)
        writer.write(HEAD + framing)
        begin = time.monotonic()

        async def drip() -> None:  # not longer: what comes behind an answer resets the connection
            for _ in range(10):
                writer.write(b" " if b"Length" in framing else b"1\r\n \r\n")
                await asyncio.sleep(0.02)

        dripping = asyncio.ensure_future(drip())
        answer = await asyncio.wait_for(reader.read(), 5)  # to the end: the connection is closed
        dripping.cancel()
        assert 0.3 <= time.monotonic() - begin < 3
        head, _, body = answer.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 408 ")
        assert b"x-should-retry: false" in head
        assert json.loads(body)["error"]["code"] == "body_timeout"
        writer.close()
        assert 'code="body_timeout",status="408"} 1.0' in (await served.http.get("/metrics")).text


async def test_many_slow_bodies_hold_nobody_up(folder: Path) -> None:
    async with serve_socket(folder, make_deployment(body_timeout_seconds=2)) as served:
        slow = [await connect(served) for _ in range(100)]
        for _, writer in slow:
            writer.write(HEAD + b"Content-Length: 1000\r\n\r\n{")
        begin = time.monotonic()
        assert (await served.complete("hello")).status_code == 200
        assert time.monotonic() - begin < 1.9
        answers = await asyncio.gather(*(reader.read() for reader, _ in slow))
        assert all(b" 408 " in answer for answer in answers)
        for _, writer in slow:
            writer.close()


async def test_a_client_that_leaves_in_mid_body_is_nobodys_error(folder: Path) -> None:
    async with serve_socket(folder) as served:
        _, writer = await connect(served)
        writer.write(HEAD + b'Content-Length: 1000\r\n\r\n{"model"')
        await writer.drain()
        writer.close()
        await writer.wait_closed()
        assert (await served.complete("hello")).status_code == 200
        assert len(served.engine.requests) == 1
        assert 'status="5' not in (await served.http.get("/metrics")).text


# ---------------------------------------------------------------------- clients that read nothing
@pytest.mark.skipif(sys.platform != "linux", reason="what ends a connection that takes nothing is Linux's own")
async def test_a_client_that_reads_nothing_is_left(folder: Path) -> None:
    engine = FakeEngine(make_info(str(folder), max_model_len=10_000_000), max_queued=4)
    app = create_app(engine, make_deployment())
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
    with bind(ServerSettings(port=0, send_timeout_seconds=1)) as listener, socket.socket() as client:
        task = asyncio.ensure_future(server._serve([listener]))
        await until(lambda: server.started)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        await asyncio.to_thread(client.connect, listener.getsockname())
        engine.script.parts, engine.script.endless, engine.script.delay = [Part((40, 41, 42, 43) * 50)], True, 0.001
        body = json.dumps({"model": "tiny", "prompt": "hello", "stream": True}).encode()
        client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        await until(lambda: engine.num_steps > 5)
        await until(lambda: not engine.streams, seconds=20)
        assert app.state.draining.num_running == 0
        server.should_exit = True
        await task


def test_any_listener_has_the_bounds() -> None:
    wanted: Any = getattr(socket, "TCP_USER_TIMEOUT", None)
    with bind(ServerSettings(port=0, send_timeout_seconds=7)) as listener:
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert wanted is None or listener.getsockopt(socket.IPPROTO_TCP, wanted) == 7000
