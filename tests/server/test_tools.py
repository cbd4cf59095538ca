"""Tools over the API, with templates in the manner of each family: what calls become, and whether there may be any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai import pydantic_function_tool
from openai.types.chat import ChatCompletion
from pydantic import BaseModel

from engine.errors import ConfigError
from engine.request import FinishReason
from server.dialect import dialect_of
from server.openai.convert import chat_job
from server.openai.schema import ChatBody
from tests.fakes import Part
from tests.server.conftest import TEMPLATE, USER, Served, chunks_of, error_of, make_deployment, serve, write_folder
from tests.server.families import CALLS, CITY, CLOCK, MARKS, SAID, TEMPLATES, TOOL, TOOLS


def called(answer: ChatCompletion, choice: int = 0) -> list[tuple[str, str]]:
    return [
        (call.function.name, call.function.arguments) for call in answer.choices[choice].message.tool_calls or [] if call.type == "function"
    ]


# ---------------------------------------------------------------------- what comes back
@pytest.mark.parametrize("form", sorted(TEMPLATES))
@pytest.mark.parametrize("marks", [(), MARKS], ids=["marks are text", "marks are special tokens"])
@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_calls_of_each_family(form: str, marks: tuple[str, ...], size: int, tmp_path: Path) -> None:
    async with serve(write_folder(tmp_path, TEMPLATES[form], marks)) as served:
        served.say(SAID[form], size=size)
        whole = await served.openai.chat.completions.create(model="tiny", messages=USER, tools=TOOLS)
        assert called(whole) == CALLS
        assert whole.choices[0].finish_reason == "tool_calls"
        assert whole.choices[0].message.content == ("Let me see." if SAID[form].startswith("Let") else None)
        ids = {call.id for call in whole.choices[0].message.tool_calls or []}
        assert len(ids) == 2
        async with served.openai.chat.completions.stream(model="tiny", messages=USER, tools=TOOLS) as stream:
            streamed = await stream.get_final_completion()
        assert called(streamed) == CALLS
        assert streamed.choices[0].finish_reason == "tool_calls"
        assert (streamed.choices[0].message.content or None) == whole.choices[0].message.content
        tokens = served.tokenizer.encode(SAID[form], add_special_tokens=False).ids
        assert whole.usage is not None
        assert whole.usage.completion_tokens == len(tokens) + 1, "marks, names and the end count as they always do"
        assert whole.usage.completion_tokens_details is None


async def test_a_call_is_streamed_as_openai_streams_it(hermes: Served) -> None:
    """Who is called first, with empty arguments, then these piece by piece; never a part of a mark; one finish reason."""
    hermes.say(SAID["hermes"])
    chunks = chunks_of(await hermes.chat(tools=TOOLS, stream=True))
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content") or "" for delta in deltas) == "Let me see."
    entries = [entry for delta in deltas for entry in delta.get("tool_calls", [])]
    first = next(entry for entry in entries if entry["index"] == 0)
    assert first == {"index": 0, "id": first["id"], "type": "function", "function": {"name": "get_weather", "arguments": ""}}
    pieces = [entry["function"]["arguments"] for entry in entries if entry["index"] == 0]
    assert "".join(pieces) == CITY
    assert len(pieces) > 5
    assert all(set(entry) == {"index", "function"} for entry in entries if "id" not in entry)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks if chunk["choices"][0]["finish_reason"]] == ["tool_calls"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


async def test_arguments_are_sent_while_the_model_writes(hermes: Served) -> None:
    text = '<tool_call>\n{"name": "clock", "arguments": {"a": "' + "x" * 40
    hermes.say(text, FinishReason.LENGTH)
    chunks = chunks_of(await hermes.chat(tools=TOOLS, stream=True))
    sent = [entry for chunk in chunks for entry in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert len(sent) > 20
    assert "".join(entry["function"]["arguments"] for entry in sent) == '{"a": "' + "x" * 40
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    whole = (await hermes.chat(tools=TOOLS)).json()["choices"][0]
    assert whole["message"]["tool_calls"][0]["function"]["arguments"] == '{"a": "' + "x" * 40
    assert whole["finish_reason"] == "length"


async def test_what_is_no_call_is_content(hermes: Served) -> None:
    for text in ("<tool_call>\n{'name': 'clock'}\n</tool_call>", '<tool_call>{"name": "other"}</tool_call>', "1 < 2 <tool_", "\n "):
        hermes.say(text)
        choice = (await hermes.chat(tools=TOOLS)).json()["choices"][0]
        assert choice["message"] == {"role": "assistant", "content": text, "refusal": None}
        assert choice["finish_reason"] == "stop"
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks_of(await hermes.chat(tools=TOOLS, stream=True))]
        assert "".join(delta.get("content", "") for delta in deltas) == text
        assert not any("tool_calls" in delta for delta in deltas)


async def test_arguments_that_break_are_content_where_nothing_was_sent_yet(hermes: Served) -> None:
    text = '<tool_call>{"name": "clock", "arguments": {"a": oops}}</tool_call>'
    hermes.say(text)
    choice = (await hermes.chat(tools=TOOLS)).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks_of(await hermes.chat(tools=TOOLS, stream=True))]
    sent = [entry["function"]["arguments"] for delta in deltas for entry in delta.get("tool_calls", [])]
    assert "".join(sent) == '{"a": oops}}'


async def test_several_answers_have_calls_of_their_own(hermes: Served) -> None:
    encode = hermes.tokenizer.encode
    texts = ['<tool_call>{"name": "clock"}</tool_call>', "It is noon.", SAID["hermes"]]
    hermes.answer_with(parts=[Part(())], by_choice=[(*encode(text).ids, 2) for text in texts], finish=FinishReason.STOP)
    answer = await hermes.openai.chat.completions.create(model="tiny", messages=USER, tools=TOOLS, n=3)
    assert [called(answer, i) for i in range(3)] == [[("clock", "{}")], [], CALLS]
    assert [choice.finish_reason for choice in answer.choices] == ["tool_calls", "stop", "tool_calls"]
    assert [choice.message.content for choice in answer.choices] == [None, "It is noon.", "Let me see."]


async def test_details_of_tokens_are_those_of_the_raw_answer(hermes: Served) -> None:
    text = SAID["hermes"]
    hermes.say(text)
    fields: dict[str, Any] = {"tools": TOOLS, "logprobs": True, "speculation": {"provenance": True}}
    choice = (await hermes.chat(**fields)).json()["choices"][0]
    assert "".join(token["token"] for token in choice["logprobs"]["content"] if token["bytes"][:1] < [128]).isascii()
    assert b"".join(bytes(token["bytes"]) for token in choice["logprobs"]["content"]).decode() == text
    assert "".join(token["text"] for token in choice["provenance"]) == text
    streamed = [chunk["choices"][0] for chunk in chunks_of(await hermes.chat(**fields, stream=True))]
    assert [token for piece in streamed if piece["logprobs"] for token in piece["logprobs"]["content"]] == choice["logprobs"]["content"]
    assert [token for piece in streamed for token in piece.get("provenance", [])] == choice["provenance"]


async def test_a_stop_string_ends_calls_as_well(hermes: Served) -> None:
    hermes.say(SAID["hermes"])
    choice = (await hermes.chat(tools=TOOLS, stop="</tool_call>")).json()["choices"][0]
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["get_weather"]
    assert choice["finish_reason"] == "tool_calls"


class Weather(BaseModel):
    """The weather of a city."""

    city: str


async def test_a_client_may_have_arguments_parsed(hermes: Served) -> None:
    hermes.say(f'<tool_call>{{"name": "Weather", "arguments": {CITY}}}</tool_call>')
    tools = [pydantic_function_tool(Weather)]
    answer = await hermes.openai.chat.completions.parse(model="tiny", messages=USER, tools=tools)
    calls = answer.choices[0].message.tool_calls
    assert calls
    assert calls[0].function.parsed_arguments == Weather(city="Köln")


# ---------------------------------------------------------------------- whether there may be calls
async def test_why_an_answer_with_calls_ended(hermes: Served) -> None:
    """A client that named the function need not be told."""
    hermes.say('<tool_call>{"name": "clock"}</tool_call>')
    named = {"type": "function", "function": {"name": "clock"}}
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named]}}
    for choice, reason in (
        ("auto", "tool_calls"),
        (None, "tool_calls"),
        ("required", "tool_calls"),
        (named, "stop"),
        (allowed, "tool_calls"),
    ):
        answer = (await hermes.chat(tools=TOOLS, tool_choice=choice)).json()["choices"][0]
        assert [call["function"]["name"] for call in answer["message"]["tool_calls"]] == ["clock"]
        assert answer["finish_reason"] == reason


async def test_no_call_is_looked_for_where_none_may_be(hermes: Served) -> None:
    text = '<tool_call>{"name": "clock"}</tool_call>'
    hermes.say(text)
    none: dict[str, Any] = {"tools": TOOLS, "tool_choice": "none"}
    harmless: tuple[dict[str, Any], ...] = ({}, {"tools": []}, none, {"tool_choice": "auto"}, {"parallel_tool_calls": True})
    for fields in harmless:
        choice = (await hermes.chat(**fields)).json()["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
        assert "TOOL" not in hermes.prompt(), "what may not be called is not told of"
    only = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "get_weather"}}]},
    }
    choice = (await hermes.chat(tools=TOOLS, tool_choice=only)).json()["choices"][0]
    assert choice["message"]["content"] == text
    assert "clock" in hermes.prompt(), "the prompt stays as it was"


async def test_what_an_answer_must_obey(hermes: Served) -> None:
    """The grammar of a job, which is for whoever hands jobs to the engine."""
    strict = {"type": "function", "function": {**TOOL["function"], "strict": True}}
    named = {"type": "function", "function": {"name": "clock"}}

    async def grammar(**fields: Any) -> str | None:
        job = await chat_job(ChatBody.model_validate({"model": "tiny", "messages": USER, **fields}), hermes.app.state.serving)
        return job.requests[0].grammar

    assert await grammar() is None
    assert await grammar(tools=TOOLS) is None
    assert await grammar(tools=TOOLS, tool_choice="none") is None
    wishes: tuple[dict[str, Any], ...] = (
        {"tool_choice": "required"},
        {"tool_choice": named},
        {"parallel_tool_calls": False},
        {"tools": [strict]},
        {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [named]}}},
    )
    for fields in wishes:
        text = await grammar(**{"tools": TOOLS, **fields})
        assert text is not None
        assert text.startswith("start: ")
        assert ("get_weather" in text) == ("clock" not in json.dumps(fields)), fields


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOL, TOOL]}, "tools"),
        ({"tools": [CLOCK] * 129}, "tools"),
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools.0.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "x" * 65}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "function", "function": {"name": "x", "parameters": []}}]}, "tools.0.function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "x", "parameters": {"type": "string"}}}]}, "tools.0.function.parameters"),
        ({"tools": [{"type": "function", "function": {"name": "x", "strict": "yes"}}]}, "tools.0.function.strict"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls"),
    ],
)
async def test_tools_that_cannot_be(hermes: Served, fields: dict[str, Any], param: str) -> None:
    assert error_of(await hermes.chat(**fields), 400)["param"] == param
    assert not hermes.engine.requests


async def test_parameters_may_be_deep_and_not_bottomless(hermes: Served) -> None:
    def nested(levels: int) -> Any:
        schema: Any = {"type": "string"}
        for _ in range(levels):
            schema = {"type": "object", "properties": {"x": schema}}
        return [{"type": "function", "function": {"name": "f", "parameters": schema}}]

    assert (await hermes.chat(tools=nested(10), max_tokens=1)).status_code == 200
    error_of(await hermes.chat(tools=nested(40)), 400)
    infinite = json.dumps({"model": "tiny", "messages": USER, "tools": nested(0)}).replace('"string"', '"object", "maximum": 1e999')
    assert error_of(await hermes.http.post("/v1/chat/completions", content=infinite), 400)["param"] == "tools.0.function.parameters"


async def test_a_deployment_says_the_form(tmp_path: Path) -> None:
    async with serve(write_folder(tmp_path, TEMPLATES["json"]), make_deployment(tool_format="hermes")) as served:
        served.say(SAID["hermes"])
        assert (await served.chat(tools=TOOLS)).json()["choices"][0]["finish_reason"] == "tool_calls"
    async with serve(tmp_path, make_deployment(tool_format="none")) as served:
        assert error_of(await served.chat(tools=TOOLS), 400)["param"] == "tools"
        assert (await served.chat(tools=TOOLS, tool_choice="none")).status_code == 200
    unreadable = "{% if tools %}<tool_call><function=f>{% endif %}"
    assert dialect_of(unreadable).tools is None, "better refused than misread"
    with pytest.raises(ConfigError, match=r"server\.tool_format: llama3"):
        dialect_of(TEMPLATE, "llama3")
    assert dialect_of(None, "hermes").tools is None
