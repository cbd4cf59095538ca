"""Streams on the wire: framing, clients that leave, engines that die, servers that end."""

from __future__ import annotations

import asyncio
import gc
import inspect
import json
import logging
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import sse_starlette.sse
from sse_starlette import EventSourceResponse

from engine.errors import EngineDead
from server.app import create_app
from server.stream import EventStream
from tests.fakes import FakeEngine, Part, make_info
from tests.server.conftest import Served, chunks_of, events_of, listen, make_deployment, serve, serve_socket, until

USER: Any = [{"role": "user", "content": "hello"}]


async def test_framing(both: Served) -> None:
    response = await both.chat(stream=True)
    assert "\r" not in response.text
    assert response.text.endswith("data: [DONE]\n\n")
    first, *_, last, done = events_of(response)
    assert json.loads(first)["choices"] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert json.loads(last)["choices"][0]["finish_reason"] == "length"
    assert done == "[DONE]"
    assert response.headers["cache-control"] == "no-store"


async def test_what_waits_goes_out_as_one_chunk(served: Served) -> None:
    served.answer_with(at_once=True)
    chunks = chunks_of(await served.complete("hello world", stream=True))
    assert [chunk["choices"][0] for chunk in chunks] == [{"index": 0, "text": "hello world", "logprobs": None, "finish_reason": "length"}]


async def test_text_that_looks_like_line_ends(served: Served) -> None:
    text = "a\r\nb\n\nc\u2028d\u2029e\x85f"
    chunks = chunks_of(response := await served.complete(text, stream=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text
    assert len(response.text.splitlines()) == 2 * len(chunks) + 2


async def test_keep_alive(folder: Path) -> None:
    async with serve(folder, make_deployment(keep_alive_seconds=0.02)) as served:
        served.answer_with(delay=0.05)
        response = await served.complete("he", stream=True)
        assert ": keep-alive\n\n" in response.text
        assert chunks_of(response)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["hello", ["hello", "world"]])
async def test_a_client_that_leaves_frees_its_sequences(folder: Path, stream: bool, prompt: Any) -> None:
    async with serve_socket(folder) as served:
        served.answer_with(endless=True, delay=0.01)
        body = {"model": "tiny", "prompt": prompt, "stream": stream, "n": 2}
        async with httpx.AsyncClient(base_url=served.http.base_url) as client:
            task = asyncio.ensure_future(read(client, body))
            await until(lambda: served.engine.num_steps > 3)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        steps = served.engine.num_steps
        await until(lambda: not served.engine.streams)
        assert served.engine.num_steps - steps <= 2 * len(served.engine.requests)
        assert len(served.engine.aborted) == 2 * len(served.engine.requests)
        assert served.app.state.draining.num_running == 0
        assert b'finish_reason="abort",model="tiny",preset=""} 2' in served.app.state.metrics.exposition(True) or prompt != "hello"


async def read(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for _ in response.aiter_bytes():
            pass


async def test_a_client_that_leaves_before_the_first_byte(served: Served) -> None:
    """The response is never iterated, and yet what it owns is given back."""
    served.answer_with(hold=asyncio.Event())
    body = json.dumps({"model": "tiny", "prompt": "hello", "stream": True}).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}, {"type": "http.disconnect"}]

    async def receive() -> Any:
        return messages.pop(0) if messages else await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            raise OSError("gone")

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
    with pytest.raises(OSError, match="gone"):
        await served.app(scope | {"asgi": {}, "http_version": "1.1", "scheme": "http", "server": None}, receive, send)
    assert len(served.engine.requests) == 1
    assert not served.engine.streams


async def test_an_engine_that_dies_in_mid_stream(both: Served) -> None:
    both.answer_with(dies_after=2, delay=0.01)
    events = events_of(await both.complete("hello world", stream=True))
    assert json.loads(events[-2]) == {
        "error": {"message": "The engine stopped at an internal error.", "type": "server_error", "param": None, "code": "engine_dead"}
    }
    assert events[-1] == "[DONE]"
    assert (await both.http.get("/health")).status_code == 503
    assert (await both.http.get("/ready")).json()["reason"] == "The engine stopped at an internal error."
    assert b'finish_reason="error",model="tiny",preset=""} 1.0' in (await both.http.get("/metrics")).content


@pytest.mark.parametrize("broken", ["server.generate._Answer.push", "server.openai.response_schema.Chunk.model_dump_json"])
async def test_an_unforeseen_error_in_mid_stream(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    monkeypatch.setattr(broken, lambda *_: 1 / 0)
    events = events_of(await served.complete("hello world", stream=True))
    assert json.loads(events[-2]) == {
        "error": {"message": "The server had an internal error.", "type": "server_error", "param": None, "code": "internal_error"}
    }
    assert events[-1] == "[DONE]"
    (record,) = (record for record in caplog.records if record.name != "server.requests")
    assert (record.levelno, record.exc_info and record.exc_info[0]) == (logging.ERROR, ZeroDivisionError)
    assert not served.engine.streams
    assert served.app.state.draining.num_running == 0


async def test_the_official_client_sees_the_error(served: Served) -> None:
    served.answer_with(dies_after=1, delay=0.01)
    stream = await served.openai.chat.completions.create(model="tiny", messages=USER, stream=True)
    with pytest.raises(openai.APIError, match="internal error"):
        async for _ in stream:
            pass


async def test_several_prompts_on_a_dying_engine(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    served.answer_with(dies_after=3, delay=0.01)
    assert (await served.complete([[40] * 20] * 3)).status_code == 500
    await asyncio.sleep(0)
    gc.collect()  # a task whose error nobody heard complains when it goes
    assert {record.name for record in caplog.records} == {"server.requests"}, "it was foreseen: no traceback"


async def test_a_whole_answer_of_a_dying_engine(served: Served) -> None:
    served.answer_with(dies_after=1)
    response = await served.complete("hello world")
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "engine_dead"


# ---------------------------------------------------------------------- the end
async def test_draining_refuses_new_and_finishes_old(both: Served) -> None:
    both.answer_with(hold=asyncio.Event())
    running = [asyncio.ensure_future(both.complete("hello", stream=stream)) for stream in (False, True)]
    await until(lambda: len(both.engine.requests) == 2)
    both.app.state.draining.begin()
    both.app.state.draining.begin()
    response = await both.complete("hello")
    assert response.status_code == 503
    assert response.headers["retry-after"] == "5"
    assert response.json()["error"]["code"] == "shutting_down"
    assert (await both.http.get("/ready")).json()["reason"] == "the server is shutting down"
    assert (await both.http.get("/health")).status_code == 200
    assert both.app.state.draining.num_running == 2
    assert both.engine.script.hold is not None
    both.engine.script.hold.set()
    assert (await running[0]).json()["choices"][0]["text"] == "hello"
    assert chunks_of(await running[1])[-1]["choices"][0]["finish_reason"] == "length"
    await both.app.state.draining.idle()


async def test_draining_cuts_what_takes_too_long(folder: Path) -> None:
    async with serve(folder, make_deployment(drain_seconds=0.05)) as served:
        served.answer_with(endless=True, delay=0.01)
        running = [asyncio.ensure_future(served.complete("hello", stream=stream)) for stream in (False, True)]
        await until(lambda: served.engine.num_steps > 3)
        served.app.state.draining.begin()
        assert (await running[0]).json()["error"]["code"] == "shutting_down"
        events = events_of(await running[1])
        assert json.loads(events[-2])["error"]["code"] == "shutting_down"
        assert len(events) > 3
        assert not served.engine.streams


def test_what_the_stream_overrides_is_there() -> None:
    """A private method of sse-starlette; under another name SIGTERM would end every stream."""
    name = "_listen_for_exit_signal_with_grace"
    assert inspect.iscoroutinefunction(EventSourceResponse.__dict__[name])
    assert name in EventStream.__dict__


async def test_a_server_that_ends_lets_streams_finish(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As at SIGTERM: uvicorn is told to end and sse-starlette has noticed."""
    engine = FakeEngine(make_info(str(folder)))
    app = create_app(engine, make_deployment())
    async with listen(app) as (server, url), httpx.AsyncClient(base_url=url) as http:
        engine.script.delay = 0.1
        engine.script.parts = [Part((40,))] * 10
        task = asyncio.ensure_future(http.post("/v1/completions", json={"model": "tiny", "prompt": "a", "stream": True}))
        await until(lambda: engine.num_steps > 1)
        monkeypatch.setattr(sse_starlette.sse.AppStatus, "should_exit", True)
        app.state.draining.begin()
        server.should_exit = True
        assert len(chunks_of(await task)) == 10
    assert engine.is_closed


# ---------------------------------------------------------------------- the beginning
async def test_before_loading(folder: Path) -> None:
    engine = FakeEngine(make_info(str(folder)))
    app = create_app(engine, make_deployment())
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
        assert (await http.get("/health")).status_code == 200
        assert (await http.get("/ready")).json() == {"status": "not ready", "reason": "the model is being loaded"}
        response = await http.post("/v1/completions", json={"model": "tiny", "prompt": "a"})
        assert (response.status_code, response.headers["retry-after"]) == (503, "5")
        assert response.json()["error"]["code"] == "model_loading"


async def test_the_lifespan_starts_and_closes_the_engine(folder: Path) -> None:
    for is_started in (False, True):
        engine = FakeEngine(make_info(str(folder)))
        if is_started:
            await engine.start()
        app = create_app(engine, make_deployment())
        async with app.router.lifespan_context(app):
            assert engine.is_started
        assert engine.is_closed


async def test_an_engine_that_cannot_start_ends_the_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine(make_info(str(folder)))

    async def fail() -> None:
        raise EngineDead("no weights")

    monkeypatch.setattr(engine, "start", fail)
    app = create_app(engine, make_deployment())
    with pytest.raises(EngineDead, match="no weights"):
        async with app.router.lifespan_context(app):
            pass
    assert engine.is_closed


async def test_two_apps_share_nothing(folder: Path) -> None:
    async with serve(folder) as one, serve(folder) as other:
        await one.complete()
        assert b'cascade_steps_total{model="tiny"} 0.0' in (await other.http.get("/metrics")).content
        one.app.state.draining.begin()
        assert (await other.complete()).status_code == 200
