"""What makes an answer call functions as it should, as a grammar for llguidance: text in, text out; nothing is compiled here.

The dialect is Lark with schemas in `%json` and tokens in `<[ID]>` (docs/syntax.md of llguidance). A mark that is a token of its own is
allowed as that token and spelt out, since models do both; text never holds such a token. Calls are written as json.dumps spaces them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from server.reasoning import ReasoningFormat
from server.structure import json_of, with_start
from server.tools.formats import ARGUMENTS, Function, ToolFormat, ToolUse

Ids = Mapping[str, int]  # of marks that are tokens beside the vocabulary


def tool_grammar(form: ToolFormat, use: ToolUse, ids: Ids) -> str | None:
    """The grammar of an answer; None where any text will do.

    Where a call is forced, the answer is calls alone. Where it is not, all is text up to the mark of a call, and then the call is
    constrained; that is worth it only for strict functions, for one call at most, and where not all functions may be called.
    """
    if use.mode != "auto":
        return _lark([f"start: {_calls(form, use)}", *_rules(form, use, ids)])
    if use.is_parallel and not use.is_narrowed and not any(function.is_strict for function in use.functions):
        return None
    free = f"FREE: /{_free(form)}/"
    return _lark([f"start: {_text_or_calls(form, use, ids)}", free, *_rules(form, use, ids)])


def behind_thinking(grammar: str, form: ReasoningFormat, is_open: bool, ids: Ids) -> str:
    """The same grammar for what stands behind the thinking. `is_open`: the prompt has begun it; else the model may begin it, or not.

    Works on any grammar that has no rule beginning with `cascade`.
    """
    space, thought = "CASCADE_SPACE", "cascade_thought"
    lines = [
        f"start: {thought} {space} cascade_rest" if is_open else f"start: ({space} cascade_opening {thought} {space})? cascade_rest",
        f"{thought}: {_up_to(form.closing, 'CASCADE_ANY', 'cascade_head', ids)}",
        f"cascade_head[lazy]: CASCADE_ANY {_quoted(form.closing)}",
        r"CASCADE_ANY: /(.|\n)*/",
        rf"{space}: /[ \n]{{0,4}}/",
    ]
    if not is_open:
        lines += [f"cascade_opening: {_mark(form.opening, 'cascade_opening_text', ids)}"]
        lines += [f"cascade_opening_text[lazy]: {_quoted(form.opening)}"]
    return _lark([*lines, with_start(grammar, "cascade_rest")])


# ---------------------------------------------------------------------- shapes
def _calls(form: ToolFormat, use: ToolUse) -> str:
    """Calls, and nothing else."""
    if not form.opening:
        return f'call | "[" call{_more(use, ", ")} "]"' if use.is_parallel else "call"
    if form.bare:
        return f"opening? call{_more(use, _separator(form))}"
    if form.is_array:
        return f'opening SPACE "[" call{_more(use, ", ")} "]"'
    one = "opening SPACE call SPACE closing" if form.closing else "opening call"
    return f"{one} (SPACE {one})*" if use.is_parallel else one


def _text_or_calls(form: ToolFormat, use: ToolUse, ids: Ids) -> str:
    """Text, within which or behind which there may be calls."""
    if not form.opening:
        return f"FREE | {_calls(form, use)}"
    if form.bare:
        calls = f"call{_more(use, _separator(form))}"
        return f"FREE | {calls} | to_call {calls}"
    if form.is_array:
        one = f'to_call SPACE "[" call{_more(use, ", ")} "]"'
    else:
        one = "to_call SPACE call SPACE closing" if form.closing else "to_call call"
    return f"({one})* FREE" if use.is_parallel else f"FREE | {one}"


def _more(use: ToolUse, separator: str) -> str:
    return f" ({_quoted(separator)} call)*" if use.is_parallel else ""


def _separator(form: ToolFormat) -> str:
    return f"{form.separators[0]} "


def _free(form: ToolFormat) -> str:
    """Any text; where calls may be bare, any that does not begin like one."""
    if not form.bare:
        return r"(.|\n)*"
    return rf"\s*([^\s{re.escape(form.bare)}](.|\n)*)?"


def _rules(form: ToolFormat, use: ToolUse, ids: Ids) -> list[str]:
    """What the shapes are made of."""
    rules = [r"SPACE: /[ \n]{0,4}/", "call: " + " | ".join(f"call_{i}" for i in range(len(use.functions)))]
    for i, function in enumerate(use.functions):
        rules += _call_rules(form, i, function, ids)
    if form.opening:
        rules += [f"opening: {_mark(form.opening, _quoted(form.opening), ids)}"]
    if form.opening and use.mode == "auto":
        rules += [f"to_call: {_up_to(form.opening, 'FREE', 'to_call_head', ids)}", f"to_call_head[lazy]: FREE {_quoted(form.opening)}"]
    if form.closing:
        rules += [f"closing: {_mark(form.closing, _quoted(form.closing), ids)}"]
    if form.is_named:
        rules += [f"arguments: {_mark(ARGUMENTS, _quoted(ARGUMENTS), ids)}"]
    return rules


def _call_rules(form: ToolFormat, number: int, function: Function, ids: Ids) -> Sequence[str]:
    """What a schema asks for that cannot be enforced is a mistake only in a strict function."""
    arguments = f"arguments_{number}: {json_of(_schema(function), is_lenient=not function.is_strict)}"
    if form.is_named:
        return f"call_{number}: {_quoted(function.name)} arguments arguments_{number}", arguments
    head = f'{{"name": {json.dumps(function.name)}, "{form.arguments_key}": '
    return f'call_{number}: {_quoted(head)} arguments_{number} "}}"', arguments


def _schema(function: Function) -> dict[str, Any]:
    """A function without parameters takes none."""
    if not function.parameters:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **function.parameters}


def _mark(text: str, spelt: str, ids: Ids) -> str:
    return f"<[{ids[text]}]> | {spelt}" if text in ids else spelt


def _up_to(mark: str, text: str, head: str, ids: Ids) -> str:
    """Text up to a mark; `head` is the rule where the mark is spelt out, which ends as soon as it is there."""
    return f"{text} <[{ids[mark]}]> | {head}" if mark in ids else head


def _quoted(text: str) -> str:
    return json.dumps(text)


def _lark(lines: Sequence[str]) -> str:
    return "\n".join(lines)
