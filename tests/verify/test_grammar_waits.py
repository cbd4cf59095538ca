"""A grammar is compiled beside the steps: who wants it waits, and nobody else does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from llguidance import LLMatcher

from engine.core import EngineCore
from engine.grammar.automaton import Vocabulary
from engine.request import Request, TokenDelta
from tests.reference import answer
from tests.tiny import END, Setup, drive, make_core, naive_target
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
