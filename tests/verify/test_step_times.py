"""What every step of a real engine says of its own time, drafts and answers adds up, with and without a drafter."""

from __future__ import annotations

import pytest

from engine.config import FixedLengthConfig
from tests.tiny import Setup, drive, make_core
from tests.verify.requests import greedy


@pytest.mark.parametrize("drafter", ["none", "ngram", "model"])
def test_the_parts_of_a_step_are_all_of_it(drafter: str) -> None:
    core = make_core(Setup(drafter=drafter, policy=FixedLengthConfig(max=4), num_blocks=12, block_size=4))
    outcome = drive(core, greedy(8))
    for step in outcome.steps:
        parts = step.schedule_seconds + step.draft_seconds + step.verify_seconds
        assert parts == pytest.approx(step.step_seconds)
        assert min(step.schedule_seconds, step.draft_seconds, step.verify_seconds, step.wait_seconds) >= 0
        assert step.num_waiting == (
            step.num_waiting_for_place + step.num_waiting_for_memory + step.num_waiting_for_leader + step.num_waiting_for_budget
        )
        assert step.num_used_blocks + step.num_cached_blocks <= step.num_blocks
    assert sum(step.num_draft_tokens for step in outcome.steps) == sum(r.num_draft for r in outcome.rounds)
    assert sum(step.num_accepted_tokens for step in outcome.steps) == sum(r.num_accepted for r in outcome.rounds)
    assert sum(sum(step.draft_lengths[1:]) for step in outcome.steps) >= len(outcome.rounds)
    assert any(step.num_waiting for step in outcome.steps), "the pool was to be too small"


def test_without_drafts_the_estimate_is_the_step_itself() -> None:
    outcome = drive(make_core(Setup(drafter="none")), greedy(3))
    for step in outcome.steps:
        assert step.undrafted_seconds == pytest.approx(step.step_seconds - step.draft_seconds)


def test_an_idle_stretch_belongs_to_the_step_that_ends_it() -> None:
    core = make_core(Setup(drafter="none"))
    drive(core, greedy(1))
    core._ended -= 100
    first, *others = drive(core, greedy(1)).steps
    assert first.wait_seconds > 100
    assert all(step.wait_seconds < 50 for step in others)
