"""Grammars of tool use, as llguidance reads them: what they let through, what they refuse, and that the parser finds it."""

from __future__ import annotations

import json
from typing import Any

import llguidance
import pytest
from tokenizers import AddedToken, Tokenizer

from server import reasoning
from server.tools.formats import FORMATS, Function, ToolUse
from server.tools.grammar import behind_thinking, tool_grammar
from server.tools.parse import Arguments, CallBegun, CallParser, Text
from tests.server.conftest import build_tokenizer

WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
F = Function("f")
STRICT = Function("get_weather", WEATHER, is_strict=True)
LOOSE = Function("loose", {"properties": {"n": {"type": "integer", "not": {"const": 3}}}, "required": ["n"]})
MARKS = ("<tool_call>", "</tool_call>", "<|python_tag|>", "[TOOL_CALLS]", "[ARGS]", "<think>", "</think>", "[THINK]", "[/THINK]")
END = 0


def tokenizer_with(marks: tuple[str, ...]) -> Tokenizer:
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    return tokenizer


PLAIN, MARKED = build_tokenizer(), tokenizer_with(MARKS)


def ids_in(tokenizer: Tokenizer) -> dict[str, int]:
    vocab = tokenizer.get_vocab()
    return {mark: vocab[mark] for mark in MARKS if mark in vocab}


class Checker:
    """A grammar over a tokenizer to which all marks are tokens, or none but <think>."""

    def __init__(self, tokenizer: Tokenizer, grammar: str | None):
        assert grammar is not None
        self._tokenizer = tokenizer
        self._engine = llguidance.LLTokenizer(tokenizer.to_str(), eos_token=END)
        self._grammar = llguidance.LLMatcher.grammar_from_lark(grammar)
        assert not llguidance.LLMatcher.validate_grammar(self._grammar, self._engine)

    def takes(self, text: str) -> bool:
        ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        matcher = llguidance.LLMatcher(self._engine, self._grammar, log_level=0)
        return all(matcher.consume_token(token) for token in [*ids, END])


def tool_checker(tokenizer: Tokenizer, form: str, *functions: Function, **use: Any) -> Checker:
    return Checker(tokenizer, tool_grammar(FORMATS[form], ToolUse(functions, **use), ids_in(tokenizer)))


def call_of(form: str, name: str, arguments: Any) -> str:
    told = json.dumps(arguments, ensure_ascii=False)  # of escapes, llguidance takes only what must be escaped
    if form == "mistral_named":
        return f"{name}[ARGS]{told}"
    return f'{{"name": "{name}", "{FORMATS[form].arguments_key}": {told}}}'


def answer_of(form: str, *calls: str) -> str:
    """As the family writes it."""
    match form:
        case "hermes":
            return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)
        case "llama3":
            return "; ".join(calls)
        case "mistral":
            return f"[TOOL_CALLS] [{', '.join(calls)}]"
        case "mistral_named":
            return "".join(f"[TOOL_CALLS]{call}" for call in calls)
        case _:
            return calls[0] if len(calls) == 1 else f"[{', '.join(calls)}]"


BOTH = pytest.mark.parametrize("tokenizer", [PLAIN, MARKED], ids=["marks are text", "marks are tokens"])
EACH = pytest.mark.parametrize("form", sorted(FORMATS))
GOOD = {"f": {}, "get_weather": {"city": 'Köln "[x]" <'}, "loose": {"n": 4, "more": [1, {"a": None}]}}
WRONG = {"f": {"a": 1}, "get_weather": {"town": "x"}, "loose": {"n": "x"}}


@BOTH
@EACH
@pytest.mark.parametrize("mode", ["required", "named"])
def test_a_call_that_must_come(tokenizer: Tokenizer, form: str, mode: Any) -> None:
    checker = tool_checker(tokenizer, form, F, STRICT, LOOSE, mode=mode)
    for name in GOOD:
        assert checker.takes(answer_of(form, call_of(form, name, GOOD[name]))), name
        assert not checker.takes(answer_of(form, call_of(form, name, WRONG[name]))), name
        assert not checker.takes("So " + answer_of(form, call_of(form, name, GOOD[name])))
    assert not checker.takes("hello")
    assert not checker.takes("")
    assert not checker.takes(answer_of(form, call_of(form, "other", {})))
    two = answer_of(form, call_of(form, "f", {}), call_of(form, "get_weather", {"city": ""}))
    assert checker.takes(two)
    assert not tool_checker(tokenizer, form, F, STRICT, mode=mode, is_parallel=False).takes(two)
    assert tool_checker(tokenizer, form, F, STRICT, mode=mode, is_parallel=False).takes(answer_of(form, call_of(form, "f", {})))


@BOTH
@EACH
def test_a_call_that_may_come(tokenizer: Tokenizer, form: str) -> None:
    """Any text, and behind the mark of a call nothing but a call."""
    checker = tool_checker(tokenizer, form, F, STRICT)
    good, wrong = (answer_of(form, call_of(form, "get_weather", some["get_weather"])) for some in (GOOD, WRONG))
    lead = "Let me see.\n" if FORMATS[form].opening and form != "llama3" else ""
    for text in ("hello, <b>{x}</b> [1] [TOOL", "", "\n", lead + good):
        assert checker.takes(text), text
    if form == "hermes":
        assert checker.takes(f"{lead}{good}\n{good}\nand then")
    two = answer_of(form, call_of(form, "f", {}), call_of(form, "f", {}))
    assert checker.takes(two)
    for text in (lead + wrong, answer_of(form, call_of(form, "other", {})), lead + good[:-4]):
        assert not checker.takes(text), text
    single = tool_checker(tokenizer, form, F, STRICT, is_parallel=False)
    assert single.takes(lead + good)
    assert single.takes("hello")
    assert not single.takes(two)


@BOTH
def test_a_mark_of_llama_may_be_there(tokenizer: Tokenizer) -> None:
    call = call_of("llama3", "get_weather", GOOD["get_weather"])
    for use in ({"mode": "required"}, {"mode": "auto"}):
        checker = tool_checker(tokenizer, "llama3", STRICT, **use)
        assert checker.takes(f"<|python_tag|>{call}; {call}")
        assert not checker.takes("<|python_tag|>print(1)")


@EACH
def test_nothing_is_constrained_without_need(form: str) -> None:
    assert tool_grammar(FORMATS[form], ToolUse((F, LOOSE)), {}) is None
    assert tool_grammar(FORMATS[form], ToolUse((F,), is_parallel=False), {}) is not None
    assert tool_grammar(FORMATS[form], ToolUse((F,), is_narrowed=True), {}) is not None


def test_references_within_a_schema_hold() -> None:
    schema = {
        "type": "object",
        "properties": {"at": {"$ref": "#/$defs/day"}},
        "required": ["at"],
        "$defs": {"day": {"enum": ["Mon", "Tue"]}},
    }
    checker = tool_checker(PLAIN, "hermes", Function("f", schema, is_strict=True), mode="required")
    assert checker.takes(answer_of("hermes", call_of("hermes", "f", {"at": "Mon"})))
    assert not checker.takes(answer_of("hermes", call_of("hermes", "f", {"at": "Sun"})))


@BOTH
@EACH
@pytest.mark.parametrize("thinking", ["think", "mistral"])
@pytest.mark.parametrize("mode", ["auto", "required"])
def test_a_grammar_begins_behind_the_thinking(tokenizer: Tokenizer, form: str, thinking: str, mode: Any) -> None:
    marks = reasoning.FORMATS[thinking]
    grammar = tool_grammar(FORMATS[form], ToolUse((STRICT,), mode), ids_in(tokenizer))
    assert grammar is not None
    good, wrong = (answer_of(form, call_of(form, "get_weather", some["get_weather"])) for some in (GOOD, WRONG))
    thought = f'it is {{"name" [x\n\n{marks.closing}\n\n'
    is_open = Checker(tokenizer, behind_thinking(grammar, marks, True, ids_in(tokenizer)))
    assert is_open.takes(thought + good)
    assert not is_open.takes(thought + wrong)
    assert not is_open.takes("without an end")
    may_open = Checker(tokenizer, behind_thinking(grammar, marks, False, ids_in(tokenizer)))
    for text, is_good in ((good, True), (wrong, False)):
        assert may_open.takes(text) == is_good
        assert may_open.takes(f"{marks.opening}\n{thought}{text}") == is_good, text


@pytest.mark.parametrize("is_open", [True, False])
def test_any_grammar_may_begin_behind_the_thinking(is_open: bool) -> None:
    checker = Checker(MARKED, behind_thinking('start: %json {"type": "integer"}', reasoning.FORMATS["think"], is_open, ids_in(MARKED)))
    assert checker.takes(("" if is_open else "<think>") + "hm, 3 or 4\n</think>\n\n42")
    assert not checker.takes(("" if is_open else "<think>") + "hm</think>hm")


@BOTH
@EACH
def test_the_parser_finds_what_the_grammar_lets_through(tokenizer: Tokenizer, form: str) -> None:
    both: list[tuple[str, Any]] = [("get_weather", GOOD["get_weather"]), ("f", {})]
    for calls in (both[1:], both):
        text = answer_of(form, *(call_of(form, name, arguments) for name, arguments in calls))
        assert tool_checker(tokenizer, form, F, STRICT, mode="required").takes(text)
        parser = CallParser(FORMATS[form], frozenset({"f", "get_weather"}), is_eager=False)
        events = [*parser.push(text), *parser.flush()]
        assert [event.name for event in events if isinstance(event, CallBegun)] == [name for name, _ in calls]
        assert [json.loads(event.text) for event in events if isinstance(event, Arguments)] == [arguments for _, arguments in calls]
        assert not [event for event in events if isinstance(event, Text)]
