"""Who an engine says that its passes are for: what is under suspicion when it is lost. The core is real, its models are tiny."""

from __future__ import annotations

import msgspec
from llguidance import LLMatcher

from engine.core import EngineCore
from tests.tiny import Setup, make_core
from tests.unit.factories import make_request

SETUP = Setup(drafter="none", max_sequences=4, block_size=4)


def watched(setup: Setup) -> tuple[EngineCore, list[tuple[str, ...]]]:
    core, told = make_core(setup), list[tuple[str, ...]]()
    core.watch(told.append)
    return core, told


def test_a_younger_request_that_runs_in_front_of_choices_that_wait_is_named() -> None:
    """Three of the four choices wait for the first to compute their prompt, so the other request is in the first pass, too."""
    core, told = watched(SETUP)
    core.add(make_request("four choices", prompt=tuple(range(1, 10)), num_choices=4, max_tokens=3))
    core.add(make_request("younger", prompt=(3,), max_tokens=3))
    core.step()
    assert told == [("four choices", "younger")]


def test_whose_grammar_is_made_ready_is_named_before_that_begins() -> None:
    core, told = watched(SETUP)
    core.add(make_request("plain", max_tokens=4))
    core.step()
    grammar = LLMatcher.grammar_from_regex("[a-c]+")
    core.add(msgspec.structs.replace(make_request("held", max_tokens=2), grammar=grammar))
    assert told == [("plain",), ("plain", "held")]
    while core.has_work:
        core.step()
    core.add(make_request("given up", max_tokens=4))
    core.abort("given up", 0)
    core.add(make_request("given up", max_tokens=4))
    core.step()
    assert told[-1] == ("given up",)


def test_a_change_is_told_once_and_anew_behind_a_rest() -> None:
    core, told = watched(SETUP)
    for _ in range(2):
        core.add(make_request("a", max_tokens=3))
        core.step()
        core.add(make_request("b", max_tokens=1))
        while core.has_work:
            core.step()
    assert told == [("a",), ("a", "b"), ("a",)] * 2
