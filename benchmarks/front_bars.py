"""What each bar of the server itself measures, in front of an engine that pretends (pretend.py).

How fast tokens go out, refusals, and what it costs to be watched.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from benchmarks.errors import BenchmarkError
from benchmarks.measuring import Measured, Setting
from benchmarks.served import serve
from benchmarks.stats import estimate

NUM_STREAMS, REFUSED_RATE = 64, 200  # at once; a second
SCRAPE_SECONDS = 1.0  # between two scrapes, fifteen times as often as our Prometheus asks
_PRETENDING = (sys.executable, "-m", "benchmarks.pretend")
_REFUSED: tuple[tuple[str, int, Mapping[str, Any]], ...] = (  # what, its status, and a body's fields
    ("unknown model", 404, {"model": "nobody"}),
    ("bad value", 400, {"temperature": 9}),
    ("not implemented", 400, {"suffix": "x"}),
    ("impossible schema", 400, {"guided_json": {"enum": []}}),
    ("too long", 400, {"max_tokens": 10_000_000}),
)


def front(setting: Setting) -> Measured:
    """Tokens a second that so many clients get together, each with a stream of its own, from the first request to the last byte."""
    config, num_tokens = setting.engine({"engine.max_sequences": NUM_STREAMS}), setting.size(3000, 50)
    body = _body(config.model.name, max_tokens=num_tokens, stream=True, stream_options={"include_usage": True}, ignore_eos=True)
    rates, chunks = list[float](), list[float]()
    with serve(config, _PRETENDING) as served, asyncio.Runner() as runner:
        for i in range(1 + setting.repetitions):
            start = time.perf_counter()
            streams = runner.run(_together(served.url, body))
            if i:  # the first one warms up
                rates.append(NUM_STREAMS * num_tokens / (time.perf_counter() - start))
                chunks.append(NUM_STREAMS * num_tokens / sum(stream.num_events for stream in streams))
            if any(stream.num_tokens != num_tokens for stream in streams):
                raise BenchmarkError(f"{num_tokens} tokens were asked of each stream, and one has {min(s.num_tokens for s in streams)}.")
            setting.tick()
    return Measured(estimate(rates), tuple(rates), {"streams": NUM_STREAMS, "tokens": num_tokens, "tokens_per_event": chunks})


def refusals(setting: Setting) -> Measured:
    """Milliseconds within which 95 of 100 refusals are answered, sent one after another on kept connections at a steady rate."""
    config, num = setting.engine(), setting.size(1000, 50)
    of_kind: dict[str, list[float]] = {kind: [] for kind, _, _ in _REFUSED}
    worst = list[float]()
    with serve(config, _PRETENDING) as served, asyncio.Runner() as runner:
        for _ in range(setting.repetitions):
            taken = runner.run(_refused(served.url, config.model.name, num))
            for kind, milliseconds in taken:
                of_kind[kind].append(milliseconds)
            worst.append(_at(0.95, [milliseconds for _, milliseconds in taken]))
            setting.tick()
    by_kind = {kind: {"median": _at(0.5, values), "p99": _at(0.99, values)} for kind, values in of_kind.items()}
    return Measured(estimate(worst), tuple(worst), {"requests": num, "milliseconds": by_kind})


def scrape(setting: Setting) -> Measured:
    """Milliseconds within which 95 of 100 scrapes of /metrics are answered while so many streams run."""
    worst, sizes = list[float](), list[int]()
    for scrapes in _watched(setting, is_twice=False):
        worst.append(_at(0.95, scrapes["milliseconds"]))
        sizes.append(scrapes["bytes"])
    return Measured(estimate(worst), tuple(worst), {"streams": NUM_STREAMS, "every_seconds": _every(setting), "bytes": sizes})


def scrape_cost(setting: Setting) -> Measured:
    """Tokens a second of so many streams while /metrics is scraped, over those in peace, in turns."""
    ratios = [scrapes["seconds_in_peace"] / scrapes["seconds"] for scrapes in _watched(setting, is_twice=True)]
    return Measured(estimate(ratios), tuple(ratios), {"streams": NUM_STREAMS, "every_seconds": _every(setting)})


def _every(setting: Setting) -> float:
    return 0.05 if setting.is_quick else SCRAPE_SECONDS


def _watched(setting: Setting, is_twice: bool) -> list[dict[str, Any]]:
    """What scraping.py says of each repetition, and the seconds of its streams; where it is twice, also those of the same without."""
    config, num_tokens = setting.engine({"engine.max_sequences": NUM_STREAMS}), setting.size(6000, 20)
    fields: dict[str, Any] = {"max_tokens": num_tokens, "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    body, found = _body(config.model.name, **fields), list[dict[str, Any]]()
    with serve(config, _PRETENDING) as served, asyncio.Runner() as runner:
        runner.run(_stream(served.url, body))  # warms up
        for _ in range(setting.repetitions):
            peace = _seconds_of(runner, served.url, body) if is_twice else 0.0
            with _scraper(served.url, _every(setting)) as scraper:
                assert scraper.stdout is not None
                scraper.stdout.readline()  # it has begun: what it takes to start is not what it costs
                seconds = _seconds_of(runner, served.url, body)
                words, _ = scraper.communicate(b"")
            if scraper.returncode:
                raise BenchmarkError("The scrapes failed; what the server said stands above.")
            found.append(json.loads(words) | {"seconds": seconds, "seconds_in_peace": peace})
            setting.tick()
    return found


def _scraper(url: str, interval: float) -> subprocess.Popen[bytes]:
    program = (sys.executable, "-m", "benchmarks.scraping", url, str(interval))
    return subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def _seconds_of(runner: asyncio.Runner, url: str, body: bytes) -> float:
    start = time.perf_counter()
    runner.run(_together(url, body))
    return time.perf_counter() - start


# ---------------------------------------------------------------------- clients that cost little
@dataclass(frozen=True)
class _Stream:
    """What came of a stream."""

    num_tokens: int  # by the server's own count
    num_events: int


async def _together(url: str, body: bytes) -> list[_Stream]:
    return await asyncio.gather(*(_stream(url, body) for _ in range(NUM_STREAMS)))


async def _stream(url: str, body: bytes) -> _Stream:
    reader, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)
    writer.write(_request(body, "close"))
    num_events, end = 0, b""
    while piece := await reader.read(1 << 16):
        num_events += piece.count(b"data: ")
        end = (end + piece)[-4096:]
    writer.close()
    usage = [json.loads(line[6:]) for line in end.split(b"\n") if line.startswith(b'data: {"id"') and b'"usage":{' in line]
    if not usage:
        raise BenchmarkError(f"A stream ended without usage: {end[-300:]!r}")
    return _Stream(usage[-1]["usage"]["completion_tokens"], num_events)


async def _refused(url: str, model: str, num: int) -> list[tuple[str, float]]:
    """So many refusals, and the milliseconds that each took."""
    taken, start = list[tuple[str, float]](), time.perf_counter()
    connections = asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]]()
    for _ in range(8):
        connections.put_nowait(await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port))

    async def ask(i: int) -> None:
        kind, status, fields = _REFUSED[i % len(_REFUSED)]
        await asyncio.sleep(max(0.0, start + i / REFUSED_RATE - time.perf_counter()))
        began, (reader, writer) = time.perf_counter(), await connections.get()
        writer.write(_request(_body(**{"model": model, **fields}), "keep-alive"))
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(length)
        taken.append((kind, 1000 * (time.perf_counter() - began)))
        connections.put_nowait((reader, writer))
        if int(head[9:12]) != status:
            raise BenchmarkError(f"{kind}: status {head[9:12]!r}, and {status} was expected.")

    await asyncio.gather(*map(ask, range(num)))
    while not connections.empty():
        connections.get_nowait()[1].close()
    return taken


def _body(model: str, **fields: Any) -> bytes:
    return json.dumps({"model": model, "messages": [{"role": "user", "content": "Say something."}], **fields}).encode()


def _request(body: bytes, connection: str) -> bytes:
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
    return f"{head}Connection: {connection}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def _at(share: float, values: list[float]) -> float:
    """The value that so great a share of them does not exceed."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


FRONT_MEASURES: Mapping[str, Callable[[Setting], Measured]] = {
    "front": front,
    "refusals": refusals,
    "scrape": scrape,
    "scrape-cost": scrape_cost,
}
