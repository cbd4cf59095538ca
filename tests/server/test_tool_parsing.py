"""Calls in a text that comes in pieces: every form, every cut, and what only looks like a call."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from server.tools.formats import FORMATS, HERMES, detected, has_place_for_tools
from server.tools.json_reader import JsonReader, Malformed
from server.tools.parse import Arguments, CallBegun, CallEnded, CallParser, Event, Text

NAMES = frozenset({"f", "get_weather"})
MARKS = ["<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"]
Calls = list[tuple[str, str]]


def read(form: str, pieces: Iterable[str], is_eager: bool = True, is_cut: bool = False) -> tuple[str, Calls]:
    """Content and calls, put together as a client does."""
    parser = CallParser(FORMATS[form], NAMES, is_eager)
    events = [*(event for piece in pieces for event in parser.push(piece)), *parser.flush(is_cut)]
    return put_together(events)


def put_together(events: Sequence[Event]) -> tuple[str, Calls]:
    content, calls, ended = "", list[list[str]](), list[int]()
    for event in events:
        match event:
            case Text():
                content += event.text
            case CallBegun():
                assert event.index == len(calls)
                calls.append([event.name, ""])
            case Arguments():
                assert event.index == len(calls) - 1
                calls[-1][1] += event.text
            case CallEnded():
                ended.append(event.index)
    assert ended == list(range(len(calls))), "each call ends once, in front of the next one"
    return content, [(name, arguments) for name, arguments in calls]


F = '{"a": [1, "}"], "b": {}}'
ONE = [("f", F)]
GOOD: list[tuple[str, str, str, Calls]] = [
    ("hermes", f'<tool_call>\n{{"name": "f", "arguments": {F}}}\n</tool_call>', "", ONE),
    ("hermes", f'I look.\n\n<tool_call>{{"name":"f","arguments":{F}}}</tool_call>\n', "I look.", ONE),
    ("hermes", f'<tool_call>{{"arguments": {F}, "name": "f"}}</tool_call>\nSo.', "\nSo.", ONE),
    (
        "hermes",
        '<tool_call>{"name": "f"}</tool_call>\n<tool_call>{"name": "get_weather"}</tool_call>',
        "",
        [("f", "{}"), ("get_weather", "{}")],
    ),
    ("hermes", f'<tool_call>{{"name": "f", "arguments": {F}}}', "", ONE),
    ("hermes", f'<tool_call>{{"name": "f", "arguments": {F}</tool_call>', "", ONE),
    ("hermes", f'<tool_call>{{"name": "f", "arguments": {F}}}<tool_call>{{"name": "f"}}</tool_call>', "", [*ONE, ("f", "{}")]),
    ("hermes", f'<tool_call>{{"name": "f", "arguments": {F}}}\n</tool', "", ONE),
    ("hermes", '<tool_call>{"id": -1.5e3, "name": "f", "x": [null, true]}</tool_call>', "", [("f", "{}")]),
    ("llama3", f'{{"name": "f", "parameters": {F}}}', "", ONE),
    ("llama3", f'<|python_tag|>{{"name": "f", "parameters": {F}}}; {{"name": "f", "parameters": {{}}}}', "", [*ONE, ("f", "{}")]),
    ("llama3", f'\n{{"type": "function", "name": "f", "parameters": {F}}} yes', " yes", ONE),
    ("mistral", f'[TOOL_CALLS] [{{"name": "f", "arguments": {F}}}, {{"name": "f", "arguments": {{}}}}]', "", [*ONE, ("f", "{}")]),
    ("mistral", f'Wait. [TOOL_CALLS][{{"name": "f", "arguments": {F}, "id": "abcdefghi"}}]', "Wait.", ONE),
    ("mistral", f"[TOOL_CALLS]f{F}[TOOL_CALLS]get_weather{{}}", "", [*ONE, ("get_weather", "{}")]),
    ("mistral_named", f"[TOOL_CALLS]f[ARGS]{F}[TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{{}}", "", [*ONE, ("f", "{}")]),
    ("mistral_named", f'[TOOL_CALLS] [{{"name": "f", "arguments": {F}}}]', "", ONE),
    ("json", f'{{"name": "f", "arguments": {F}}}', "", ONE),
    ("json", f' [{{"name": "f", "parameters": {F}}},{{"name": "f"}}]\n', "", [*ONE, ("f", "{}")]),
]
BAD = [
    ("hermes", "<tool_call>"),
    ("hermes", "a <tool_call>none</tool_call> b\n"),
    ("hermes", '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arguments": [1]}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "name": "f"}</tool_call>'),
    ("hermes", '<tool_call>{"name": 3}</tool_call>'),
    ("hermes", '<tool_call>{"name": "f", "arg'),
    ("hermes", "1 < 2 <tool <tool_cal"),
    ("hermes", " \n "),
    ("hermes", '{"name": "f", "arguments": {}}'),
    ("llama3", '{"name": "Bob", "parameters": {}}'),
    ("llama3", 'So {"name": "f", "parameters": {}}'),
    ("llama3", '[{"name": "f", "parameters": {}}]'),
    ("mistral", "[TOOL_CALLS] []"),
    ("mistral", "[TOOL_CALLS]a name{}"),
    ("mistral", "[TOOL_CALLS]" + "f" * 300),
    ("mistral", "[TOOL_"),
    ("json", "[1, 2]"),
    ("json", '{"name": "f", "arguments": "{}"}'),
    ("json", "[see] {"),
]


def cuts(text: str) -> Iterable[list[str]]:
    yield [text]
    yield list(text)
    for end in range(1, len(text)):
        yield [text[:end], text[end:]]


@pytest.mark.parametrize(("form", "text", "content", "calls"), GOOD)
def test_calls_are_found_however_they_are_cut(form: str, text: str, content: str, calls: Calls) -> None:
    for pieces, is_eager in itertools.product(cuts(text), (True, False)):
        assert read(form, pieces, is_eager) == (content, calls), pieces


@pytest.mark.parametrize(("form", "text"), BAD)
def test_what_is_no_call_is_text_as_it_stands(form: str, text: str) -> None:
    for pieces, is_eager in itertools.product(cuts(text), (True, False)):
        assert read(form, pieces, is_eager) == (text, []), pieces


@pytest.mark.parametrize("form", [name for name in FORMATS if name not in ("mistral", "mistral_named")])
def test_arguments_that_break_are_text_only_where_that_can_be_known(form: str) -> None:
    opening = FORMATS[form].opening
    text = opening + '{"name": "f", "arguments": {"a": oops}}' + FORMATS[form].closing
    for pieces in cuts(text):
        assert read(form, pieces, is_eager=False) == (text, [])
        assert read(form, pieces) == ("", [("f", '{"a": oops}}')])


def test_an_answer_that_was_cut_keeps_its_call() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": "lo'
    for pieces in cuts(text):
        assert read("hermes", pieces, is_eager=False, is_cut=True) == ("", [("f", '{"a": "lo')])
        assert read("hermes", pieces, is_eager=False) == (text, [])
        assert read("hermes", pieces) == ("", [("f", '{"a": "lo')])


FRAGMENTS = st.lists(
    st.sampled_from(
        [*MARKS, '{"name": "f"', ', "arguments": ', "{}", '{"a": 1}', "}", "]", "[", ",", ";", " ", "\n", "f", '"', "\\", "x<", "[T"]
    )
    | st.text("<[{tT_ \n}", max_size=3),
    max_size=14,
).map("".join)


@given(st.sampled_from(sorted(FORMATS)), FRAGMENTS, st.data(), st.booleans(), st.booleans())
def test_how_a_text_is_cut_changes_nothing(form: str, text: str, data: st.DataObject, is_eager: bool, is_cut: bool) -> None:
    ends = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *ends, len(text)])]
    assert read(form, pieces, is_eager, is_cut) == read(form, [text], is_eager, is_cut)


@given(st.sampled_from(sorted(FORMATS)), FRAGMENTS, st.booleans())
def test_nothing_is_lost(form: str, text: str, is_eager: bool) -> None:
    """Without a call the content is the text. With calls, all that is missing is marks, punctuation, names and keys."""
    content, calls = read(form, [text], is_eager)
    if not calls:
        assert content == text
    position = 0
    for char in content:
        position = text.index(char, position) + 1  # in the same order, none twice
    for _, arguments in calls:
        assert arguments == "{}" or arguments in text
        if not is_eager:
            assert isinstance(json.loads(arguments), dict)


@given(st.sampled_from(sorted(FORMATS)), st.text("<[{tT_ \na", max_size=30))
def test_little_is_held_back(form: str, text: str) -> None:
    """What no mark and no call begins with goes out at once, but for white space."""
    parser = CallParser(FORMATS[form], NAMES)
    sent = "".join(event.text for event in parser.push(text) if isinstance(event, Text))
    kept = text[len(sent) :]
    assert text.startswith(sent)
    assert not kept or kept.lstrip()[:1] in ("", "<", "[", "{")


def test_ids_are_as_the_family_wants_them() -> None:
    def id_of(form: str, text: str) -> str:
        (begun,) = [event for event in CallParser(FORMATS[form], NAMES).push(text) if isinstance(event, CallBegun)]
        return begun.id

    assert id_of("json", '{"name": "f"}').startswith("call_")
    mistral = {id_of("mistral", "[TOOL_CALLS]f{}") for _ in range(3)}
    assert len(mistral) == 3
    assert all(len(name) == 9 and name.isalnum() for name in mistral)


# ---------------------------------------------------------------------- JSON, a character at a time
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def length_read(text: str) -> int | None:
    """How many characters the value has at the beginning of a text; None where there is none."""
    reader = JsonReader()
    try:
        for i, char in enumerate(text):
            if not reader.push(char):
                return i
            if reader.is_done:
                return i + 1
    except Malformed:
        return None
    return len(text) if reader.is_done else None


@given(JSON, st.sampled_from([None, 1]), st.booleans())
def test_json_is_read_to_its_end(value: Any, indent: int | None, is_ascii: bool) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=is_ascii)
    assert length_read(text + ",") == len(text)


@given(st.text('{}[]",:\\u0a1.e-+tfn ', max_size=12) | st.lists(st.sampled_from('{}[]",: 1'), max_size=8).map("".join))
@example("01")
@example("[1.]")
@example('["\\x"]')
@example('["\n"]')
@example("[1,]")
@example('{"a":1,}')
def test_json_is_what_python_reads(text: str) -> None:
    """At a comma everything is decided."""
    length = length_read(text + ",")
    try:
        _, end = json.JSONDecoder().raw_decode(text.lstrip(" "))
        want: int | None = end + len(text) - len(text.lstrip(" "))
    except ValueError:
        want = None
    if length is not None:
        assert want == length
    elif want is not None:  # python stops in front of what cannot go on a number or a word
        assert text[want : want + 1].isalnum() or text[want] in "+-."


# ---------------------------------------------------------------------- which form a template teaches
@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{% if tools %}<tool_call>{{ tools }}</tool_call>{% endif %}", "hermes"),
        ("{% if tools %}[TOOL_CALLS] [{{ tools }}]{% endif %}", "mistral"),
        ("{% if tools %}[TOOL_CALLS]{{ name }}[ARGS]{{ tools }}{% endif %}", "mistral_named"),
        ("{% if tools %}Environment: ipython{% endif %}", "llama3"),
        ('{% if tools %}{"name": function name, "parameters": dictionary}{% endif %}', "llama3"),
        ("{% if tools %}{{ tools | tojson }}{% endif %}", "json"),
        ("{% if tools %}<tool_call><function=name>{% endif %}", None),
        ("{% if tools %}<tool_call>{{ name }}<arg_key>{% endif %}", None),
        ("{% if tools %}<｜tool▁call▁begin｜>{% endif %}", None),
        ("{% if tools %}<|tool_call|>[{{ call }}]{% endif %}", None),
        ("{% if tools %}<TOOLCALL>[{{ call }}]</TOOLCALL>{% endif %}", None),
        ("{% if tools %}<|START_ACTION|>{% endif %}", None),
        ("{% if tools %}<tools>{{ tools }}</tools><tool_response>{% endif %}", "json"),
    ],
)
def test_a_template_says_its_form(template: str, form: str | None) -> None:
    found = detected(template)
    assert (found and found.name) == form
    assert has_place_for_tools(template)


def test_a_template_without_tools_has_no_place_for_them() -> None:
    assert not has_place_for_tools("{{ messages }} retools")
    assert HERMES.marks == ("<tool_call>", "</tool_call>")
