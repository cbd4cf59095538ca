"""A grammar is compiled beside the steps: who wants it waits, and nobody else does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import msgspec
import pytest
from llguidance import LLMatcher

from engine.core import EngineCore
from engine.grammar.automaton import Vocabulary
from engine.request import FinishReason, Request, TokenDelta
from tests.reference import answer
from tests.tiny import END, Setup, drive, letters, make_core, naive_target
from tests.verify.requests import PATTERNS, greedy, mask_of

TIMEOUT = 20


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """No grammar is compiled before it is set."""
    gate = threading.Event()

    def late(*args: Any, **options: Any) -> LLMatcher:
        assert gate.wait(TIMEOUT)
        return LLMatcher(*args, **options)

    monkeypatch.setattr("engine.grammar.automaton.LLMatcher", late)
    return gate


def ruled(i: int, pattern: str) -> Request:
    request = greedy(8)[i]
    sampling = msgspec.structs.replace(request.sampling, min_tokens=0, stop_token_ids=(END,))
    return msgspec.structs.replace(request, grammar=LLMatcher.grammar_from_regex(pattern), sampling=sampling)


def step_until(core: EngineCore, is_enough: Callable[[list[TokenDelta]], bool]) -> list[TokenDelta]:
    deltas: list[TokenDelta] = []
    for _ in range(TIMEOUT * 1000):
        deltas += core.step().deltas
        core.check()
        if is_enough(deltas):
            return deltas
    raise AssertionError("too many steps")


def is_over(deltas: list[TokenDelta]) -> bool:
    return any(delta.finish_reason is not None for delta in deltas)


@pytest.mark.parametrize("drafter", ["none", "ngram", "model"])
def test_others_are_answered_meanwhile(drafter: str, gate: threading.Event) -> None:
    core, (plain, waiting) = make_core(Setup(drafter=drafter)), (greedy(8)[0], ruled(1, PATTERNS[0]))
    core.add(waiting)
    core.add(plain)
    deltas = step_until(core, is_over)
    assert {delta.request_id for delta in deltas} == {plain.id}
    output = core.step()  # nobody can run: a short wait, and nothing is learnt of costs
    assert not output.deltas
    assert (output.stats.num_waiting, output.stats.num_waiting_for_leader, output.stats.num_target_tokens) == (1, 1, 0)
    gate.set()
    rest = step_until(core, is_over)
    assert tuple(t for delta in rest for t in delta.token_ids) == answer(waiting, naive_target(), mask=mask_of(waiting))


def test_who_leaves_meanwhile_keeps_nobody(gate: threading.Event) -> None:
    core, first, second = make_core(Setup()), ruled(1, PATTERNS[0]), ruled(2, PATTERNS[2])
    for request in (first, second):
        core.add(request)
    core.step()
    core.abort(first.id, 0)
    gate.set()
    deltas = step_until(core, is_over)
    assert {delta.request_id for delta in deltas} == {second.id}
    assert not core.has_work


def test_a_grammar_is_compiled_once_and_kept_while_it_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """More grammars than are kept, in a pool in which they are preempted."""
    grammars, compiling = list[str](), Vocabulary.compiling

    def noted(vocabulary: Vocabulary, grammar: str) -> object:
        grammars.append(grammar)
        return compiling(vocabulary, grammar)

    monkeypatch.setattr(Vocabulary, "compiling", noted)
    monkeypatch.setattr("engine.grammar.automaton._NUM_COMPILED", 1)
    requests = [ruled(i, pattern) for i, pattern in enumerate(PATTERNS)]
    twins = [msgspec.structs.replace(request, id=f"twin of {request.id}") for request in requests]
    pairs = [request for pair in zip(requests, twins, strict=True) for request in pair]
    outcome = drive(make_core(Setup(num_blocks=7, max_step_tokens=7, max_sequences=4)), pairs)
    assert outcome.tokens == {(r.id, 0): answer(r, naive_target(), mask=mask_of(r)) for r in pairs}
    assert sum(step.num_preemptions for step in outcome.steps) > 0
    assert len(grammars) < len(pairs), "twins share what was compiled"


def test_a_grammar_is_begun_before_there_is_a_place(gate: threading.Event, monkeypatch: pytest.MonkeyPatch) -> None:
    grammars, compiling = list[str | None](), Vocabulary.compiling

    def noted(vocabulary: Vocabulary, grammar: str) -> object:
        grammars.append(grammar)
        return compiling(vocabulary, grammar)

    monkeypatch.setattr(Vocabulary, "compiling", noted)
    core, first, second = make_core(Setup(drafter="none", max_sequences=1)), ruled(1, PATTERNS[0]), ruled(2, PATTERNS[2])
    core.add(greedy(8)[0])
    core.step()
    core.add(first)
    core.add(second)
    assert grammars == [first.grammar], "with its request"
    gate.set()
    step_until(core, lambda deltas: any(delta.request_id == first.id for delta in deltas))
    assert grammars == [first.grammar, second.grammar], "while the one in front of it has the place"


class Panic(BaseException):
    """What a library in Rust may raise."""


@pytest.mark.parametrize("error", [ValueError("a bug"), Panic("a bug"), None], ids=["error", "panic", "no thread"])
def test_a_grammar_that_cannot_be_compiled_ends_one_answer(error: BaseException | None, monkeypatch: pytest.MonkeyPatch) -> None:
    failures, start, size = 1, threading.Thread.start, threading.stack_size()

    def is_due() -> bool:
        nonlocal failures
        failures -= 1
        return failures >= 0

    def failing(*args: Any, **options: Any) -> LLMatcher:
        if error is not None and is_due():
            raise error
        return LLMatcher(*args, **options)

    def started(thread: threading.Thread) -> None:
        if error is None and thread.name == "grammar" and is_due():
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr("engine.grammar.automaton.LLMatcher", failing)
    monkeypatch.setattr(threading.Thread, "start", started)
    core, plain, unlucky = make_core(Setup()), greedy(8)[0], ruled(1, PATTERNS[0])
    again = msgspec.structs.replace(unlucky, id="again")
    for request in (unlucky, plain, again):
        core.add(request)
    deltas = step_until(core, lambda deltas: sum(delta.finish_reason is not None for delta in deltas) == 3)
    tokens = {
        request.id: tuple(t for d in deltas if d.request_id == request.id for t in d.token_ids) for request in (unlucky, plain, again)
    }
    reasons = {delta.request_id: delta.finish_reason for delta in deltas if delta.finish_reason is not None}
    assert (tokens[unlucky.id], reasons[unlucky.id]) == ((), FinishReason.ERROR)
    assert FinishReason.ERROR not in (reasons[plain.id], reasons[again.id])
    assert tokens[plain.id] == answer(plain, naive_target())
    assert tokens[again.id] == answer(again, naive_target(), mask=mask_of(again)), "another one tries anew"
    assert threading.stack_size() == size


def test_one_at_a_time_changes_the_size_of_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    start, both, grammar = threading.Thread.start, threading.Barrier(2), LLMatcher.grammar_from_regex("a")
    vocabulary, num_together = letters(), 0

    def started(thread: threading.Thread) -> None:
        nonlocal num_together
        if thread.name == "grammar":
            with suppress(threading.BrokenBarrierError):
                both.wait(0.3)
                num_together += 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", started)
    threads = [threading.Thread(target=vocabulary.matcher, args=(grammar,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT)
    assert num_together == 0
