"""Wishes that take for ever, or end the process that looks at them: refused, and nobody else waits for long. The process is real."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.grammar.automaton import Vocabulary
from server.grammar_checker import Checked, Checker
from server.grammar_child import answer_to

END = 2


@pytest.fixture
async def checker(folder: Path) -> AsyncIterator[Checker]:
    made = Checker(folder, (END,), seconds=1.0)
    yield made
    made.close()


@pytest.fixture(scope="module")
def vocabulary(folder: Path) -> Vocabulary | None:
    return Vocabulary.from_folder(folder, (END,))


NOTHING = (
    r"start: /a+/ /[^\s\S]/",
    'start: /b+/ "c" b\nb: /a+/ /[^\\s\\S]/',
    "start: A B\nA: /a+/\nB: /b/ & /c/",
    'start: A B\nA: /a+/\nB: /b/ & ~/b|c/ // nothing\n   | /b/ & "d"',
    "start: /a+/ /b[^\\s\\S]c/i",
)


@pytest.mark.parametrize("grammar", NOTHING)
def test_a_terminal_that_matches_nothing_is_a_mistake(grammar: str, vocabulary: Vocabulary) -> None:
    """The library would never come back from such a grammar."""
    asked = {"kind": "grammar", "value": grammar, "white_space": None}
    assert "matches nothing" in answer_to(asked, vocabulary)["mistake"]


@pytest.mark.parametrize(
    "grammar",
    [
        "start: /a+/ B?\nB: /b/ & ~/c/ // & nothing",
        'start: "/[^\\\\s\\\\S]/" | "& ~" // /[^\\s\\S]/',
        "start: /a?/ /b*/",
        'root ::= [a-z]+ "x" | "/" root',
    ],
)
def test_one_that_matches_something_is_none(grammar: str, vocabulary: Vocabulary) -> None:
    assert "grammar" in answer_to({"kind": "grammar", "value": grammar, "white_space": None}, vocabulary)


async def test_what_takes_too_long_is_refused_and_the_next_wish_is_answered(checker: Checker) -> None:
    """Converting thousands of rules takes seconds, in this process or another one."""
    rules = "root ::= r0\n" + "\n".join(f'r{i} ::= "x" r{i + 1}?' for i in range(6000)) + '\nr6000 ::= "y"'
    began = time.monotonic()
    assert "takes longer than 1 s" in (await checker.made("grammar", rules)).mistake
    assert (await checker.made("choice", ["a", "b"])).grammar.startswith("start:")
    began = time.monotonic()
    assert "takes longer than 1 s" in (await checker.made("grammar", rules)).mistake
    assert time.monotonic() - began < 0.5, "it is known"


async def test_a_process_that_ends_is_replaced(checker: Checker) -> None:
    assert (await checker.made("regex", "a+")).grammar
    assert checker._child is not None
    psutil.Process(checker._child.pid).kill()
    assert "cannot be checked" in (await checker.made("regex", "b+")).mistake
    assert (await checker.made("regex", "c+")).grammar
    child = psutil.Process(checker._child.pid)
    checker.close()
    assert not child.is_running()


async def test_little_is_kept_of_what_is_refused_for_its_length(checker: Checker) -> None:
    value: dict[str, Any] = {"enum": ["x" * (1 << 20)]}
    assert "bytes, and may have" in (await checker.made("json", value)).mistake
    assert not checker._known
    assert checker._child is None


async def test_a_wish_is_the_same_whoever_has_it(checker: Checker) -> None:
    first = await checker.made("json", {"type": "integer"})
    assert first == await checker.made("json", {"type": "integer"}) != await checker.made("json", {"type": "integer"}, white_space=" ")
    assert first == Checked(f"start: {first.grammar.removeprefix('start: ')}")
    assert await checker.mistake_in(first.grammar) == ""
    assert json.loads(first.grammar.removeprefix("start: %json "))["type"] == "integer"
