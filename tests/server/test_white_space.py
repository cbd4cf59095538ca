"""White space in JSON that an answer is held to: one line, lightly spaced, unless a client wishes it otherwise."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from server.grammar_checker import Checker as Asked
from server.structure import Structure, grammar_of_structure
from server.tools.formats import FORMATS, Function, ToolUse
from server.tools.grammar import tool_grammar
from tests.server.conftest import Served
from tests.server.test_held import held
from tests.server.test_tool_grammar import END, PLAIN, Checker

VALUE = {"name": "a  b", "sizes": [1, 2], "in": {"deep": {"er": None}}, "none": {}}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "sizes": {"type": "array", "items": {"type": "integer"}},
        "in": {"type": "object"},
        "none": {"type": "object"},
    },
    "required": ["name", "sizes", "in", "none"],
    "additionalProperties": False,
}
COMPACT = json.dumps(VALUE, separators=(",", ":"))


async def checker(folder: Path, **how: Any) -> Checker:
    structure = Structure("json", SCHEMA, "response_format", **how)
    with closing(Asked(folder, (END,))) as asked:
        return Checker(PLAIN, await grammar_of_structure(structure, asked))


async def test_a_blank_or_nothing_behind_commas_and_colons(folder: Path) -> None:
    taken = await checker(folder)
    for text in (json.dumps(VALUE), COMPACT, COMPACT.replace(",", ", "), COMPACT.replace(":", ": "), COMPACT.replace(":", ": ", 1)):
        assert taken.takes(text), text


@pytest.mark.parametrize("run", ["  ", "\n", "\t", "\r\n", " \n", "\n  "], ids=repr)
@pytest.mark.parametrize("behind", ["{", ",", ":", "[1", "2]", '"sizes"', '"er"', "null", "{}", "}}"])
async def test_no_other_white_space_fits_anywhere(folder: Path, run: str, behind: str) -> None:
    taken = await checker(folder)
    assert not taken.takes(COMPACT.replace(behind, behind + run, 1))
    assert taken.takes(COMPACT.replace(behind, behind + " ", 1)) == (behind in (",", ":"))


async def test_a_client_may_say_otherwise(folder: Path) -> None:
    indented = json.dumps(VALUE, indent=4)
    assert not (await checker(folder)).takes(indented)
    assert (await checker(folder, white_space=r"[ \n]+")).takes(indented)
    narrow = await checker(folder, white_space=r"\n {0,12}")
    assert narrow.takes(indented.replace(": ", ":"))
    assert not narrow.takes(indented)


@pytest.mark.parametrize("is_strict", [False, True])
@pytest.mark.parametrize(
    "parameters", [SCHEMA, {**SCHEMA, "x-guidance": {"whitespace_pattern": " *"}}], ids=["plain", "with a wish of its own"]
)
def test_arguments_of_calls_are_as_lightly_spaced(is_strict: bool, parameters: Any) -> None:
    use = ToolUse((Function("f", parameters, is_strict=is_strict),), mode="required")
    taken = Checker(PLAIN, tool_grammar(FORMATS["hermes"], use, {}))
    call = '<tool_call>\n{{"name": "f", "arguments": {}}}\n</tool_call>'
    for text in (json.dumps(VALUE), COMPACT):
        assert taken.takes(call.format(text))
    for text in (json.dumps(VALUE).replace(": ", ":  ", 1), json.dumps(VALUE, indent=1)):
        assert not taken.takes(call.format(text))


def test_a_function_without_parameters_takes_no_blanks() -> None:
    taken = Checker(PLAIN, tool_grammar(FORMATS["hermes"], ToolUse((Function("f"),), mode="required"), {}))
    call = '<tool_call>\n{{"name": "f", "arguments": {}}}\n</tool_call>'
    assert taken.takes(call.format("{}"))
    assert not taken.takes(call.format("{ }"))


@pytest.mark.parametrize(
    ("fields", "is_taken"),
    [
        ({"response_format": {"type": "json_object"}}, False),
        ({"guided_json": {"type": "object"}}, False),
        ({"structured_outputs": {"json_object": True}}, False),
        ({"structured_outputs": {"json": {"type": "object"}, "whitespace_pattern": " *"}}, True),
        ({"structured_outputs": {"json": {"type": "object"}, "whitespace_pattern": " *", "disable_any_whitespace": True}}, False),
        ({"guided_json": {"type": "object"}, "guided_whitespace_pattern": " *"}, True),
    ],
)
async def test_under_each_name(served: Served, fields: dict[str, Any], is_taken: bool) -> None:
    assert (await held(served, **fields)).takes('{"a":  1}') == is_taken
