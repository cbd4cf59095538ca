"""Fields that shape an answer: what changes logits, what ends it, how a conversation is rendered, how likely tokens were."""

from __future__ import annotations

from typing import Any

import pytest

from engine.request import FinishReason
from server.text import TextTokenizer
from tests.fakes import Part
from tests.server.conftest import USER, Served, chunks_of, error_of


# ---------------------------------------------------------------------- what changes logits, and what ends an answer
async def test_what_changes_logits_reaches_the_engine(served: Served) -> None:
    fields = {
        "frequency_penalty": -1,
        "presence_penalty": 0.5,
        "repetition_penalty": 1.2,
        "min_tokens": 3,
        "logit_bias": {"7": -100, "2": 1.5},
    }
    for response in (await served.chat(**fields), await served.complete(**fields)):
        assert response.status_code == 200
        assert "x-cascade-ignored" not in response.headers
    for request in served.engine.requests:
        sampling = request.sampling
        assert (sampling.frequency_penalty, sampling.presence_penalty, sampling.repetition_penalty) == (-1, 0.5, 1.2)
        assert (sampling.min_tokens, sampling.logit_bias) == (3, {7: -100, 2: 1.5})


async def test_which_tokens_end_an_answer(served: Served) -> None:
    for fields in ({}, {"stop_token_ids": [5]}, {"ignore_eos": True, "stop_token_ids": [5, 5]}, {"ignore_eos": True}):
        await served.chat(**fields)
    own = served.engine.info.end_token_ids
    assert [request.sampling.stop_token_ids for request in served.engine.requests] == [own, (*own, 5), (5,), ()]


async def test_a_stop_string_counts_behind_the_least_length(served: Served) -> None:
    """Even where it begins in front of it."""
    served.answer_with(parts=[Part((5,)), Part((9,)), Part((7,))])
    texts = (await served.complete(logprobs=0)).json()["choices"][0]["logprobs"]["tokens"]

    async def written(**fields: Any) -> str:
        text: str = (await served.complete(**fields)).json()["choices"][0]["text"]
        return text

    assert await written(stop=texts[0]) == ""
    assert await written(stop=texts[0], min_tokens=1) == "".join(texts)
    assert await written(stop=texts[0] + texts[1], min_tokens=1) == ""
    assert await written(stop=texts[1], min_tokens=1, include_stop_str_in_output=True) == texts[0] + texts[1]


# ---------------------------------------------------------------------- how a conversation is rendered
async def test_a_message_is_written_on(served: Served) -> None:
    messages = [*USER, {"role": "assistant", "content": "the "}]
    written = (await served.chat(messages=messages, continue_final_message=True, add_generation_prompt=False)).json()
    assert written["choices"][0]["message"]["content"].endswith("assistant\nthe "), "the fake engine repeats the prompt"
    open_ = (await served.chat(messages=messages, add_generation_prompt=False)).json()
    assert open_["choices"][0]["message"]["content"].endswith("the \n")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"continue_final_message": True}, "messages"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs.tools"),
        ({"chat_template_kwargs": {"self": 1}}, "messages"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
    ],
)
async def test_wishes_for_the_template_that_cannot_be(served: Served, fields: dict[str, Any], param: str) -> None:
    assert error_of(await served.chat(**fields), 400)["param"] == param


async def test_variables_for_the_template_may_not_be_bottomless_or_unreadable(served: Served) -> None:
    value: Any = 1
    for _ in range(40):
        value = [value]
    assert error_of(await served.chat(chat_template_kwargs={"x": value}), 400)["param"] == "chat_template_kwargs"
    half = b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {"x": ["\\ud800"]}}'
    assert error_of(await served.http.post("/v1/chat/completions", content=half), 400)["param"] == "chat_template_kwargs"
    assert (await served.chat(chat_template_kwargs={"enable_thinking": False})).status_code == 200


# ---------------------------------------------------------------------- how likely tokens were
@pytest.mark.parametrize("num_top", [None, 0, 2])
async def test_logprobs_of_a_chat(both: Served, num_top: int | None) -> None:
    both.answer_with(parts=[Part((5, 9)), Part((7,)), Part((2,))], finish=FinishReason.STOP)
    fields: dict[str, Any] = {"logprobs": True} | ({} if num_top is None else {"top_logprobs": num_top})
    whole = await both.openai.chat.completions.create(model="tiny", messages=USER, **fields)
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [token.logprob for token in logprobs.content] == [-5, -9, -7], "the end token is no part of the answer"
    assert b"".join(bytes(token.bytes or []) for token in logprobs.content).decode() == whole.choices[0].message.content
    assert [[top.logprob for top in token.top_logprobs] for token in logprobs.content] == [[0, -1][: num_top or 0]] * 3
    streamed = [
        token
        async for chunk in await both.openai.chat.completions.create(model="tiny", messages=USER, stream=True, **fields)
        if chunk.choices and chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content or []
    ]
    assert streamed == logprobs.content
    assert all(chunk["choices"][0]["logprobs"] != {"content": []} for chunk in chunks_of(await both.chat(stream=True, **fields)))
    plain = await both.openai.chat.completions.create(model="tiny", messages=USER)
    assert plain.choices[0].logprobs is None


async def test_logprobs_of_a_completion(both: Served) -> None:
    both.answer_with(parts=[Part((5, 9)), Part((7,)), Part((2,))], finish=FinishReason.STOP)
    whole = await both.openai.completions.create(model="tiny", prompt="hello", logprobs=1)
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert "".join(logprobs.tokens) == whole.choices[0].text
    assert logprobs.token_logprobs == [-5, -9, -7]
    assert [sorted(top.values()) for top in logprobs.top_logprobs or []] == [[-5, 0], [-9, 0], [-7, 0]]
    offsets = [len("".join(logprobs.tokens[:i])) for i in range(3)]
    assert logprobs.text_offset == offsets
    chunks = [chunk async for chunk in await both.openai.completions.create(model="tiny", prompt="hello", logprobs=1, stream=True)]
    streamed = [offset for chunk in chunks for choice in chunk.choices if choice.logprobs for offset in choice.logprobs.text_offset or []]
    assert streamed == offsets


@pytest.mark.parametrize("prompt", ["hello", ["hello", "hi"], [5, 9], [[5, 9], [7]]])
async def test_an_echo_stands_in_front(served: Served, prompt: Any) -> None:
    served.answer_with(parts=[Part((5, 9)), Part((7,))])
    plain = (await served.complete(prompt=prompt, n=2)).json()["choices"]
    whole = (await served.complete(prompt=prompt, n=2, echo=True)).json()["choices"]
    prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    tokenizer = TextTokenizer.from_folder(served.engine.info.target_path)
    texts = [text if isinstance(text, str) else tokenizer.decode(text) for text in prompts]
    assert [choice["text"] for choice in whole] == [texts[i // 2] + choice["text"] for i, choice in enumerate(plain)]
    streamed = [""] * len(whole)
    for chunk in chunks_of(await served.complete(prompt=prompt, n=2, echo=True, stream=True)):
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == [choice["text"] for choice in whole]


async def test_the_likeliest_of_several_answers(served: Served) -> None:
    served.answer_with(parts=[Part(())], by_choice=[(9, 9), (5, 5, 5), (7,), (6, 8)])
    answer = (await served.complete(best_of=4, n=2)).json()
    plain = (await served.complete(n=4)).json()
    assert [choice["text"] for choice in answer["choices"]] == [plain["choices"][i]["text"] for i in (1, 2)]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert all(choice["logprobs"] is None for choice in answer["choices"])
    assert answer["usage"]["completion_tokens"] == plain["usage"]["completion_tokens"] == 8, "all that was written counts"
    assert len(served.engine.requests[0].choices) == 4


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 0}, "best_of"),
        ({"best_of": 128}, "best_of"),
    ],
)
async def test_wishes_for_completions_that_cannot_be(served: Served, fields: dict[str, Any], param: str) -> None:
    assert error_of(await served.complete(**fields), 400)["param"] == param
    assert error_of(await served.complete(prompt=["x"] * 5, best_of=4), 400)["param"] == "prompt"


async def test_tokens_behind_a_stop_string_have_no_logprobs(served: Served) -> None:
    served.answer_with(parts=[Part((5, 9, 7))])
    texts = (await served.complete(logprobs=0)).json()["choices"][0]["logprobs"]["tokens"]
    cut = (await served.complete(logprobs=0, stop=texts[1])).json()["choices"][0]
    assert cut["text"] == texts[0]
    assert cut["logprobs"]["tokens"] == texts[:2], "what completed the stop string was emitted, too"


async def test_top_logprobs_want_logprobs(served: Served) -> None:
    assert error_of(await served.chat(top_logprobs=2), 400)["param"] == "top_logprobs"
    assert error_of(await served.chat(top_logprobs=21, logprobs=True), 400)["param"] == "top_logprobs"
    assert (await served.chat(top_logprobs=0, logprobs=False)).status_code == 200
    assert error_of(await served.complete(logprobs=True), 400)["param"] == "logprobs"
