"""What an answer's text holds, and the numbers that go with it."""

from __future__ import annotations

from pathlib import Path

import pytest

import server.detokenize
from engine.errors import QueueFull
from engine.request import FinishReason, Round
from server.text import TextTokenizer
from tests.fakes import Part
from tests.server.conftest import Served, chunks_of, error_of, serve


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
