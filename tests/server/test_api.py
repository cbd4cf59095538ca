"""The API as its own client sees it, and everything that is refused."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

import server.detokenize
from engine.errors import EngineDead, QueueFull
from engine.request import FinishReason, Round
from server.openai.convert import chat_job, completion_job
from server.openai.schema import ChatBody, ChatMessage, CompletionBody
from server.text import TextTokenizer
from tests.fakes import Part
from tests.server.conftest import RENDERED, USER, Served, chunks_of, error_of, make_deployment, serve, serve_socket, until


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


# ---------------------------------------------------------------------- what the text holds
async def test_the_end_token_has_no_text_and_counts(served: Served, tokenizer: TextTokenizer) -> None:
    ids = tokenizer.encode("hello!")
    served.answer_with(parts=[Part(tuple(ids))], finish=FinishReason.STOP)  # "!" as an end token that is not special
    choice = (await served.complete()).json()
    assert choice["choices"][0] == {"index": 0, "text": "hello", "logprobs": None, "finish_reason": "stop"}
    assert choice["usage"]["completion_tokens"] == len(ids)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_stop_string_across_tokens(served: Served, tokenizer: TextTokenizer, stream: bool) -> None:
    ids = tokenizer.encode("hello xyz and more")
    served.answer_with(parts=[Part((token,)) for token in ids], endless=True, delay=0.001)
    response = await served.complete(stop=["never", "xyz"], stream=stream, stream_options={"include_usage": True} if stream else None)
    bodies = chunks_of(response) if stream else [response.json()]
    choices = [choice for body in bodies for choice in body["choices"]]
    assert "".join(choice["text"] for choice in choices) == "hello "
    assert [choice["finish_reason"] for choice in choices][-1] == "stop"
    assert bodies[-1]["usage"]["completion_tokens"] == len(tokenizer.encode("hello xyz"))
    assert served.engine.aborted == [(served.engine.requests[0].id, 0)]


async def test_stop_strings_are_prepared_once_and_only_for_what_runs(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[str] = []
    borders = server.detokenize._borders

    def noted(stop: str) -> list[int]:
        prepared.append(stop)
        return borders(stop)

    monkeypatch.setattr(server.detokenize, "_borders", noted)
    stops = ["x" * 1024, "y"]
    assert (await served.complete(["hello", "world"], n=4, stop=stops)).status_code == 200
    assert prepared == stops
    served.answer_with(refusal=QueueFull(3, 7))
    assert (await served.complete("hello", stop=stops, stream=True)).status_code == 503
    assert prepared == stops


async def test_what_could_have_been_a_stop_comes_out_at_the_end(served: Served, tokenizer: TextTokenizer) -> None:
    served.answer_with(parts=[Part(tuple(tokenizer.encode("hello wor")))])
    assert (await served.complete(stop="world")).json()["choices"][0]["text"] == "hello wor"


async def test_emoji_over_several_tokens(served: Served, tokenizer: TextTokenizer) -> None:
    text = "a\N{GRINNING FACE}b"
    served.answer_with(parts=[Part((token,)) for token in tokenizer.encode(text)], delay=0.001)
    chunks = chunks_of(await served.complete(stream=True))
    assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", "\N{GRINNING FACE}", "b"]


async def test_a_cut_emoji(served: Served, tokenizer: TextTokenizer) -> None:
    served.answer_with(parts=[Part((token,)) for token in tokenizer.encode("\N{GRINNING FACE}")[:-1]])
    assert (await served.complete()).json()["choices"][0]["text"] == "\ufffd"


async def test_a_model_without_tokenizer(tmp_path: Path) -> None:
    async with serve(tmp_path) as served:
        assert (await served.complete([5, 6])).json()["choices"][0]["text"] == " 5 6"
        assert error_of(await served.complete("hello"), 400)["param"] == "prompt"
        assert "no chat template" in error_of(await served.chat(), 400)["message"]


# ---------------------------------------------------------------------- numbers
def drafted(accepted: int, drafts: int, deferred: int = 0, lossy: int = 0) -> Part:
    """A round in which some drafts were accepted, and one more token."""
    return Part(tuple(range(10, 11 + accepted)), Round(drafts, accepted, deferred, lossy), num_target_calls=9, num_drafter_calls=7)


async def test_metrics_of_a_response(served: Served) -> None:
    served.answer_with(parts=[Part((10,)), drafted(4, 4, lossy=0b11), drafted(1, 4, deferred=0b10)], delay=0.002, num_cached_tokens=2)
    answer = (await served.complete([1, 2, 3])).json()
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert answer["metrics"]["speculative_decoding"] == {
        "mean_acceptance_length": 3.5,
        "draft_acceptance_rate": 5 / 8,
        "acceptance_histogram": [0, 1, 0, 0, 1],
        "num_spec_steps": 2,
        "num_draft_tokens": 8,
        "num_accepted_draft_tokens": 5,
        "num_spec_tokens": 4,
    }
    assert answer["metrics"]["cascade"] == {
        "rule": "exact",
        "alpha": 0.0,
        "drafter": "model:some/where/tiny drafter",
        "deferred_tokens": 1,
        "lossy_kept_tokens": 2,
        "target_calls": 9,
        "drafter_calls": 7,
    }
    latency = answer["metrics"]["latency"]
    assert latency["queue_ms"] == 2
    assert latency["time_to_first_token_ms"] >= 2
    assert latency["generation_ms"] == pytest.approx(2 * latency["mean_itl_ms"])
    assert latency["tokens_per_second"] == pytest.approx(8000 / (latency["time_to_first_token_ms"] + latency["generation_ms"]))


async def test_rounds_behind_a_stop_string_count_nowhere(served: Served, tokenizer: TextTokenizer) -> None:
    ids = tuple(tokenizer.encode("xyz!x"))
    assert len(ids) == 5
    served.answer_with(parts=[Part(ids, Round(4, 4, 0, 0b1001)), drafted(4, 4)], at_once=True)
    metrics = (await served.complete(stop="y", speculation={"max_draft": 9})).json()["metrics"]
    assert metrics["speculative_decoding"]["acceptance_histogram"] == [0, 0, 1, 0, 0]
    assert metrics["speculative_decoding"]["num_draft_tokens"] == 2
    assert metrics["cascade"]["lossy_kept_tokens"] == 1


async def test_no_speculative_numbers_where_there_are_none(served: Served) -> None:
    assert (await served.complete()).json()["metrics"]["speculative_decoding"] is None
    served.answer_with(parts=[drafted(1, 2)])
    assert (await served.complete(n=2)).json()["metrics"]["speculative_decoding"] is None
    short = (await served.complete(model="tiny:short")).json()["metrics"]["speculative_decoding"]
    assert (short["num_spec_tokens"], short["acceptance_histogram"]) == (2, [0, 1, 0])


async def test_metrics_ride_on_the_usage_chunk(served: Served) -> None:
    served.answer_with(parts=[drafted(1, 2)])
    chunks = chunks_of(await served.chat(stream=True, stream_options={"include_usage": True}))
    assert chunks[-1]["metrics"]["speculative_decoding"]["num_spec_steps"] == 1
    assert all(chunk["usage"] is None and "metrics" not in chunk for chunk in chunks[:-1])
    assert all("usage" not in chunk for chunk in chunks_of(await served.chat(stream=True)))


# ---------------------------------------------------------------------- what is ignored, and what is not implemented
async def test_ignored_fields_are_named(served: Served) -> None:
    fields = {"metadata": {"a": "b"}, "user": "me", "store": None, "no_such": 1, "ü, b\r\n": 2, "stream": False}
    messages = [{"role": "user", "content": "hello", "name": "me", "tag": 1, "refusal": None}]
    response = await served.chat(messages=messages, **fields)
    assert response.status_code == 200
    assert response.headers["x-cascade-ignored"] == "metadata,user,no_such,%C3%BC%2C%20b%0D%0A,messages.tag"
    assert "x-cascade-ignored" not in (await served.chat(user=None)).headers
    many = await served.chat(**{f"unknown_{i}": i for i in range(1000)}, stream=True)
    assert len(many.headers["x-cascade-ignored"]) < 1100
    assert (await served.chat(**{"x" * 5000: 1})).headers["x-cascade-ignored"] == "x" * 64


async def test_each_ignored_field_is_logged_once(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "server.openai.convert")
    for number in range(300):
        await served.chat(user="me", **{f"made_up\n{number}": 1})
    lines = [record.getMessage() for record in caplog.records]
    assert sum("The field user " in line for line in lines) == 1
    assert len(lines) == 256, "a client that makes names up does not fill the log"
    assert not any("\n" in line for line in lines)


async def test_a_deployment_may_refuse_fields_that_change_nothing(folder: Path) -> None:
    async with serve(folder, make_deployment(unused_fields="refuse")) as served:
        assert error_of(await served.chat(user="me"), 400)["param"] == "user"
        assert error_of(await served.chat(no_such=1), 400)["param"] == "no_such"
        assert (await served.chat(user=None, top_logprobs=0)).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("suffix", "x"),
        ("moderation", {}),
        ("audio", {}),
    ],
)
async def test_not_implemented(served: Served, field: str, value: Any) -> None:
    error = error_of(await served.chat(**{field: value}), 400)
    assert error["param"] == field
    assert field in error["message"]
    assert error_of(await served.complete(**{field: value}), 400)["param"] == field


async def test_fields_of_the_other_endpoint_are_not_ignored(served: Served) -> None:
    ours: tuple[tuple[str, Any], ...] = (("echo", True), ("best_of", 2))
    theirs: tuple[tuple[str, Any], ...] = (("top_logprobs", 1), ("continue_final_message", True), ("chat_template_kwargs", {"x": 1}))
    for field, value in ours:
        assert error_of(await served.chat(**{field: value}), 400)["param"] == field
    for field, value in theirs:
        assert error_of(await served.complete(**{field: value}), 400)["param"] == field


async def test_neutral_values_are_served(served: Served) -> None:
    neutral: dict[str, Any] = {
        "logprobs": None,
        "top_logprobs": None,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "logit_bias": {},
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "prediction": None,
        "suffix": None,
        "echo": False,
        "best_of": 1,
        "audio": None,
        "n": 1,
    }
    for response in (await served.chat(**neutral), await served.complete(**neutral)):
        assert response.status_code == 200
        assert "x-cascade-ignored" not in response.headers


# ---------------------------------------------------------------------- errors
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
