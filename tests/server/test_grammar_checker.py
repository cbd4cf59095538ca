"""Wishes that take for ever, or end the process that looks at them: refused, and nobody else waits for long. The process is real."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from engine.errors import QueueFull
from engine.grammar.automaton import Vocabulary
from server.errors import NotChecked
from server.grammar_checker import Checked, Checker
from server.grammar_child import answer_to

END = 2


@pytest.fixture
async def checker(folder: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Checker]:
    monkeypatch.setattr("server.grammar_checker._PATIENCE", 60)  # what a busy machine has no time for is a test of its own
    made = Checker(folder, (END,), seconds=1)
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
    """Converting thousands of rules takes seconds. What is known is told while that goes on."""
    rules = "root ::= r0\n" + "\n".join(f'r{i} ::= "x" r{i + 1}?' for i in range(6000)) + '\nr6000 ::= "y"'
    known = await checker.made("choice", ["a", "b"])
    monster = asyncio.ensure_future(checker.made("grammar", rules))
    await asyncio.sleep(0.2)
    assert known == await checker.made("choice", ["a", "b"])
    assert not monster.done()
    assert (await checker.made("choice", ["a", "c"])).grammar.startswith("start:")
    assert "takes longer than 1 s" in (await monster).mistake
    began = time.monotonic()
    assert "takes longer than 1 s" in (await checker.made("grammar", rules)).mistake
    assert time.monotonic() - began < 0.9, "it is known"


async def test_a_process_that_ended_is_replaced_and_nobody_is_blamed(checker: Checker) -> None:
    assert (await checker.made("regex", "a+")).grammar
    assert checker._child is not None
    psutil.Process(checker._child.pid).kill()
    assert (await checker.made("regex", "b+")).grammar


async def test_a_wish_that_ends_two_processes_is_to_blame(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Checker(folder, (END,))) as checker:
        asked = checker._answer_to

        def killed(question: bytes) -> Mapping[str, str]:
            assert checker._child is not None
            if b"poison" in question:
                checker._child.kill()
            return asked(question)

        monkeypatch.setattr(checker, "_answer_to", killed)
        assert (await checker.made("regex", "a+")).grammar
        assert "cannot be checked" in (await checker.made("regex", "poison")).mistake


async def test_a_process_that_cannot_be_started_is_the_machines_fault_and_not_remembered(folder: Path) -> None:
    with closing(Checker(folder, (END,))) as checker:
        command, checker._command = checker._command, ("/nowhere",)
        with pytest.raises(NotChecked):
            await checker.made("regex", "a+")
        checker._command = command
        assert (await checker.made("regex", "a+")).grammar


async def test_a_process_that_gets_no_processor_is_the_machines_fault_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Checker(folder, (END,), seconds=1)) as checker:
        await checker.made("regex", "a+")
        assert checker._child is not None
        psutil.Process(checker._child.pid).suspend()
        with monkeypatch.context() as patch:
            patch.setattr("server.grammar_checker._PATIENCE", 0.2)
            with pytest.raises(NotChecked):
                await checker.made("regex", "b+")
        assert (await checker.made("regex", "b+")).grammar, "which is not remembered"


async def test_an_answer_that_is_none_is_not_the_next_ones(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(Checker(folder, (END,))) as checker, monkeypatch.context() as patch:
        patch.setattr("server.grammar_checker.json.loads", lambda text: {"no": "answer"})
        with pytest.raises(TypeError):
            await checker.made("regex", "a+")
        patch.undo()
        assert "b" in (await checker.made("regex", "b+")).grammar


async def test_closing_ends_a_check_and_what_waits(folder: Path) -> None:
    checker = Checker(folder, (END,), seconds=60)
    await checker.made("regex", "a+")
    assert checker._child is not None
    child = psutil.Process(checker._child.pid)
    child.suspend()
    asked = [asyncio.ensure_future(checker.made("regex", f"a{{{i}}}")) for i in range(1, 3)]
    await asyncio.sleep(0.1)
    checker.close()
    for wish in asked:
        with pytest.raises(NotChecked):
            await wish
    assert not child.is_running()
    with pytest.raises(NotChecked):
        await checker.made("regex", "b+")


async def test_too_many_wishes_are_too_many(folder: Path) -> None:
    with closing(Checker(folder, (END,))) as checker:
        found = await asyncio.gather(*(checker.made("regex", f"a{{{i}}}") for i in range(1, 90)), return_exceptions=True)
        assert {type(one) for one in found} == {Checked, QueueFull}


async def test_ctrl_c_is_the_servers_business(checker: Checker) -> None:
    await checker.made("regex", "a+")
    assert checker._child is not None
    checker._child.send_signal(signal.SIGINT)
    child = checker._child
    assert (await checker.made("regex", "b+")).grammar
    assert checker._child is child


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
