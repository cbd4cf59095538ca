"""The forms in which models write calls of functions, as data, and which of them a chat template teaches.

A form that is not here cannot be read: `detected` says None for a template that teaches one, and requests with tools are refused there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ToolFormat:
    """How calls stand in an answer: behind `opening`, or as JSON that begins it.

    A call is a JSON object with a name and arguments, several may be an array; or, with `is_named`, the name with the arguments behind it.
    """

    name: str
    opening: str = ""  # stands in front of calls; empty: there is no such mark
    closing: str = ""  # stands behind each call; empty: there is no such mark
    bare: str = ""  # an answer that begins with one of these characters is a call
    separators: str = ""  # characters that may stand between two calls
    is_array: bool = False  # calls are written as an array, one alone, too
    is_named: bool = False  # NAME[ARGS]{...} instead of an object
    arguments_key: str = "arguments"
    id_length: int | None = None  # ids of calls have exactly so many letters and digits; None: they are as OpenAI's

    @property
    def has_names(self) -> bool:
        """Whether a call may be a name with the arguments behind it."""
        return self.id_length is not None

    @property
    def marks(self) -> tuple[str, ...]:
        """What may be special tokens of a tokenizer and has to be seen."""
        return tuple(mark for mark in (self.opening, self.closing, *((ARGUMENTS, CALL_ID) if self.has_names else ())) if mark)


ARGUMENTS, CALL_ID = "[ARGS]", "[CALL_ID]"

HERMES = ToolFormat("hermes", opening="<tool_call>", closing="</tool_call>")
FORMATS: Mapping[str, ToolFormat] = {
    form.name: form
    for form in (
        HERMES,
        ToolFormat("llama3", opening="<|python_tag|>", bare="{", separators=";,", arguments_key="parameters"),
        ToolFormat("mistral", opening="[TOOL_CALLS]", is_array=True, id_length=9),
        ToolFormat("mistral_named", opening="[TOOL_CALLS]", is_named=True, id_length=9),
        ToolFormat("json", bare="{[", separators=",;"),
    )
}

FormatName = Literal["auto", "none", "hermes", "llama3", "mistral", "mistral_named", "json"]

# Calls in XML or python, also where the mark is one that is known.
_OTHER_BODIES = re.compile(r"<function=|<arg_key>|<parameter=|functools\[")
# Marks of other families, such as <tool_calls> or <|START_ACTION|>.
_OTHER_MARKS = re.compile(r"[<\[][|｜/]?[\w:▁]*(tool[_▁]?calls?|function[_▁]?calls?|action)[\w▁]*[|｜]?[>\]]", re.IGNORECASE)
_SIGNS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("mistral_named", re.compile(r"\[TOOL_CALLS\][\s\S]*\[ARGS\]")),
    ("mistral", re.compile(r"\[TOOL_CALLS\]")),
    ("hermes", re.compile(r"<tool_call>")),
    ("llama3", re.compile(r"<\|python_tag\|>|Environment: ipython")),
    ("llama3", re.compile(r"\{\"name\": [^{}]*\"parameters\": ")),
)


def has_place_for_tools(template: str) -> bool:
    """Whether a chat template reads the list of tools at all."""
    return re.search(r"\btools\b", template) is not None


def detected(template: str) -> ToolFormat | None:
    """The form that a template with a place for tools teaches; None for one that cannot be read."""
    if _OTHER_BODIES.search(template):
        return None
    known = next((FORMATS[name] for name, sign in _SIGNS if sign.search(template)), None)
    if known is None and not _OTHER_MARKS.search(template):
        return FORMATS["json"]
    return known


# ---------------------------------------------------------------------- what a request allows
@dataclass(frozen=True)
class Function:
    """A function that the model may call."""

    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)  # a JSON Schema of an object
    is_strict: bool = False  # arguments must follow the schema


@dataclass(frozen=True)
class ToolUse:
    """Which functions an answer may call, and whether it must."""

    functions: tuple[Function, ...]
    mode: Literal["auto", "required", "named"] = "auto"
    is_parallel: bool = True  # there may be several calls
    is_narrowed: bool = False  # the model was told of functions that it may not call

    @property
    def names(self) -> frozenset[str]:
        return frozenset(function.name for function in self.functions)
