"""Log-probabilities of prompts: `echo` with `logprobs`, as OpenAI's completions had them and as evaluation programs ask for them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from engine.request import FinishReason
from server.detokenize import beginnings
from server.openai import answer, convert
from server.text import TextTokenizer
from tests.fakes import Part
from tests.server.conftest import Served, build_tokenizer, chunks_of, error_of, serve

IDS = [[70, 71, 72, 73], [74, 75]]  # letters, and the made-up log-probability of a token is minus its id


def ids_of(served: Served, text: str) -> list[int]:
    ids: list[int] = served.tokenizer.encode(text, add_special_tokens=False).ids
    return ids


async def test_the_prompts_tokens_stand_in_front_of_the_answers(both: Served) -> None:
    both.answer_with(parts=[Part((75, 79)), Part((77,)), Part((2,))], finish=FinishReason.STOP)
    said = await both.openai.completions.create(model="tiny", prompt="hello world", echo=True, logprobs=2)
    (choice,) = said.choices
    logprobs, ids = choice.logprobs, ids_of(both, "hello world")
    assert choice.text.startswith("hello world")
    assert logprobs is not None
    assert logprobs.tokens is not None
    assert logprobs.text_offset is not None
    assert logprobs.token_logprobs == [None, *(-float(token) for token in [*ids[1:], 75, 79, 77, 2])]
    tops: list[Any] = logprobs.top_logprobs or []
    assert tops[0] is None
    assert all(set(top.values()) == {own, 0, -1} for own, top in zip(logprobs.token_logprobs[1:], tops[1:], strict=True))
    assert logprobs.text_offset[0] == 0
    ends = [*logprobs.text_offset[1:], len(choice.text)]
    pieces = [choice.text[begin:end] for begin, end in zip(logprobs.text_offset, ends, strict=True)]
    assert pieces[:-1] == logprobs.tokens[:-1]
    assert pieces[-1] == "", "the end token has no text"
    assert both.engine.requests[0].sampling.num_prompt_logprobs == 2


@pytest.mark.parametrize("prompt", ["hello world", ["hello", "the fox"], IDS[0], IDS])
@pytest.mark.parametrize("max_tokens", [0, 1, 3])
async def test_a_stream_says_the_same(both: Served, prompt: Any, max_tokens: int) -> None:
    fields = {"prompt": prompt, "n": 2, "echo": True, "logprobs": 1, "max_tokens": max_tokens}
    whole = (await both.complete(**fields)).json()["choices"]
    streamed: list[dict[str, Any]] = [{"text": "", "logprobs": {}, "finish_reason": None} for _ in whole]
    for chunk in chunks_of(await both.complete(stream=True, **fields)):
        for piece in chunk["choices"]:
            choice = streamed[piece["index"]]
            choice["text"] += piece["text"]
            choice["finish_reason"] = piece["finish_reason"]
            for key, values in (piece["logprobs"] or {}).items():
                choice["logprobs"].setdefault(key, []).extend(values)
    assert streamed == [{key: choice[key] for key in ("text", "logprobs", "finish_reason")} for choice in whole]
    if max_tokens == 0:
        assert {choice["finish_reason"] for choice in whole} == {"length"}
        assert not any(request.speculation.enabled for request in both.engine.requests), "no drafter follows what nobody writes on"


async def test_the_likeliest_answer_with_its_prompt(served: Served) -> None:
    served.answer_with(parts=[Part(())], by_choice=[(79, 79), (75, 75, 75), (77,)])
    (choice,) = (await served.complete(IDS[0], best_of=3, echo=True, logprobs=0)).json()["choices"]
    assert choice["logprobs"]["token_logprobs"] == [None, -71, -72, -73, -75, -75, -75]


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("says_end", [False, True])
async def test_what_an_evaluation_asks_for(served: Served, max_tokens: int, says_end: bool) -> None:
    """lm-evaluation-harness' request for log-likelihoods, and its reading of the response: the answer's token is cut off the end."""
    served.answer_with(parts=[Part((2 if says_end else 79,))], finish=FinishReason.STOP if says_end else FinishReason.LENGTH)
    body = {"model": "tiny", "prompt": IDS, "temperature": 0, "max_tokens": max_tokens, "logprobs": 1, "seed": 1234, "echo": True}
    choices = (await served.http.post("/v1/completions", json=body)).json()["choices"]
    for choice, ids, num_context in zip(sorted(choices, key=lambda choice: choice["index"]), IDS, (2, 1), strict=True):
        end = -1 if max_tokens else None
        logprobs, tops = (choice["logprobs"][key][num_context:end] for key in ("token_logprobs", "top_logprobs"))
        assert sum(logprobs) == -sum(ids[num_context:])
        assert [own == max(top.values()) for own, top in zip(logprobs, tops, strict=True)] == [False] * len(ids[num_context:])
    usage = (await served.http.post("/v1/completions", json=body)).json()["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (6, 2 * max_tokens)


async def test_nothing_is_scored_that_nobody_asked_about(served: Served) -> None:
    for fields in ({"echo": True}, {"logprobs": 1}, {"echo": True, "best_of": 2}):
        assert (await served.complete(**fields)).status_code == 200
    assert [request.sampling.num_prompt_logprobs for request in served.engine.requests] == [None] * 3
    (choice,) = (await served.complete(echo=True)).json()["choices"]
    assert choice["logprobs"] is None


async def test_the_first_delivery_is_that_of_an_answer(served: Served) -> None:
    """A prompt's scores come step by step; to whoever waits, nothing has begun."""
    served.answer_with(parts=[Part((75,))], delay=0.02)
    metrics = (await served.complete("hello world", echo=True, logprobs=0)).json()["metrics"]["latency"]
    assert metrics["time_to_first_token_ms"] >= 20 * len(ids_of(served, "hello world"))
    assert metrics["generation_ms"] == 0


async def test_no_tokens_are_a_wish_of_completions_alone(served: Served) -> None:
    assert error_of(await served.chat(max_tokens=0), 400)["param"] == "max_tokens"
    said = (await served.complete(max_tokens=0)).json()
    assert said["choices"] == [{"index": 0, "text": "", "logprobs": None, "finish_reason": "length"}]
    assert error_of(await served.complete(max_tokens=0, min_tokens=1), 400)["param"] == "min_tokens"


@pytest.mark.parametrize("prompt", [[3, 1020], [10**9], [0] * 600, ""])
async def test_prompts_that_cannot_be_run(served: Served, prompt: Any) -> None:
    response = await served.complete(prompt, echo=True, logprobs=1)
    if prompt == [3, 1020]:  # no token of the tokenizer, but a row of the model's
        assert response.json()["choices"][0]["logprobs"]["text_offset"][0] == 0
    else:
        assert error_of(response, 400)
    assert all(token < 1024 for token in served.app.state.serving.tokenizer._token_texts), "a client's numbers would fill the memory"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_response_has_so_many_log_probabilities_of_prompts(served: Served, monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    monkeypatch.setattr(convert, "MAX_SCORED", 60)
    fields: dict[str, Any] = {"prompt": IDS, "n": 2, "max_tokens": 1, "stream": stream}  # 6 tokens in all
    assert (await served.complete(echo=True, logprobs=4, **fields)).status_code == 200
    refused = error_of(await served.complete(echo=True, logprobs=5, **fields), 400)
    assert refused["param"] == "logprobs"
    assert refused["message"].startswith("72 log-probabilities of prompts were asked for")
    assert (await served.complete(logprobs=20, **fields)).status_code == 200, "of the answers alone"


# ---------------------------------------------------------------------- where tokens begin
@pytest.mark.parametrize("text", ["hello world", "🦊 the fox é", "<|im_start|>user\nhello<|im_end|>", " two  spaces\n"])
def test_tokens_begin_where_their_text_does(text: str) -> None:
    tokenizer = TextTokenizer(build_tokenizer(add_bos=True).to_str())
    ids = tokenizer.encode(text)
    pieces = [tokenizer.token_text(token_id)[0] for token_id in ids]
    begins = beginnings(text, pieces)
    assert begins[:2] == [0, 0], "the BOS is no part of the text"
    assert begins == sorted(begins)
    whole = [(piece, begin) for piece, begin in zip(pieces[1:], begins[1:], strict=True) if "\ufffd" not in piece]
    assert whole
    assert all(text.startswith(piece, begin) for piece, begin in whole)


def test_a_text_that_was_changed_loses_its_place_only_for_a_while() -> None:
    assert beginnings("Hello world", [" Hello", " world"]) == [0, 5], "decoders take the first space"
    assert beginnings("ABC def ghi", ["abc", " def", " ghi"]) == [0, 3, 7], "a normalizer writes small letters"
    assert beginnings("", []) == [0]


async def test_parts_of_characters_can_be_told_apart(served: Served) -> None:
    """Else a likelier token with another part would be taken for the prompt's own, and an evaluation for a sure answer."""
    ids = ids_of(served, "🦊")
    assert len(ids) == 4
    (choice,) = (await served.complete("🦊", echo=True, logprobs=1, max_tokens=0)).json()["choices"]
    names = [f"bytes:\\x{byte:02x}" for byte in "🦊".encode()]
    assert choice["logprobs"]["tokens"] == names
    assert choice["logprobs"]["text_offset"] == [0] * 4
    for own, name, top in zip(ids[1:], names[1:], choice["logprobs"]["top_logprobs"][1:], strict=True):
        assert len(top) == 2
        assert top[name] == -own


async def test_a_long_prompts_response_is_written_in_a_thread_and_is_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads, body_of = list[str](), answer._body

    def noted(*args: Any) -> Any:
        threads.append(threading.current_thread().name)
        body = body_of(*args)
        assert isinstance(body, bytes), "nothing is left to be written outside of the thread"
        return body

    monkeypatch.setattr(answer, "_body", noted)
    async with serve(folder, max_model_len=2000) as served:
        served.answer_with(at_once=True)
        prompts = [[70 + i % 20 for i in range(num)] for num in (300, 1200)]
        short, long = [
            (await served.complete(prompt, echo=True, logprobs=0, max_tokens=0)).json()["choices"][0]["logprobs"] for prompt in prompts
        ]
    assert [name == threading.main_thread().name for name in threads] == [True, False]
    assert all(long[key][:300] == short[key] for key in short)
