"""Thinking in front of answers: found in pieces of any size, counted, and told apart from content and calls."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.request import FinishReason
from server.dialect import dialect_of
from server.openai.convert import chat_job
from server.openai.schema import ChatBody
from server.reasoning import FORMATS, Phase, ThinkingSplitter, phase_behind, phase_within
from tests.fakes import Part
from tests.server.conftest import TEMPLATE, USER, Served, chunks_of, make_deployment, serve, write_folder

THINK = FORMATS["think"]
KNOWS = TEMPLATE + "{%- if false %}<think></think>{% endif %}"
OPENS = TEMPLATE.replace("assistant\\n'", "assistant\\n' + ('<think>\\n\\n</think>\\n\\n' if enable_thinking is false else '<think>\\n')")
WITH_TOOLS = KNOWS + "{%- if tools %}<tool_call>{% endif %}"
MARKS = ("<think>", "</think>")
CLOCK: Any = [{"type": "function", "function": {"name": "clock"}}]


@pytest.fixture(params=[(), MARKS], ids=["marks are text", "marks are special tokens"])
async def thinking(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Served]:
    async with serve(write_folder(tmp_path, KNOWS, request.param)) as served:
        yield served


def split(text: str, pieces: Sequence[str], phase: Phase = Phase.BEFORE) -> tuple[str, str]:
    splitter = ThinkingSplitter(THINK, phase)
    parts = [*map(splitter.push, pieces), splitter.flush()]
    assert "".join(pieces) == text
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


def naive(text: str, phase: Phase) -> tuple[str, str]:
    """With the whole text at hand."""
    if phase is Phase.BEFORE:
        if not text.lstrip().startswith("<think>"):
            return "", text
        text, phase = text.lstrip().removeprefix("<think>"), Phase.THINKING
    if phase is Phase.THINKING:
        thought, mark, content = text.partition("</think>")
        return thought.strip(), content.lstrip() if mark else ""
    return "", text.lstrip() if phase is Phase.BEHIND else text


# ---------------------------------------------------------------------- splitting
PARTS = st.lists(st.sampled_from(["<think>", "</think>", "<th", "ink>", "</", " ", "\n", "a", "<"]), max_size=12).map("".join)


@given(PARTS | st.just("<think>\nwell\n</think>\n\nyes\n"), st.data(), st.sampled_from(list(Phase)))
def test_splitting_is_as_of_the_whole_text(text: str, data: st.DataObject, phase: Phase) -> None:
    ends = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *ends, len(text)])]
    assert split(text, pieces, phase) == naive(text, phase)


@given(PARTS, st.sampled_from(list(Phase)))
def test_little_is_held_back(text: str, phase: Phase) -> None:
    splitter = ThinkingSplitter(THINK, phase)
    sent = splitter.push(text)
    told = naive(text, phase)
    for part, whole in zip(sent, told, strict=True):
        assert whole.startswith(part)
        assert len(whole[len(part) :].strip()) < len("</think>")


@pytest.mark.parametrize(
    ("pieces", "phase", "num"),
    [
        (["<think>", "a", "b", "</think>", "c", ""], Phase.BEFORE, 4),
        (["\n", "<", "think>a", "b</th", "ink>c", "d"], Phase.BEFORE, 5),
        (["a", "", "b</think>", "", "c"], Phase.THINKING, 3),
        (["a", "b", ""], Phase.THINKING, 3),
        (["a", "b"], Phase.BEFORE, 0),
        (["<thin"], Phase.BEFORE, 0),
        (["a", "</think>"], Phase.BEHIND, 0),
    ],
)
def test_tokens_of_the_thinking(pieces: list[str], phase: Phase, num: int) -> None:
    """Up to the one that completes the closing mark, however late the text comes."""
    for late in (False, True):
        splitter = ThinkingSplitter(THINK, phase)
        for piece in pieces:
            splitter.note_tokens([piece])
            splitter.push("" if late else piece)
        splitter.push("".join(pieces) if late else "")
        assert splitter.num_tokens == num


def test_where_an_answer_begins() -> None:
    assert phase_behind("assistant\n<think>\n", THINK) is Phase.THINKING
    assert phase_behind("assistant\n<think>\n\n</think>\n\n", THINK) is Phase.BEHIND
    assert phase_behind("what is <think>?\nassistant\n", THINK) is Phase.BEFORE
    assert phase_within("", THINK) is Phase.BEFORE
    assert phase_within("<think>hm", THINK) is Phase.THINKING
    assert phase_within("<think>hm</think>so", THINK) is phase_within("so", THINK) is Phase.CONTENT


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ '<think>\n' }}", "think"),
        ("{{ content.split('</think>')[-1] }}", "think"),
        ("[THINK]{{ reasoning }}[/THINK]", "mistral"),
        ("<|START_THINKING|>", "command"),
        (TEMPLATE, None),
    ],
)
def test_a_template_says_its_marks(template: str, name: str | None) -> None:
    found = dialect_of(template).reasoning
    assert (found and found.name) == name
    assert dialect_of(template, reasoning_format="none").reasoning is None
    assert dialect_of(template, reasoning_format="seed").reasoning == FORMATS["seed"]


# ---------------------------------------------------------------------- over the API
@pytest.mark.parametrize("size", [1, 5, 100])
async def test_thinking_is_told_apart(thinking: Served, size: int) -> None:
    thought = "<think>\nhello world\n</think>"
    thinking.say(f"{thought}\n\nthe fox", size=size)
    whole = await thinking.openai.chat.completions.create(model="tiny", messages=USER)
    message = whole.choices[0].message
    assert (message.content, message.model_extra) == ("the fox", {"reasoning_content": "hello world"})
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.completion_tokens_details is not None
    num = len(thinking.tokenizer.encode(thought, add_special_tokens=False).ids)
    assert whole.usage.completion_tokens_details.reasoning_tokens == num
    fields: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = chunks_of(await thinking.chat(**fields))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "hello world"
    assert "".join(delta.get("content", "") for delta in deltas) == "the fox"
    assert last["usage"] == whole.usage.model_dump(exclude_unset=True)


async def test_an_answer_without_thinking_is_as_ever(thinking: Served) -> None:
    for text in ("hello", " hello", "what is <think>?</think>", "<thi", ""):
        thinking.say(text)
        answer = (await thinking.chat()).json()
        assert answer["choices"][0]["message"] == {"role": "assistant", "content": "" if text == "what is ?" else text, "refusal": None}
        assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}


async def test_an_answer_may_end_within_its_thinking(thinking: Served) -> None:
    thinking.say("<think>hello", FinishReason.LENGTH)
    answer = (await thinking.chat()).json()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": None, "refusal": None, "reasoning_content": "hello"}
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == answer["usage"]["completion_tokens"]


async def test_a_template_may_open_the_thinking(tmp_path: Path) -> None:
    async with serve(write_folder(tmp_path, OPENS)) as served:
        served.say("hello\n</think>\n\nworld")
        message = (await served.chat()).json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("hello", "world")
        answer = (await served.chat(chat_template_kwargs={"enable_thinking": False})).json()
        prompt = served.prompt()
        response = await served.chat(reasoning_effort="none")
        assert served.prompt() == prompt
        assert "x-cascade-ignored" not in response.headers
        response = await served.chat(reasoning_effort="high")
        assert served.prompt() != prompt
        assert response.headers["x-cascade-ignored"] == "reasoning_effort", "this template knows no degrees"
        await served.chat(reasoning_effort="none", chat_template_kwargs={"enable_thinking": True})
        assert served.prompt() != prompt, "who says it by its name is heard"
        assert answer["choices"][0]["message"]["content"] == "hello\n</think>\n\nworld", "the prompt has closed the thinking"
        assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}
        begun = [*USER, {"role": "assistant", "content": "<think>hel"}]
        served.say("lo</think>world")
        message = (await served.chat(messages=begun, continue_final_message=True)).json()["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"]) == ("lo", "world")


async def test_a_client_opens_no_thinking(tmp_path: Path) -> None:
    """Not even where its words are the prompt's last ones."""
    async with serve(write_folder(tmp_path, "{{ messages[0].content }}{% if add_generation_prompt %}: {% endif %}{# <think> #}")) as served:
        served.say("lo</think>world")
        for opens in (True, False):
            answer = (await served.chat("why <think>", add_generation_prompt=opens)).json()
            assert answer["choices"][0]["message"]["content"] == "lo</think>world"


async def test_each_answer_thinks_by_itself(thinking: Served) -> None:
    encode = thinking.tokenizer.encode
    texts = ["<think>hello</think>a", "b", "<think>the"]
    thinking.answer_with(parts=[Part(())], by_choice=[tuple(encode(text).ids) for text in texts])
    answer = (await thinking.chat(n=3)).json()
    told = [(choice["message"].get("reasoning_content"), choice["message"]["content"]) for choice in answer["choices"]]
    assert told == [("hello", "a"), (None, "b"), ("the", None)]
    counted = len(encode("<think>hello</think>").ids) + len(encode("<think>the").ids)
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] == counted


@pytest.mark.parametrize(
    ("stop", "reasoning", "content"), [("wor", "hello", None), ("fox", "hello world", "the "), ("</th", "hello world", None)]
)
async def test_stop_strings_count_in_the_thinking_as_well(thinking: Served, stop: str, reasoning: str, content: str | None) -> None:
    thinking.say("<think>hello world</think>the fox")
    choice = (await thinking.chat(stop=stop)).json()["choices"][0]
    assert (choice["message"].get("reasoning_content"), choice["message"]["content"]) == (reasoning, content)
    assert choice["finish_reason"] == "stop"


async def test_thinking_in_front_of_calls(tmp_path: Path) -> None:
    """A mark within the thinking is no call."""
    async with serve(write_folder(tmp_path, WITH_TOOLS)) as served:
        call = '<tool_call>{"name": "clock"}</tool_call>'
        served.say(f"<think>so {call}?</think>\n{call}")
        answer = (await served.chat(tools=CLOCK)).json()
        message = answer["choices"][0]["message"]
        assert (message["reasoning_content"], message["content"], len(message["tool_calls"])) == (f"so {call}?", None, 1)
        assert answer["choices"][0]["finish_reason"] == "tool_calls"
        assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] > 10


async def test_a_grammar_begins_behind_the_thinking(tmp_path: Path) -> None:
    async def grammar(served: Served, **fields: Any) -> str:
        body = {"model": "tiny", "messages": USER, "tools": CLOCK, "tool_choice": "required", **fields}
        text = (await chat_job(ChatBody.model_validate(body), served.app.state.serving)).requests[0].grammar
        assert text is not None
        return text

    async with serve(write_folder(tmp_path, WITH_TOOLS)) as served:
        assert (await grammar(served)).startswith("start: (CASCADE_SPACE cascade_opening")
    opens = "{%- if tools %}{{ '<tool_call>' }}{% endif %}" + OPENS
    async with serve(write_folder(tmp_path, opens)) as served:
        assert (await grammar(served)).startswith("start: cascade_thought CASCADE_SPACE")
        closed = await grammar(served, chat_template_kwargs={"enable_thinking": False})
        assert closed.startswith("start: opening")


async def test_earlier_thinking_reaches_the_template(tmp_path: Path) -> None:
    shows = KNOWS.replace("message['content']", "(message.reasoning_content or '') + message['content']")
    async with serve(write_folder(tmp_path, shows)) as served:
        await served.chat(messages=[{"role": "assistant", "content": "b", "reasoning_content": "a<|im_end|>"}, *USER], max_tokens=1)
        assert "assistant\na<|im_end|>b<|im_end|>" in served.prompt()
        assert served.engine.requests[-1].prompt_ids.count(2) == 2, "what stands in it stays text"


async def test_a_deployment_may_leave_thinking_where_it_is(tmp_path: Path) -> None:
    async with serve(write_folder(tmp_path, KNOWS), make_deployment(reasoning_format="none")) as served:
        served.say("<think>a</think>b")
        answer = (await served.chat()).json()
        assert answer["choices"][0]["message"]["content"] == "<think>a</think>b"
        assert "completion_tokens_details" not in answer["usage"]


async def test_completions_are_not_read(thinking: Served) -> None:
    thinking.say("hello</think>")
    answer = (await thinking.complete()).json()
    assert "completion_tokens_details" not in answer["usage"]
