"""Connections on which a request does not begin, or not to its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from server.app import create_app
from server.launch import Server, _uvicorn_config
from server.listener import bind
from tests.fakes import FakeEngine, Script, make_info
from tests.server.conftest import make_deployment, until

SECONDS = 1.5
REQUEST = b"GET /v1/models HTTP/1.1\r\nHost: a\r\n\r\n"
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@asynccontextmanager
async def serving(folder: Path, delay: float = 0.0, **settings: object) -> AsyncIterator[Callable[[], asyncio.Future[Connection]]]:
    """A server as `cascade serve` runs it; gives what connects to it."""
    deployment = make_deployment(port=0, body_timeout_seconds=SECONDS, **settings)
    app = create_app(FakeEngine(make_info(str(folder)), Script(delay=delay), max_queued=4), deployment)
    with bind(deployment.server) as listener:
        server = Server(_uvicorn_config(app, deployment.server))
        task = asyncio.ensure_future(server.serve([listener]))
        await until(server.listening.is_set)
        try:
            yield lambda: asyncio.ensure_future(asyncio.open_connection(*listener.getsockname()))
        finally:
            server.should_exit = True
            await task


async def drip(writer: asyncio.StreamWriter, data: bytes) -> None:
    """Byte by byte, as slowly as an answer never ends."""
    for byte in data * 100:
        writer.write(bytes([byte]))
        await asyncio.sleep(SECONDS / 20)


async def answer_on(reader: asyncio.StreamReader) -> bytes:
    """The head and the body of one answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
    return head + await reader.readexactly(length)


async def rest_of(reader: asyncio.StreamReader) -> bytes:
    """What comes until the server closes. A byte that it did not wait for makes that a reset."""
    try:
        return await asyncio.wait_for(reader.read(), 10)
    except ConnectionResetError:
        return b""


@pytest.mark.parametrize("begin", [b"", b"GET /v1/mod", REQUEST[:-2] + b"X-More: "], ids=["nothing", "a line", "headers"])
@pytest.mark.parametrize("is_kept_alive", [False, True])
async def test_a_head_that_does_not_come_closes_the_connection(folder: Path, begin: bytes, is_kept_alive: bool) -> None:
    async with serving(folder) as connect:
        reader, writer = await connect()
        if is_kept_alive:
            writer.write(REQUEST)
            assert (await answer_on(reader)).startswith(b"HTTP/1.1 200")
            begin = begin or b"G"  # a silent connection that has had its answer is closed by uvicorn
        began = time.monotonic()
        writer.write(begin)
        dripping = asyncio.ensure_future(drip(writer, b"x")) if begin else None
        assert await rest_of(reader) == b"", "nobody has asked, so nobody is answered"
        assert SECONDS * 0.9 <= time.monotonic() - began < SECONDS + 4
        if dripping is not None:
            dripping.cancel()
        writer.close()


async def test_a_body_that_goes_on_behind_its_refusal_closes_the_connection(folder: Path) -> None:
    async with serving(folder, api_keys=("key",)) as connect:
        reader, writer = await connect()
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 100000\r\n\r\n{")
        began = time.monotonic()
        dripping = asyncio.ensure_future(drip(writer, b" "))
        assert (await asyncio.wait_for(answer_on(reader), 5)).startswith(b"HTTP/1.1 401")
        assert await rest_of(reader) == b""
        assert time.monotonic() - began < SECONDS + 4
        dripping.cancel()
        writer.close()


async def test_what_is_asked_in_time_is_answered_however_often_and_long(folder: Path) -> None:
    """The head counts alone: neither the time of the answer nor that of the connection."""
    async with serving(folder) as connect:
        reader, writer = await connect()
        for _ in range(6):
            writer.write(REQUEST[:20])
            await asyncio.sleep(SECONDS / 4)
            writer.write(REQUEST[20:])
            assert (await answer_on(reader)).startswith(b"HTTP/1.1 200")
        writer.write(REQUEST * 3)  # at once: one is answered behind the other
        for _ in range(3):
            assert (await answer_on(reader)).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_an_answer_may_take_longer_than_a_head(folder: Path) -> None:
    async with serving(folder, delay=SECONDS) as connect:
        reader, writer = await connect()
        body = b'{"model": "tiny", "prompt": "hello", "stream": true, "max_tokens": 4}'
        await asyncio.sleep(SECONDS / 4)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % len(body))
        await asyncio.sleep(SECONDS / 4)
        writer.write(body)
        assert b"[DONE]" in await asyncio.wait_for(reader.readuntil(b"0\r\n\r\n"), 5)
        writer.close()
