"""The API as its own client sees it, and what its requests become."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import openai
import pytest

from server.openai.convert import chat_job, completion_job
from server.openai.schema import ChatBody, ChatMessage, CompletionBody
from server.text import TextTokenizer
from tests.server.conftest import RENDERED, USER, Served, chunks_of, error_of, serve


# ---------------------------------------------------------------------- the official client
async def test_chat(both: Served) -> None:
    answer = await both.openai.chat.completions.create(model="tiny", messages=USER)
    assert answer.choices[0].message.content == RENDERED
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "length"
    assert (answer.object, answer.model) == ("chat.completion", "tiny")
    assert answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint is not None
    assert answer.system_fingerprint.endswith("-tiny-target+tiny_drafter-float32-cpu")
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == answer.usage.completion_tokens == len(both.engine.requests[0].prompt_ids)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


async def test_chat_stream(both: Served) -> None:
    chunks = [
        chunk
        async for chunk in await both.openai.chat.completions.create(
            model="tiny", messages=USER, stream=True, n=2, stream_options={"include_usage": True}
        )
    ]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 2 * chunks[-1].usage.prompt_tokens
    for index in range(2):
        choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert choices[0].delta.role == "assistant"
        assert all(choice.delta.role is None for choice in choices[1:])
        assert "".join(choice.delta.content or "" for choice in choices) == RENDERED
        assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["length"]
        assert choices[-1].finish_reason == "length"


async def test_completion(both: Served) -> None:
    answer = await both.openai.completions.create(model="tiny", prompt="hello world", max_tokens=3)
    assert answer.object == "text_completion"
    assert "hello world".startswith(answer.choices[0].text)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 3


async def test_completion_stream(both: Served) -> None:
    stream = await both.openai.completions.create(model="tiny", prompt="hello world", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "hello world"


async def test_models(both: Served) -> None:
    models = [model async for model in both.openai.models.list()]
    assert [m.id for m in models] == ["tiny", "org/tiny", "tiny:off", "tiny:short", "org/tiny:off", "org/tiny:short"]
    assert (await both.openai.models.retrieve("tiny:off")).id == "tiny:off"
    assert (await both.http.get("/v1/models/org/tiny:short")).json()["parent"] == "tiny"
    with pytest.raises(openai.NotFoundError) as caught:
        await both.openai.models.retrieve("other")
    assert caught.value.code == "model_not_found"


# ---------------------------------------------------------------------- fields
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "is_seeded": False, "stop_token_ids": (2,)}),
        ({"temperature": 0, "top_p": 0.5, "top_k": 7, "min_p": 0.1}, {"temperature": 0.0, "top_p": 0.5, "top_k": 7, "min_p": 0.1}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 2**31 - 1}, {"top_k": 0}),
        ({"temperature": None, "seed": -(2**63)}, {"temperature": 1.0, "seed": -(2**63), "is_seeded": True}),
        ({"seed": 2**64 - 1}, {"seed": 2**64 - 1, "is_seeded": True}),
        ({"max_tokens": 3}, {"max_tokens": 3}),
        ({"max_tokens": 3, "max_completion_tokens": 2}, {"max_tokens": 2}),
    ],
)
async def test_sampling_fields(served: Served, fields: dict[str, Any], expected: dict[str, Any]) -> None:
    assert (await served.chat(**fields)).status_code == 200
    sampling = served.engine.requests[0].sampling
    assert {key: getattr(sampling, key) for key in expected} == expected


async def test_an_answer_may_fill_the_context(served: Served) -> None:
    await served.chat()
    request = served.engine.requests[0]
    assert len(request.prompt_ids) + request.sampling.max_tokens == served.engine.info.max_model_len


async def test_unseeded_prompts_of_a_request_differ(served: Served) -> None:
    await served.complete(["hello"] * 4)
    assert len({request.sampling.seed for request in served.engine.requests}) == 4
    assert not any(request.sampling.is_seeded for request in served.engine.requests)


async def test_a_clients_seed_is_that_of_every_prompt(served: Served) -> None:
    await served.complete(["hello"] * 4, seed=7)
    assert [request.sampling.seed for request in served.engine.requests] == [7] * 4


async def test_unseeded_requests_differ(served: Served) -> None:
    await asyncio.gather(served.chat(), served.chat())
    assert len({request.sampling.seed for request in served.engine.requests}) == 2


@pytest.mark.parametrize(
    ("model", "own", "expected"),
    [
        ("tiny", None, (True, None)),
        ("tiny", {"enabled": False}, (False, None)),
        ("tiny", {"max_draft": 0}, (True, 0)),
        ("tiny:off", None, (False, None)),
        ("org/tiny:off", {"enabled": True, "max_draft": 3}, (True, 3)),
        ("tiny:short", {}, (True, 2)),
        ("tiny:short", {"max_draft": 1}, (True, 1)),
    ],
)
async def test_speculation(served: Served, model: str, own: Any, expected: tuple[bool, int | None]) -> None:
    response = await served.chat(model=model, speculation=own)
    assert response.json()["model"] == model
    speculation = served.engine.requests[0].speculation
    assert (speculation.enabled, speculation.max_draft, speculation.rule) == (*expected, "exact")


async def test_text_parts_and_roles(served: Served, tokenizer: TextTokenizer) -> None:
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "world"}]
    await served.chat(messages=[{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}])
    expected = tokenizer.encode_chat([{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello\nworld"}])
    assert served.engine.requests[0].prompt_ids == tuple(expected)


async def test_special_tokens_of_a_user_stay_text(served: Served) -> None:
    answer = (await served.chat("<|im_end|>")).json()
    assert answer["choices"][0]["message"]["content"] == "user\n<|im_end|>\nassistant\n"


@pytest.mark.parametrize(("prompt", "texts"), [("hello", ["hello"]), (["hello", "world"], ["hello", "world"])])
@pytest.mark.parametrize("as_ids", [False, True])
async def test_prompts(served: Served, tokenizer: TextTokenizer, prompt: Any, texts: list[str], as_ids: bool) -> None:
    if as_ids:
        prompt = tokenizer.encode(prompt) if isinstance(prompt, str) else [tokenizer.encode(text) for text in prompt]
    answer = (await served.complete(prompt, n=2)).json()
    assert [(choice["index"], choice["text"]) for choice in answer["choices"]] == list(enumerate(text for text in texts for _ in range(2)))
    assert answer["usage"]["prompt_tokens"] == sum(len(tokenizer.encode(text)) for text in texts)
    assert answer["usage"]["completion_tokens"] == 2 * answer["usage"]["prompt_tokens"]


async def test_several_prompts_in_a_stream(served: Served) -> None:
    chunks = chunks_of(await served.complete(["hello", "world"], n=2, stream=True))
    texts = ["", "", "", ""]
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == ["hello", "hello", "world", "world"]


@pytest.mark.parametrize("endpoint", ["completions", "chat/completions"])
async def test_the_event_loop_ticks_while_a_long_text_is_tokenised(folder: Path, endpoint: str) -> None:
    async with serve(folder, max_model_len=2**20) as served:
        text = "the quick brown fox, number 123. " * (2**20 // 33)
        body = CompletionBody(model="tiny", prompt=[text], max_tokens=1)
        chat = ChatBody(model="tiny", messages=[ChatMessage(role="user", content=text)], max_tokens=1)
        serving = served.app.state.serving
        gaps: list[float] = []
        ticking = asyncio.ensure_future(tick(gaps))
        await asyncio.sleep(0.01)
        begin = time.perf_counter()
        await (completion_job(body, serving) if endpoint == "completions" else chat_job(chat, serving))
        seconds = time.perf_counter() - begin
        ticking.cancel()
        assert len(gaps) > 5
        assert max(gaps) < seconds * 2 / 3  # one that holds the interpreter lock leaves a single gap of all of them


async def tick(gaps: list[float]) -> None:
    """Note how late each of many short sleeps was over."""
    while True:
        begin = time.perf_counter()
        await asyncio.sleep(0.001)
        gaps.append(time.perf_counter() - begin)


async def test_a_text_that_cannot_fit(served: Served) -> None:
    for response in (
        await served.complete("hello " * 10_000),
        await served.chat("hello " * 10_000),
        await served.complete("hello " * 2000),
    ):
        error = error_of(response, 400)
        assert error["code"] == "context_length_exceeded"
        assert "at least" in error["message"]
    assert not served.engine.requests


# ---------------------------------------------------------------------- around it
async def test_the_description_is_open_and_has_no_pages(served: Served) -> None:
    assert "/v1/chat/completions" in (await served.http.get("/openapi.json")).json()["paths"]
    for path in ("/docs", "/redoc", "/docs/oauth2-redirect"):  # they would load scripts from another server
        assert error_of(await served.http.get(path), 404)


async def test_request_ids(both: Served) -> None:
    assert (await both.http.get("/v1/models", headers={"x-request-id": "abc-1"})).headers["x-request-id"] == "abc-1"
    for unfit in ("", "a b", "x" * 201):
        made = (await both.http.get("/v1/models", headers={"x-request-id": unfit})).headers["x-request-id"]
        assert made != unfit
        assert len(made) == 32
