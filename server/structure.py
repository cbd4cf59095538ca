"""What an answer must be, as a grammar for the engine: JSON of a schema, one of some texts, a match of an expression, a text of a grammar.

Every grammar is a text in llguidance's dialect of Lark whose first rule is `start`. It is checked here, so that whoever asks for what
cannot be held to is told before anything runs.

JSON is one line, with a blank or nothing behind each comma and colon, whichever a model is used to, and nothing elsewhere, unless a
client wishes it otherwise: white space costs tokens, and where any amount of it is allowed, an unsure model goes on with it for ever.
Asked for 25 documents, the embedded pair writes 548 tokens so, and 797 with any white space up to 20 characters; and 797, too, with a
blank or a new line and its indentation, since the library allows white space in front of commas and colons wherever it allows any. In
each case 70 of 80 values are right. Compact JSON alone is 520 tokens, and 62 are right.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llguidance import LLMatcher, grammar_from

from engine.errors import InvalidRequest
from engine.grammar.automaton import Vocabulary

# Separators are expressions. The library has no white space in front of them this way.
_LIGHT: Mapping[str, Any] = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
_LONGEST_REASON = 500  # characters of an explanation
_NUM_CHECKED = 256


@dataclass(frozen=True)
class Structure:
    """One wish about the shape of an answer."""

    kind: str  # json, regex, choice or grammar
    value: Any  # a schema; an expression; texts; a grammar in Lark's or llama.cpp's notation
    param: str  # the field that asked
    white_space: str | None = None  # between JSON's signs, as an expression; None: a blank behind a comma and a colon, or none


class Checker:
    """Says of grammars whether answers of a model can be held to them, over the model's own tokens."""

    def __init__(self, folder: Path, end_token_ids: tuple[int, ...]):
        """`folder` holds the model's tokenizer. It is read here: that takes half a second in which nobody else runs."""
        self._vocabulary = Vocabulary.from_folder(folder, end_token_ids)
        self._known: OrderedDict[str, str] = OrderedDict()  # mistakes, the newest last
        self._worker = ThreadPoolExecutor(1, "grammar-check")  # one at a time: nobody's schemas take the cores of all others

    async def mistake_in(self, grammar: str) -> str:
        """In the library's words; "" for none. Takes a millisecond, or a second for something monstrous: so it has a thread."""
        known = self._known.get(grammar)
        return known if known is not None else await asyncio.get_running_loop().run_in_executor(self._worker, self._check, grammar)

    def close(self) -> None:
        """End the thread."""
        self._worker.shutdown(wait=False)

    def _check(self, grammar: str) -> str:
        if (known := self._known.get(grammar)) is not None:  # another request has asked meanwhile
            return known
        mistake = "this model's tokens cannot be read" if self._vocabulary is None else self._vocabulary.mistake_in(grammar)
        self._known[grammar] = mistake
        if len(self._known) > _NUM_CHECKED:
            self._known.popitem(last=False)
        return mistake


async def grammar_of_structure(structure: Structure, checker: Checker) -> str:
    """The engine's grammar. Raises InvalidRequest with the reason, naming the field."""
    grammar = _MAKERS[structure.kind](structure)
    if mistake := await checker.mistake_in(grammar):
        raise _refused(structure, mistake)
    return grammar


def json_of(schema: Mapping[str, Any], is_lenient: bool = False, white_space: str | None = None) -> str:
    """What JSON of a schema is in a grammar. `is_lenient`: keywords that cannot be held to are no mistakes. The schema's own options count
    for nothing."""
    space = _LIGHT if white_space is None else {"whitespace_pattern": white_space}
    return f"%json {json.dumps({**schema, 'x-guidance': {'lenient': is_lenient, **space}}, allow_nan=False)}"


def with_start(grammar: str, name: str) -> str:
    """The same grammar, whose first rule has another name: to be a part of a larger one. Texts and expressions in it stay as they are."""
    return _TEXT_OR_START.sub(lambda match: name if match[0] == "start" else match[0], grammar)


_TEXT_OR_START = re.compile(r'"(?:\\.|[^"\\])*"|/(?:\\.|[^/\\\n])+/|//[^\n]*|\bstart\b')


def _json(structure: Structure) -> str:
    schema = _ANY_OBJECT if structure.value is None else structure.value
    if isinstance(schema, bool):
        if not schema:
            raise _refused(structure, "the schema false allows nothing")
        schema = {}
    return f"start: {json_of(schema, white_space=structure.white_space)}\n"


def _regex(structure: Structure) -> str:
    escaped: str = json.loads(LLMatcher.grammar_from_regex(structure.value))["grammars"][0]["lark_grammar"]
    return escaped


def _choice(structure: Structure) -> str:
    return grammar_from("choice", json.dumps(structure.value))


def _grammar(structure: Structure) -> str:
    try:
        return grammar_from("grammar", structure.value)
    except (ValueError, RecursionError) as error:
        raise _refused(structure, str(error)) from error


_MAKERS: Mapping[str, Callable[[Structure], str]] = {"json": _json, "regex": _regex, "choice": _choice, "grammar": _grammar}


def _refused(structure: Structure, reason: str) -> InvalidRequest:
    told = reason.partition("\n   1 | start:")[0].removeprefix("at 1(8): ")  # the first line is ours, and tells a client nothing
    return InvalidRequest(f"Answers cannot be held to this {structure.kind}: {told[:_LONGEST_REASON]}", structure.param)
