"""`cascade bench` against servers on real sockets and against engines in this process."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.client import EventLines, StreamReader, base_url_of
from benchmarks.errors import RequestFailed
from engine.request import Round
from server.cli import app
from tests.benchmarks.conftest import fake_server
from tests.fakes import Part, Script

TEXTS = Script(parts=[Part((70,)), Part((71, 72), Round(num_draft=3, num_accepted=1), 2, 2)], endless=True)


async def bench(*arguments: str) -> Any:
    """The command as a user runs it, in a thread: it has an event loop of its own."""
    return await asyncio.to_thread(CliRunner().invoke, app, ["bench", *arguments])


def report_of(result: Any) -> dict[str, Any]:
    """The JSON on the last line of standard output, which is the only one."""
    (line,) = result.stdout.splitlines()
    report: dict[str, Any] = json.loads(line)
    return report


@asynccontextmanager
async def answering(response: Callable[[bytes], bytes]) -> AsyncIterator[str]:
    """A server that says what a function makes of the request."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        await reader.readexactly(int(length[1]) if length else 0)  # unread bytes would reset the connection
        writer.write(response(head))
        await writer.drain()
        writer.close()
        await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def http(body: bytes, status: str = "200 OK", kind: str = "text/event-stream") -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nConnection: close\r\n\r\n".encode() + body


GOOD = http(
    b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\ndata: [DONE]\n\n'
)


async def test_a_closed_loop_over_a_socket(folder: Path, tmp_path: Path) -> None:
    async with fake_server(folder) as (url, engine):
        engine.script = TEXTS
        out = tmp_path / "new" / "out.json"
        result = await bench("--url", url, "--num-requests", "7", "--concurrency", "3", "--max-tokens", "6", "--output", str(out))
    assert result.exit_code == 0, result.stderr
    report = report_of(result)
    whole = report["figures"]["all"]
    assert (whole["num_requests"], whole["num_failed"], whole["num_output_tokens"]) == (7, 0, 42)
    assert whole["drafting"]["acceptance_rate"] == pytest.approx(1 / 3)
    assert whole["drafting"]["mean_accepted_length"] == 2
    assert whole["ttft_ms"]["count"] == whole["e2e_ms"]["count"] == 7
    assert len(engine.requests) == 8  # and one to warm up
    assert (report["target"]["model"], report["load"]["concurrency"]) == ("tiny", 3)
    assert report["environment"]["versions"]["cascade-serve"]
    assert "requests ok" in result.stderr
    assert [entry["output_tokens"] for entry in json.loads(out.read_text())["requests"]] == [6] * 7


async def test_an_open_loop_with_goals_and_extra_fields(folder: Path) -> None:
    async with fake_server(folder) as (url, engine):
        arguments = (
            "--request-rate",
            "200",
            "--max-concurrency",
            "2",
            "--random-input-len",
            "5",
            "--num-requests",
            "6",
            "--max-tokens",
            "3",
        )
        options = ("--goodput", "e2e:60s", "--speculation", '{"enabled": false}', "--endpoint", "completions", "--seed", "5")
        result = await bench("--url", f"{url}/v1/", *arguments, *options)
    assert result.exit_code == 0, result.stderr
    figures = report_of(result)["figures"]
    assert figures["goodput"]["share"] == 1
    assert figures["client_wait_ms"]["count"] == 6
    measured = engine.requests[1:]
    assert not any(request.speculation.enabled for request in measured)
    assert sorted(request.sampling.seed for request in measured) == [5, 6, 7, 8, 9, 10]


async def test_no_more_are_open_than_asked_for(folder: Path) -> None:
    most = 0
    async with fake_server(folder) as (url, engine):
        engine.script = Script(delay=0.003)

        def watch(stats: object) -> None:
            nonlocal most
            most = max(most, len(engine.streams))

        engine.on_step(watch)
        await bench("--url", url, "--num-requests", "8", "--concurrency", "3", "--max-tokens", "4")
    assert most == 3


async def test_failures_are_counted_by_kind_beside_what_succeeded() -> None:
    busy = http(b'{"error": {"message": "come later"}}', "503 Service Unavailable")
    responses = [GOOD, busy, http(b"data: {"), busy, GOOD]
    async with answering(lambda head: responses.pop()) as url:
        result = await bench("--url", url, "--model", "m", "--num-requests", "5", "--warmup", "0")
    figures = report_of(result)["figures"]
    assert result.exit_code == 0
    assert (figures["all"]["num_failed"], figures["all"]["num_output_tokens"]) == (3, 4)
    assert figures["failures"] == [
        {"kind": "HTTP 503", "count": 2, "example": "come later"},
        {"kind": "malformed stream", "count": 1, "example": "it ended without a finish reason"},
    ]
    assert "2 failed: HTTP 503: come later" in result.stderr


async def test_all_failed_is_exit_code_1(folder: Path) -> None:
    async with fake_server(folder) as (url, engine):
        engine.script = Script(parts=[Part((70,))], endless=True, dies_after=3)
        result = await bench("--url", url, "--num-requests", "2", "--warmup", "0", "--max-tokens", "6")
    assert result.exit_code == 1
    assert report_of(result)["figures"]["all"]["num_failed"] == 2
    assert "Error: all 2 requests failed; 2 times error in stream: The engine stopped" in result.stderr


async def test_what_cannot_be_asked_is_one_line(folder: Path) -> None:
    async with fake_server(folder) as (url, _):
        unknown = await bench("--url", url, "--model", "nix")
        refused = await bench("--url", url, "--speculation", '{"rule": "nix"}')
    gone = await bench("--url", url)
    for result, what in (
        (unknown, "Error: HTTP 404: The model 'nix' does not exist."),
        (refused, "Error: HTTP 400: speculation.rule"),
        (gone, f"Error: no connection: {url}/v1/models cannot be reached"),
    ):
        assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
        assert result.stderr.startswith(what)


@pytest.mark.parametrize(
    ("response", "what"),
    [
        (http(b"data: {nonsense\n\n"), "malformed stream: JSON is malformed"),
        (http(b'data: {"choices": 3}\n\n'), "malformed stream: Expected `array`"),
        (http(b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n'), "malformed stream: it ended without a finish reason"),
        (http(b'data: {"choices":[{"delta":{"content":"a"},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'), "no usage"),
        (http(b"<p>hello</p>", kind="text/html"), "malformed stream: its content type is text/html"),
        (http(b'{"detail": "not here"}', status="418 I'm a teapot"), "HTTP 418: not here"),
        (http(b'data: {"error": {"message": "it burns"}}\n\n'), "error in stream: it burns"),
        (b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 99\r\n\r\ndata: ", "broken connection: http://"),
    ],
)
async def test_a_server_that_answers_badly_is_one_line(response: bytes, what: str) -> None:
    async with answering(lambda head: response) as url:
        result = await bench("--url", url, "--model", "m")
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith(f"Error: {what}")


async def test_the_key_is_sent_and_never_shown(folder: Path) -> None:
    heads = []

    def remember(head: bytes) -> bytes:
        heads.append(head)
        return http(b"{}", "401 Unauthorized")

    async with answering(remember) as url:
        result = await bench("--url", url, "--api-key", "sesame")
    assert b"authorization: bearer sesame" in heads[0].lower()
    assert "sesame" not in result.output


def test_an_engine_in_this_process_with_a_tiny_model(tiny_config: Path) -> None:
    arguments = ["--config", str(tiny_config), "--num-requests", "4", "--concurrency", "2", "--max-tokens", "5", "--category", "qa"]
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exit_code == 0, result.output
    report = report_of(result)
    whole = report["figures"]["all"]
    assert (whole["num_requests"], whole["num_failed"]) == (4, 0)
    assert whole["num_output_tokens"] >= 4
    assert whole["num_cached_prompt_tokens"] > 0  # four requests and three prompts
    assert report["target"] | {"fingerprint": ""} == {
        "kind": "thread",
        "config": str(tiny_config),
        "model": "tiny",
        "device": "cpu, float32",
        "fingerprint": "",
    }
    assert report["figures"]["cpu_ms_per_token"] is None


def test_an_engine_in_this_process_refuses_as_a_server_does(tiny_config: Path) -> None:
    result = CliRunner().invoke(app, ["bench", "--config", str(tiny_config), "--speculation", '{"rule": "nix"}'])
    assert result.exit_code == 2
    assert "Error: invalid request: speculation.rule" in result.stderr
    assert result.stdout == ""


def test_a_bad_command_line_is_one_line_before_anything_is_loaded(tmp_path: Path) -> None:
    bad = tmp_path / "p.jsonl"
    bad.write_text("oops\n")
    for arguments, what in (
        (["--prompts", str(bad)], f"Error: {bad}, line 1: not JSON"),
        (["--config", "x.yaml", "--url", "http://x"], "Error: --url measures a server and --config an engine"),
        (["--config", "x.yaml", "--concurrency", "1", "--request-rate", "2"], "Error: --concurrency is a closed loop"),
        (["--url", "127.0.0.1:8000"], "Error: 127.0.0.1:8000: an address begins with http://"),
    ):
        result = CliRunner().invoke(app, ["bench", *arguments])
        assert (result.exit_code, result.stderr.count("\n"), result.stderr.startswith(what)) == (2, 1, True), result.stderr


def test_help_is_that_of_the_benchmark_and_defines_its_words() -> None:
    text = " ".join(CliRunner().invoke(app, ["bench", "--help"]).output.split())
    assert "TPOT is (E2E - TTFT) / (n - 1)" in text
    assert "--request-rate R" in text


STREAM = (
    b': keep-alive\n\ndata: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n'
    b'data: {"choices":[{"delta":{"content":"a"}}]}\r\n\r\ndata:{"choices":[{"delta":{"content":"b"},"finish_reason":"length"}]}\n\n'
    b'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":2}}\n\ndata: [DONE]\n\n'
)


@pytest.mark.parametrize("size", [1, 7, 1000])
def test_a_stream_may_be_cut_anywhere(size: int) -> None:
    reader = StreamReader(0.0)
    for number, start in enumerate(range(0, len(STREAM), size)):
        reader.feed(STREAM[start : start + size], float(number))
    answer = reader.answer()
    assert (answer.text, answer.finish_reason, answer.num_output_tokens) == ("ab", "length", 2)
    assert len(answer.delivered_at) == (1 if size == 1000 else 2)  # what arrives together is one delivery


@pytest.mark.parametrize(
    ("url", "base"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h:1/", "http://h:1/v1"),
        ("http://h/v1/", "http://h/v1"),
        ("https://h/api/v3", "https://h/api/v3"),
    ],
)
def test_a_bare_host_gets_v1_and_other_addresses_stay(url: str, base: str) -> None:
    assert base_url_of(url) == base


def test_lines_without_an_end_wait() -> None:
    lines = EventLines()
    assert list(lines.feed(b"data: a")) == []
    assert list(lines.feed(b"b\ndata: c\nevent: x\n")) == [b"ab", b"c"]


def test_an_error_behind_text_is_a_failure() -> None:
    reader = StreamReader(0.0)
    with pytest.raises(RequestFailed, match="error in stream: over"):
        reader.feed(b'data: {"choices":[{"text":"a"}]}\n\ndata: {"error":{"message":"over"}}\n\n', 1.0)
