"""What a chat's answer is held to where structure, tools and thinking meet: what the grammar that reaches the engine lets through."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from engine.request import FinishReason
from server.structure import with_start
from tests.fakes import Part
from tests.server.conftest import TEMPLATE, Served, error_of, serve, write_folder
from tests.server.test_tool_grammar import PLAIN, Checker

TOOLS: Any = [{"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "additionalProperties": False}}}]
CALL = '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>'
NUMBER: Any = {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}}}}


@pytest.fixture
async def calling(tmp_path: Path) -> AsyncIterator[Served]:
    """A model whose template knows tools."""
    async with serve(write_folder(tmp_path, TEMPLATE + "{%- if tools %}<tool_call>{% endif %}")) as served:
        yield served


@pytest.fixture
async def thinking(tmp_path: Path) -> AsyncIterator[Served]:
    """One that thinks, too."""
    async with serve(
        write_folder(tmp_path, TEMPLATE + "{%- if tools %}<tool_call>{% endif %}{% if false %}<think></think>{% endif %}")
    ) as it:
        yield it


async def held(served: Served, **fields: Any) -> Checker:
    assert (await served.chat(**fields)).status_code == 200
    return Checker(PLAIN, served.engine.requests[-1].grammar)


async def test_an_answer_calls_or_has_the_structure(calling: Served) -> None:
    grammar = await held(calling, tools=TOOLS, **NUMBER)
    assert grammar.takes("42")
    assert grammar.takes(CALL)
    assert not grammar.takes("a text")
    assert not grammar.takes(f"42{CALL}")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "clock"}}])
async def test_who_must_call_writes_no_structure(calling: Served, choice: Any) -> None:
    wishes: tuple[dict[str, Any], ...] = ({}, NUMBER)
    for fields in wishes:
        grammar = await held(calling, tools=TOOLS, tool_choice=choice, **fields)
        assert grammar.takes(CALL)
        assert not grammar.takes("42")
        assert not grammar.takes(CALL.replace("clock", "other"))


async def test_who_may_not_call_has_the_structure_alone(calling: Served) -> None:
    grammar = await held(calling, tools=TOOLS, tool_choice="none", **NUMBER)
    assert grammar.takes("42")
    assert not grammar.takes(CALL)


async def test_thinking_stands_in_front_of_either(thinking: Served) -> None:
    wishes: tuple[dict[str, Any], ...] = (NUMBER, {"tools": TOOLS, **NUMBER})
    for fields in wishes:
        grammar = await held(thinking, **fields)
        assert grammar.takes("<think>let me see: 41?</think>\n42")
        assert grammar.takes("42")
        assert not grammar.takes("<think>let me see</think>\nwell")
        assert grammar.takes(f"<think>hm</think>\n{CALL}") == ("tools" in fields)
    open_ = await held(thinking, regex="a+b")
    assert open_.takes("<think>b</think>aab")
    assert not open_.takes("<think>b</think>b")
    assert not (await held(thinking, guided_choice=["start", "stop"])).takes("<think></think>thought")
    assert (await held(thinking, guided_grammar='start: thought THOUGHT\nthought: "x"\nTHOUGHT: "y"')).takes("<think>b</think>xy")
    error = error_of(await thinking.chat(guided_grammar='start: cascade_head\ncascade_head: "x"'), 400)
    assert "together with" in error["message"], "and not in the middle of an answer"


async def test_a_grammar_of_ones_own_cannot_go_with_tools(calling: Served) -> None:
    error = error_of(await calling.chat(tools=TOOLS, grammar='root ::= "a"'), 400)
    assert error["param"] == "grammar"
    assert (await calling.chat(tools=TOOLS, tool_choice="none", grammar='root ::= "a"')).status_code == 200


async def test_tools_that_cannot_be_held_to_are_refused(calling: Served) -> None:
    strict = {"name": "f", "strict": True, "parameters": {"type": "object", "properties": {"x": {"type": "array", "uniqueItems": True}}}}
    error = error_of(await calling.chat(tools=[{"type": "function", "function": strict}]), 400)
    assert error["param"] == "tools"
    assert "uniqueItems" in error["message"]


def test_only_the_rule_is_renamed() -> None:
    grammar = 'start: "start" /start\\/start/ again // start\nagain: start? "a\\"start"\nrestart: "b"\n'
    want = 'other: "start" /start\\/start/ again // start\nagain: other? "a\\"start"\nrestart: "b"\n'
    assert with_start(grammar, "other") == want


@pytest.mark.parametrize(
    ("fields", "params"),
    [
        ({"tool_choice": "required"}, ["tools"]),
        ({"tool_choice": "required", **NUMBER}, ["tools"]),
        (NUMBER, ["response_format.json_schema.schema", "tools"]),
        ({"tool_choice": "none", **NUMBER}, ["response_format.json_schema.schema"]),
    ],
)
async def test_a_grammar_that_gets_too_complex_names_who_asked(calling: Served, fields: Any, params: list[str]) -> None:
    calling.answer_with(parts=[Part(())], finish=FinishReason.ERROR)
    error = error_of(await calling.chat(tools=TOOLS, **fields), 400)
    assert error["message"].startswith(f"What {' and '.join(params)} asked of the answer became too complex")
    assert error["param"] == params[0]
