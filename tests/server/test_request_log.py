"""The log of a server: one line for each request, whatever became of it, that says what was asked and what came of it, and no text."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.errors import EngineDead, QueueFull
from engine.logs import ConsoleFormatter, JsonFormatter, quieten
from engine.request import FinishReason, Round
from server.launch import _uvicorn_config
from server.logs import AboutRequests, RequestLine
from server.text import TextTokenizer
from tests.fakes import FakeEngine, Part
from tests.server.conftest import Served, make_deployment, serve_socket, until
from tests.server.test_proxies import launched

ROUNDS = [Part((40,)), Part((40, 41, 42), Round(4, 2, 0b100, 0b1)), Part((40,), Round(2, 0, 0b1, 0))]
NUMBERS = {"total_ms", "ttft_ms", "queue_ms"}


class Log:
    """What this process logs, as it would stand on standard error."""

    def __init__(self, formatter: logging.Formatter):
        self._stream = io.StringIO()
        self.handler = logging.StreamHandler(self._stream)
        self.handler.setFormatter(formatter)
        self.handler.addFilter(AboutRequests())

    @property
    def text(self) -> str:
        return self._stream.getvalue()

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.text.splitlines()]

    async def only(self) -> dict[str, Any]:
        """The one line that there is; an answer's comes just behind its last byte."""
        await until(lambda: self.text)
        await asyncio.sleep(0.02)
        (line,) = self.lines
        return line

    def clear(self) -> None:
        self._stream.seek(0)
        self._stream.truncate()


@pytest.fixture
def log() -> Iterator[Log]:
    yield from _written_by(JsonFormatter("server"))


@pytest.fixture
def console() -> Iterator[Log]:
    yield from _written_by(ConsoleFormatter())


def _written_by(formatter: logging.Formatter) -> Iterator[Log]:
    it, root = Log(formatter), logging.getLogger()
    before = root.level
    root.addHandler(it.handler)
    root.setLevel(logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    yield it
    root.removeHandler(it.handler)
    root.setLevel(before)


@asynccontextmanager
async def serving(folder: Path, **server: Any) -> AsyncIterator[Served]:
    async with serve_socket(folder, make_deployment(**server)) as served:
        served.http.headers["x-request-id"] = "r-1"
        yield served


@pytest.fixture
async def over_socket(folder: Path) -> AsyncIterator[Served]:
    async with serving(folder) as served:
        yield served


@pytest.mark.parametrize("stream", [False, True])
async def test_an_answer_is_one_line_of_numbers(over_socket: Served, log: Log, stream: bool) -> None:
    over_socket.answer_with(parts=ROUNDS, finish=FinishReason.LENGTH, num_cached_tokens=2)
    response = await over_socket.complete([5, 6, 7], stream=stream, model="tiny:short")
    assert response.status_code == 200
    line = await log.only()
    assert all(0 <= line.pop(name) < 5000 for name in NUMBERS)
    assert line.pop("time").endswith("Z")
    assert line.pop("id") in response.text
    assert line == {
        "level": "info",
        "process": "server",
        "logger": "server.requests",
        "message": "request",
        "request_id": "r-1",
        "method": "POST",
        "path": "/v1/completions",
        "status": 200,
        "code": None,
        "client": "127.0.0.1",
        "model": "tiny",
        "preset": "short",
        "stream": stream,
        "rule": "exact",
        "alpha": 0.0,
        "prompt_tokens": 3,
        "cached_tokens": 2,
        "completion_tokens": 5,
        "finish_reason": "length",
        "drafted": 6,
        "accepted": 2,
        "acceptance_rate": 0.3333,
        "deferred": 2,
        "lossy_kept": 1,
    }


async def test_times_are_told_apart(over_socket: Served, log: Log) -> None:
    over_socket.answer_with(delay=0.05)
    await over_socket.complete([5, 6, 7, 8])
    line = await log.only()
    assert line["queue_ms"] == 2.0
    assert 50 <= line["ttft_ms"] <= line["total_ms"] - 140
    assert line["acceptance_rate"] is None, "nothing was drafted"


async def test_several_answers_are_one_line(over_socket: Served, log: Log) -> None:
    over_socket.answer_with(parts=ROUNDS, finish=FinishReason.LENGTH)
    await over_socket.complete(["hello", "world"], n=2)
    line = await log.only()
    assert (line["completion_tokens"], line["drafted"], line["finish_reason"]) == (20, 24, "length")


async def test_people_read_the_same(over_socket: Served, console: Log) -> None:
    over_socket.answer_with(parts=ROUNDS, finish=FinishReason.LENGTH)
    await over_socket.complete([5, 6, 7])
    await until(lambda: console.text)
    (line,) = console.text.splitlines()
    assert " INFO server.requests: [r-1] request method=POST path=/v1/completions status=200 client=127.0.0.1 id=" in line
    assert ' model=tiny preset="" stream=false rule=exact alpha=0 prompt_tokens=3 ' in line
    assert " finish_reason=length queue_ms=2 " in line
    assert " acceptance_rate=0.3333 deferred=2 lossy_kept=1 total_ms=" in line


# ---------------------------------------------------------------------- what did not end well
@pytest.mark.parametrize(
    ("body", "status", "code", "level"),
    [
        ({"model": "my secret"}, 404, "model_not_found", "info"),
        ({"temperature": -1}, 400, "invalid_request", "info"),
        ({"prompt": ["my secret", 7]}, 400, "invalid_request", "info"),
        ({"max_tokens": 10**6}, 400, "context_length_exceeded", "info"),
    ],
)
async def test_a_refusal_is_one_line(over_socket: Served, log: Log, body: Any, status: int, code: str, level: str) -> None:
    assert (await over_socket.complete(**{"prompt": "my secret"} | body)).status_code == status
    line = await log.only()
    assert (line["status"], line["code"], line["level"], line["request_id"]) == (status, code, level, "r-1")
    assert "model" not in line, "nothing was asked of one"
    assert "secret" not in log.text


async def test_what_the_server_is_to_blame_for_is_a_warning(over_socket: Served, log: Log) -> None:
    over_socket.answer_with(refusal=QueueFull(4, 1))
    assert (await over_socket.complete()).status_code == 503
    line = await log.only()
    assert (line["status"], line["code"], line["level"]) == (503, "queue_full", "warning")


@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_dies_is_one_line(over_socket: Served, log: Log, stream: bool) -> None:
    over_socket.answer_with(parts=ROUNDS, endless=True, dies_after=2)
    response = await over_socket.complete(stream=stream)
    line = await log.only()
    assert (line["status"], line["code"], line["finish_reason"]) == (response.status_code, "engine_dead", "error")
    assert (line["level"], line["completion_tokens"]) == ("warning", 4)


async def test_an_error_that_nobody_foresaw_is_its_line_and_a_traceback_in_one(
    folder: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the server as it is launched, since uvicorn writes the traceback."""
    monkeypatch.setattr(FakeEngine, "submit", lambda self, request: 1 / 0)
    monkeypatch.setattr(logging.getLogger("uvicorn"), "propagate", True)  # not, where another test ran a uvicorn of its own
    async with launched(folder) as (url, _), httpx.AsyncClient(headers={"x-request-id": "r-1"}) as http:
        assert (await http.post(f"{url}/v1/completions", json={"model": "tiny", "prompt": "my secret"})).status_code == 500
    request, trace = log.lines
    assert (request["code"], request["status"], request["level"]) == ("internal_error", 500, "warning")
    assert (trace["logger"], trace["request_id"]) == ("uvicorn.error", "r-1")
    assert trace["exception"].endswith("ZeroDivisionError: division by zero")
    assert "secret" not in log.text


async def test_a_client_that_leaves_is_one_line(over_socket: Served, log: Log) -> None:
    over_socket.answer_with(endless=True, delay=0.01)
    async with over_socket.http.stream("POST", "/v1/completions", json={"model": "tiny", "prompt": "hello", "stream": True}) as response:
        await anext(response.aiter_lines())
    line = await log.only()
    assert (line["status"], line["finish_reason"], line["level"]) == (200, "abort", "info")
    log.clear()
    with pytest.raises(httpx.ReadTimeout):
        await over_socket.http.post("/v1/completions", json={"model": "tiny", "prompt": "hello"}, timeout=1)
    line = await log.only()
    assert (line["finish_reason"], line["code"]) == ("abort", None)


async def test_an_answer_that_takes_too_long_is_one_line(folder: Path, log: Log) -> None:
    async with serving(folder, request_timeout_seconds=1) as served:
        served.answer_with(endless=True, delay=0.01)
        for stream, status in ((False, 408), (True, 200)):
            await served.complete(stream=stream)
            line = await log.only()
            assert (line["status"], line["code"], line["finish_reason"], line["level"]) == (status, "request_timeout", "timeout", "warning")
            log.clear()


# ---------------------------------------------------------------------- what is no news
async def test_probes_are_no_news_while_they_work(folder: Path, log: Log) -> None:
    async with serving(folder, api_keys=("key",)) as served:
        for path in ("/health", "/ready", "/", "/web/main.js"):
            await served.http.get(path)
        await served.http.get("/metrics", headers={"authorization": "Bearer key"})
        served.engine.die("gone")
        assert (await served.http.get("/ready")).status_code == 503
        assert not log.text
        await served.http.get("/metrics")
        line = await log.only()
        assert (line["path"], line["status"], line["code"]) == ("/metrics", 401, "invalid_api_key")
        log.clear()
        log.handler.setLevel(logging.DEBUG)
        logging.getLogger().setLevel(logging.DEBUG)
        await served.http.get("/health")
        await until(lambda: [line for line in log.lines if line["logger"] == "server.requests"])


@pytest.mark.parametrize("path", ["/", "/metrics", "/web/main.js", "/health"])
def test_a_probe_that_breaks_is_news(log: Log, path: str) -> None:
    for status in (None, 200, 304, 503):
        RequestLine("r-1", status).write({"path": path, "method": "GET", "arrived_at": 0.0})
    assert not log.text
    RequestLine("r-1", 500).write({"path": path, "method": "GET", "arrived_at": 0.0})
    (line,) = log.lines
    assert (line["level"], line["status"]) == ("warning", 500)


async def test_at_a_higher_level_answers_are_no_news(over_socket: Served, log: Log) -> None:
    logging.getLogger().setLevel(logging.WARNING)
    await over_socket.complete()
    over_socket.answer_with(refusal=EngineDead("gone"))
    await over_socket.complete()
    assert (await log.only())["status"] == 500


def test_uvicorn_writes_no_line_of_its_own() -> None:
    for level in ("debug", "info"):
        settings = make_deployment(log_level=level).server
        assert not _uvicorn_config(lambda: None, settings).access_log


# ---------------------------------------------------------------------- text
@pytest.mark.parametrize("level", [logging.INFO, logging.DEBUG])
async def test_there_is_no_text_unless_the_deployment_wants_it(over_socket: Served, log: Log, level: int) -> None:
    logging.getLogger().setLevel(level)
    quieten()
    over_socket.say("my answer")
    for stream in (False, True):
        await over_socket.chat("my secret", stream=stream)
        await until(lambda: '"message": "request"' in log.text)
        assert not [word for word in ("my", "secret", "data:") if word in log.text]
        log.clear()


async def test_texts_are_made_for_a_line_that_is_written_and_cost_no_answer(
    folder: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[int] = []

    def fail(self: TextTokenizer, ids: Sequence[int]) -> str:
        tried.append(len(ids))
        raise ZeroDivisionError

    monkeypatch.setattr(TextTokenizer, "text_of", fail)
    async with serving(folder, log_prompts=True) as served:
        logging.getLogger().setLevel(logging.WARNING)
        assert (await served.complete([5, 6, 7])).status_code == 200
        assert not tried
        logging.getLogger().setLevel(logging.INFO)
        assert (await served.complete([5, 6, 7])).status_code == 200
        await until(lambda: len(log.lines) == 2)
    trouble, line = log.lines
    assert (trouble["level"], trouble["request_id"]) == ("error", "r-1")
    assert (line["status"], line["completion_tokens"] > 0, "prompts" in line) == (200, True, False)


@pytest.mark.parametrize("stream", [False, True])
async def test_with_log_prompts_there_are_both(folder: Path, log: Log, stream: bool) -> None:
    async with serving(folder, log_prompts=True) as served:
        served.say('an "answer"\nof two lines \u2028', size=2)
        await served.chat("a question\nof two lines é", stream=stream, n=2)
        line = await log.only()
        assert line["prompts"] == ["<|im_start|>user\na question\nof two lines é<|im_end|>\n<|im_start|>assistant\n"]
        assert line["answers"] == ['an "answer"\nof two lines \u2028'] * 2
        log.clear()
        await served.complete(["one", "two"], stop=["answer"])
        line = await log.only()
        assert line["prompts"] == ["one", "two"]
        assert line["answers"] == ['an "'] * 2, "what stands behind a stop string was no part of it"


async def test_a_prompt_cannot_forge_a_line(folder: Path, console: Log) -> None:
    async with serving(folder, log_prompts=True) as served:
        await served.complete("one\n2026-01-01 00:00:00 INFO server.requests: [x] forged \x1b[2J")
        await until(lambda: console.text)
        await asyncio.sleep(0.02)
        assert console.text.count("\n") == 1
        assert console.text.removesuffix("\n").isprintable()
