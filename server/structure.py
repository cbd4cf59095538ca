"""What an answer must be, as a grammar for the engine: JSON of a schema, one of some texts, a match of an expression, a text of a grammar.

Every grammar is a text in llguidance's dialect of Lark whose first rule is `start`. It is made and checked in a process of its own
(grammar_checker.py), so that whoever asks for what cannot be held to is told before anything runs, and keeps nobody else.

JSON is one line, with a blank or nothing behind each comma and colon, whichever a model is used to, and nothing elsewhere, unless a
client wishes it otherwise: white space costs tokens, and where any amount of it is allowed, an unsure model goes on with it for ever.
Asked for 25 documents, the embedded pair writes 548 tokens so, and 797 with any white space up to 20 characters; and 797, too, with a
blank or a new line and its indentation, since the library allows white space in front of commas and colons wherever it allows any. In
each case 70 of 80 values are right. Compact JSON alone is 520 tokens, and 62 are right.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import InvalidRequest
from server.grammar_checker import Checker

# Separators are expressions. The library has no white space in front of them this way.
_LIGHT: Mapping[str, Any] = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_LONGEST_REASON = 500  # characters of an explanation


@dataclass(frozen=True)
class Structure:
    """One wish about the shape of an answer."""

    kind: str  # json, regex, choice or grammar
    value: Any  # a schema; an expression; texts; a grammar in Lark's or llama.cpp's notation
    param: str  # the field that asked
    white_space: str | None = None  # between JSON's signs, as an expression; None: a blank behind a comma and a colon, or none


async def grammar_of_structure(structure: Structure, checker: Checker) -> str:
    """The engine's grammar. Raises InvalidRequest with the reason, naming the field."""
    checked = await checker.made(structure.kind, structure.value, structure.white_space)
    if checked.mistake:
        told = checked.mistake.partition("\n   1 | start:")[0].removeprefix("at 1(8): ")  # that line is ours, and tells a client nothing
        raise InvalidRequest(f"Answers cannot be held to this {structure.kind}: {told[:_LONGEST_REASON]}", structure.param)
    return checked.grammar


def json_of(schema: Mapping[str, Any], is_lenient: bool = False, white_space: str | None = None) -> str:
    """What JSON of a schema is in a grammar. `is_lenient`: keywords that cannot be held to are no mistakes. The schema's own options count
    for nothing."""
    space = _LIGHT if white_space is None else {"whitespace_pattern": white_space}
    return f"%json {json.dumps({**schema, 'x-guidance': {'lenient': is_lenient, **space}}, allow_nan=False)}"


def with_start(grammar: str, name: str) -> str:
    """The same grammar, whose first rule has another name: to be a part of a larger one. Texts and expressions in it stay as they are."""
    return _TEXT_OR_START.sub(lambda match: name if match[0] == "start" else match[0], grammar)


NO_STRINGS = re.compile(r'"(?:\\.|[^"\\])*"|/(?:\\.|[^/\\\n])+/[a-z]*|//[^\n]*')  # texts, expressions and comments of a grammar
_TEXT_OR_START = re.compile(NO_STRINGS.pattern + r"|\bstart\b")
