"""Everything that is refused, and how: values, prompts, bodies, paths, keys, a full queue, a lost engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from engine.errors import EngineDead, QueueFull
from server.text import TextTokenizer
from tests.server.conftest import USER, Served, error_of, make_deployment, serve, serve_socket, until


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"min_p": 1.5}, "min_p"),
        ({"logprobs": "yes"}, "logprobs"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"presence_penalty": -2.1}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-30}, "repetition_penalty"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"logit_bias": {"1": 101}}, "logit_bias.1"),
        ({"logit_bias": {"one": 1}}, "logit_bias.one.[key]"),
        ({"logit_bias": {"999999999": 1}}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"seed": 2**64}, "seed"),
        ({"seed": "1"}, "seed"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 13}, "n"),  # more than the server holds
        ({"stop": ""}, "stop.0"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [1]}, "stop.0"),
        ({"stop": "a" * 1025}, "stop.0"),
        ({"stop": ["a", "a" * 10**6]}, "stop.1"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"speculation": {"rule": "chow"}}, "speculation.rule"),
        ({"speculation": {"max_draft": -1}}, "speculation.max_draft"),
        ({"speculation": True}, "speculation"),
        ({"messages": []}, "messages"),
        ({"messages": None}, "messages"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages.0.content"),
        ({"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]}, "messages.0.tool_calls.0.id"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}, "messages"),
        ({"model": 3}, "model"),
        ({"model": None}, "model"),
    ],
)
async def test_bad_values(served: Served, fields: dict[str, Any], param: str) -> None:
    error = error_of(await served.chat(**fields), 400)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert not served.engine.requests


@pytest.mark.parametrize("value", [2**31, 10**4299, 10**4300 - 1, -(10**4300) + 1], ids=["2**31", "4300 digits", "nines", "negative"])
@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens", "top_k", "n", "speculation.max_draft", "prompt", "prompt.0"])
async def test_huge_integers(served: Served, field: str, value: int) -> None:
    """Python reads an integer of 4300 digits, and fails at writing its sum with another one."""
    bodies: dict[str, Any] = {
        "speculation.max_draft": {"speculation": {"max_draft": value}},
        "prompt": {"prompt": [5, value]},
        "prompt.0": {"prompt": [[5, value]]},
    }
    error = error_of(await served.complete(**bodies.get(field, {field: value})), 400)
    assert error["param"] == field.removesuffix(".0")
    assert len(error["message"]) < 200


@pytest.mark.parametrize("prompt", [[], None, 5, [True], ["a", 1], [[1], "a"], {}, [1024], [-1], [[]], [10**30], "", ["a"] * 13])
async def test_bad_prompts(served: Served, prompt: Any) -> None:
    assert error_of(await served.complete(prompt), 400)["param"] == "prompt"
    assert not served.engine.streams


async def test_context_length(served: Served, tokenizer: TextTokenizer) -> None:
    num = len(tokenizer.encode("hello"))
    assert (await served.complete("hello", max_tokens=512 - num)).status_code == 200
    error = error_of(await served.complete("hello", max_tokens=513 - num), 400)
    assert error["code"] == "context_length_exceeded"
    assert "512" in error["message"]
    assert "513" in error["message"]
    assert error_of(await served.complete([5] * 512), 400)["code"] == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        await served.openai.chat.completions.create(model="tiny", messages=USER, max_tokens=600)
    assert caught.value.code == "context_length_exceeded"


async def test_unknown_model(served: Served) -> None:
    for model in ("other", "tiny:none", "TINY", "tiny:", ""):
        error = error_of(await served.chat(model=model), 404)
        assert (error["code"], error["param"]) == ("model_not_found", "model")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff\xfe",
        b'{"model": "\xff"}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": ["a", "\\udfff"]}',
        b'{"model": "tiny\\ud800", "prompt": "a"}',
        b'{"model": "tiny", "prompt": "a", "stop": "\\ud800"}',
        b'{"model": "tiny", "prompt": "a", "\\ud800": 1}',
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "a", "top_p": Infinity}',
        b'{"model": "tiny", "prompt": "a", "seed": 1e999}',
        b'{"model": "tiny", "prompt": "a", "max_tokens": ' + b"9" * 400 + b"}",
        b'{"model": "tiny", "prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny", "prompt": ' + b"[" * 100_000,
        b'{"model": "tiny", "prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
    ],
)
async def test_bad_bodies(served: Served, content: bytes) -> None:
    for path in ("completions", "chat/completions"):
        response = await served.http.post(f"/v1/{path}", content=content, headers={"content-type": "application/json"})
        assert error_of(response, 400)["type"] == "invalid_request_error"


async def test_a_body_that_is_too_large(folder: Path) -> None:
    async def pieces(num_bytes: int) -> AsyncIterator[bytes]:
        for start in range(0, num_bytes, 100):
            yield b" " * min(100, num_bytes - start)

    headers = {"content-type": "application/json"}
    for running in (serve, serve_socket):
        async with running(folder, make_deployment(max_body_bytes=1000)) as served:
            for content in (b" " * 1001, pieces(1001), pieces(100_000)):
                response = await served.http.post("/v1/completions", content=content, headers=headers)
                assert error_of(response, 413)["code"] == "request_too_large"
                assert "1000 bytes" in response.json()["error"]["message"]
                assert response.headers["x-request-id"]
            for content in (b" " * 1000, pieces(1000)):
                assert error_of(await served.http.post("/v1/completions", content=content, headers=headers), 400)
            body = b'{"model": "tiny", "prompt": "hello"}'.ljust(1000)
            assert (await served.http.post("/v1/completions", content=body, headers=headers)).status_code == 200
            assert b'cascade_refusals_total{code="request_too_large",status="413"} 3.0' in (await served.http.get("/metrics")).content


@pytest.mark.parametrize("length", ["1001", "9" * 5000])
async def test_a_body_that_says_it_is_too_large_is_not_read(folder: Path, length: str) -> None:
    async with serve(folder, make_deployment(max_body_bytes=1000)) as served:
        sent: list[Any] = []

        async def receive() -> Any:
            raise AssertionError("the body was read")

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": [(b"content-length", length.encode())]}
        more: Any = {"query_string": b"", "asgi": {}, "http_version": "1.1", "scheme": "http", "server": None}
        await served.app(scope | more, receive, send)
        assert sent[0]["status"] == 413


async def test_keys_are_checked_before_a_body_is_read(folder: Path) -> None:
    async with serve(folder, make_deployment(max_body_bytes=10, api_keys=("key",))) as served:
        assert (await served.complete("hello")).status_code == 401


async def test_a_body_that_is_not_json(served: Served) -> None:
    response = await served.http.post("/v1/completions", content=b"prompt=x", headers={"content-type": "application/x-www-form-urlencoded"})
    assert "application/json" in error_of(response, 400)["message"]
    assert error_of(await served.http.post("/v1/completions"), 400)


async def test_unknown_paths(both: Served) -> None:
    error = error_of(await both.http.get("/v1/nothing"), 404)
    assert error["message"].startswith("Invalid URL (GET /v1/nothing)")
    response = await both.http.get("/v1/chat/completions")
    assert error_of(response, 405)["type"] == "invalid_request_error"
    assert response.headers["allow"] == "POST"


async def test_queue_full(served: Served) -> None:
    served.answer_with(refusal=QueueFull(3, 7))
    response = await served.chat()
    assert error_of(response, 503)["code"] == "queue_full"
    assert response.headers["retry-after"] == "7"
    assert error_of(await served.chat(stream=True), 503)


async def test_a_prompt_too_many_frees_the_others(served: Served) -> None:
    served.answer_with(hold=asyncio.Event())
    first = asyncio.ensure_future(served.complete(["a"] * 8))
    await until(lambda: len(served.engine.requests) == 8)
    assert error_of(await served.complete(["a"] * 5), 503)["code"] == "queue_full"
    assert len(served.engine.streams) == 8
    assert served.engine.script.hold is not None
    served.engine.script.hold.set()
    assert (await first).status_code == 200


async def test_a_dead_engine(served: Served) -> None:
    served.answer_with(refusal=EngineDead("It is dead."))
    response = await served.chat()
    assert error_of(response, 500) == {"message": "It is dead.", "type": "server_error", "param": None, "code": "engine_dead"}
    assert response.headers["x-should-retry"] == "false"


async def test_an_unforeseen_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serve(folder, raise_app_exceptions=False) as served:
        monkeypatch.setattr(served.engine, "submit", lambda request: 1 / 0)
        response = await served.http.post(
            "/v1/completions", json={"model": "tiny", "prompt": "a"}, headers={"x-request-id": "mine", "x": "y"}
        )
        assert error_of(response, 500)["message"] == "The server had an internal error."
        assert response.headers["x-should-retry"] == "false"
        assert response.headers["x-request-id"] == "mine"


async def test_api_keys(folder: Path) -> None:
    async with serve(folder, make_deployment(api_keys=("first", "secönd"))) as served:
        for authorization in (None, "Bearer wrong", "Bearer ", "Basic first", "first", b"Bearer \xff"):
            headers: Any = {} if authorization is None else {"authorization": authorization}
            response = await served.http.get("/v1/models", headers=headers)
            assert error_of(response, 401)["code"] == "invalid_api_key"
            assert response.headers["x-request-id"]
        for key in ("first", "secönd"):
            authorized: Any = {"authorization": f"Bearer {key}".encode()}
            response = await served.http.get("/v1/models", headers=authorized)
            assert response.status_code == 200
        assert (await served.http.post("/v1/completions", content=b"{")).status_code == 401
        assert (await served.http.get("/v1/nothing")).status_code == 401
        assert (await served.http.get("/openapi.json")).status_code == 401
        assert (await served.http.get("/openapi.json", headers={"authorization": "Bearer first"})).status_code == 200
        for path in ("/metrics", "/version"):
            assert (await served.http.get(path)).status_code == 401
        for path in ("/health", "/ready"):
            assert (await served.http.get(path)).status_code == 200
