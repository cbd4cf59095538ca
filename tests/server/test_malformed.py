"""What no good client sends, byte by byte over a real socket: an error of the client's or a served answer, never one of the server's."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.server.conftest import Served, make_deployment, serve_socket, until

BODY = b'{"model": "tiny", "prompt": "hello"}'
LENGTH = b"Content-Length: %d\r\n"
CHAT = b'{"model": "tiny", "messages": [{"role": "user", "content": %s}]}'


@pytest.fixture
async def running(folder: Path) -> AsyncIterator[Served]:
    async with serve_socket(folder, make_deployment(body_timeout_seconds=0.5)) as served:
        yield served


async def exchange(served: Served, sent: bytes, seconds: float = 5, ends: bool = False) -> bytes:
    """All that comes back until the connection is closed or `seconds` have passed. `ends`: the client says that it is done."""
    address = urlsplit(str(served.http.base_url))
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    received = b""
    try:
        async with asyncio.timeout(seconds):
            writer.write(sent)
            if ends:
                writer.write_eof()
            while piece := await reader.read(1 << 16):
                received += piece
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.close()
    return received


def statuses(received: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)]


def post(body: bytes = BODY, *headers: bytes, path: bytes = b"/v1/completions", method: bytes = b"POST") -> bytes:
    lines = (b"%s %s HTTP/1.1" % (method, path), b"Host: a", b"Connection: close", *headers)
    length = () if any(b"ength" in line or b"chunked" in line for line in headers) else (b"Content-Length: %d" % len(body),)
    return b"\r\n".join((*lines, *length, b"", body))


TYPED = b"Content-Type: application/json"
SENT: dict[str, tuple[bytes, set[int]]] = {
    "no HTTP": (b"hello\r\n\r\n", {400}),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 60, {400}),
    "endless headers": (b"GET /health HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 200_000 + b"\r\n\r\n", {400, 431}),
    "a bad header": (b"GET /health HTTP/1.1\r\nHost: a\r\nX y: 1\r\n\r\n", {400}),
    "a length that is no number": (post(BODY, TYPED, b"Content-Length: x"), {400}),
    "a negative length": (post(BODY, TYPED, b"Content-Length: -1"), {400}),
    "two lengths": (post(BODY, TYPED, b"Content-Length: 5", b"Content-Length: 36"), {400}),
    "an endless length": (post(BODY, TYPED, b"Content-Length: " + b"9" * 30), {400, 413}),
    "a length too short": (post(BODY, TYPED, b"Content-Length: 20"), {400}),
    "chunks that lie": (post(b"1\r\n{\r\nzz\r\n", TYPED, b"Transfer-Encoding: chunked"), {400}),
    "a trailing chunk": (post(b"24\r\n%s\r\n0\r\n\r\n" % BODY, TYPED, b"Transfer-Encoding: chunked"), {200}),
    "an unknown transfer coding": (post(BODY, TYPED, b"Transfer-Encoding: gzip"), {400, 501}),
    "a coded body": (post(b"\x1f\x8b\x08\0\0\0\0\0", TYPED, b"Content-Encoding: gzip"), {400}),
    "a question first": (post(BODY, TYPED, b"Expect: 100-continue"), {100, 200}),
    "another version": (b"GET /health HTTP/9.9\r\nHost: a\r\nConnection: close\r\n\r\n", {200, 400, 505}),
    "no host": (b"GET /health HTTP/1.1\r\n\r\n", {400, 200}),
    "an absolute target": (post(b"", path=b"http://evil.example/v1/models", method=b"GET"), {404, 200}),
    "a path of bytes": (post(b"", path=b"/v1/models/%ff%00%0a", method=b"GET"), {404}),
    "a path upwards": (post(b"", path=b"/v1/models/../../etc/passwd", method=b"GET"), {404}),
    "a long path": (post(b"", path=b"/v1/models/" + b"a" * 50_000, method=b"GET"), {404}),
    "an unknown method": (post(method=b"BREW"), {405}),
    "TRACE": (post(method=b"TRACE"), {405}),
    "an upgrade": (
        post(b"", b"Upgrade: websocket", b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", b"Sec-WebSocket-Version: 13", method=b"GET"),
        {403, 404, 405, 426},
    ),
    "no type": (post(BODY), {200}),
    "text": (post(BODY, b"Content-Type: text/plain"), {400}),
    "a form": (post(b"model=tiny&prompt=a", b"Content-Type: application/x-www-form-urlencoded"), {400}),
    "many parts": (post(b"--x\r\n\r\na\r\n--x--", b"Content-Type: multipart/form-data; boundary=x"), {400}),
    "a type of nonsense": (post(BODY, b"Content-Type: ;;=\xff"), {200, 400}),
    "a type that is wrong twice": (post(BODY, TYPED, b"Content-Type: text/plain"), {200, 400}),
    "another coding": (post(BODY.decode().encode("utf-16"), b"Content-Type: application/json; charset=utf-16"), {400}),
    "NaN": (post(BODY[:-1] + b', "temperature": NaN}', TYPED), {400}),
    "infinity": (post(BODY[:-1] + b', "top_p": -Infinity}', TYPED), {400}),
    "a huge float": (post(BODY[:-1] + b', "min_p": 1e400}', TYPED), {400}),
    "a tiny float": (post(BODY[:-1] + b', "temperature": 1e-400}', TYPED), {200}),
    "a huge integer": (post(BODY[:-1] + b', "seed": %s}' % (b"9" * 100_000), TYPED), {400}),
    "NaN where nobody looks": (post(BODY[:-1] + b', "metadata": {"a": [NaN, 1e999]}}', TYPED), {200}),
    "half a character": (post(CHAT % b'"\\ud83d"', TYPED, path=b"/v1/chat/completions"), {400}),
    "half a character in a key": (post(BODY[:-1] + b', "\\udc00": 1}', TYPED), {400}),
    "no UTF-8": (post(CHAT % b'"\xc3("', TYPED, path=b"/v1/chat/completions"), {400}),
    "control characters": (post(CHAT % b'"\\u0000\\u001b[2J"', TYPED, path=b"/v1/chat/completions"), {200}),
    "keys twice": (post(b'{"model": "none", "prompt": "a", "model": "tiny"}', TYPED), {200}),
    "10,000 levels": (post(CHAT % (b"[" * 10_000 + b"]" * 10_000), TYPED, path=b"/v1/chat/completions"), {400}),
    "an id that writes lines": (post(BODY, TYPED, b"X-Request-Id: a\tb"), {200}),
    "a key of bytes": (post(BODY, TYPED, b"Authorization: Bearer \xff\xfe"), {200}),
}


@pytest.mark.parametrize("name", SENT)
async def test_malformed(running: Served, name: str) -> None:
    sent, expected = SENT[name]
    received = await exchange(running, sent)
    assert statuses(received), received
    assert set(statuses(received)) <= expected, received[:500]
    assert b"Traceback" not in received
    assert (await running.complete("hello")).status_code == 200
    assert not running.engine.streams


@pytest.mark.parametrize("sent", [b"", b"POST /v1/comp", post()[:-5], post(b"5\r\n{", TYPED, b"Transfer-Encoding: chunked")])
async def test_a_client_that_stops_in_the_middle(running: Served, sent: bytes) -> None:
    received = await exchange(running, sent, ends=True, seconds=3)
    assert set(statuses(received)) <= {400, 408}
    assert (await running.complete("hello")).status_code == 200
    assert len(running.engine.requests) == 1


async def test_requests_in_a_row_on_one_connection(running: Served) -> None:
    keep = post(BODY, TYPED).replace(b"Connection: close\r\n", b"")
    bad = post(b"{", TYPED).replace(b"Connection: close\r\n", b"")
    assert statuses(await exchange(running, keep + bad + keep + post(BODY, TYPED))) == [200, 400, 200, 200]


async def test_a_stream_that_is_half_open(running: Served) -> None:
    """A client that said it sends no more still reads; one that is gone ends its answer."""
    body = json.dumps({"model": "tiny", "prompt": "hello world", "stream": True}).encode()
    running.answer_with(delay=0.02)
    received = await exchange(running, post(body, TYPED), ends=True)
    await until(lambda: not running.engine.streams)
    assert statuses(received) in ([200], [])
    assert (await running.complete("hello")).status_code == 200


async def test_refusals_leave_nothing_behind(running: Served) -> None:
    """Memory after some hundred of them is what it was after the first."""
    bad = [sent for name, (sent, expected) in SENT.items() if 200 not in expected and len(sent) < 100_000]
    for sent in bad:
        await exchange(running, sent, seconds=2)
    gc.collect()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(8):
        await asyncio.gather(*(exchange(running, sent, seconds=2) for sent in bad))
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 300_000, f"{grown} bytes for {8 * len(bad)} refusals"
