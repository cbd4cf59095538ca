"""The one matrix: every drafter, chunk size, block size, pool, batch and draft length gives the naive loop's text, token for token.

A later feature adds a column here and changes nothing else.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest

from engine.config import AdaptiveLengthConfig, ConfidenceLengthConfig, FixedLengthConfig, HeuristicLengthConfig, LengthConfig
from tests.reference import answer
from tests.tiny import ARCHITECTURES, WINDOW, Setup, drive, make_core, naive_target, target_model
from tests.verify.requests import greedy, guided, mask_of

DRAFTERS = {
    "none": Setup(drafter="none"),
    "ngram": Setup(drafter="ngram"),
    "model": Setup(drafter="model"),
    "model, short context": Setup(drafter="model", drafter_context=12),
    "model, lagging": Setup(drafter="model", max_drafter_tokens=3),
    "model, some tokens, copying": Setup(drafter="model", drafted=tuple(range(0, 24, 2)), doubt=0.5),
    "model, states": Setup(drafter="model", reads_states="all"),
    "model, states, copying": Setup(drafter="model", reads_states="first", drafted=tuple(range(0, 24, 2)), doubt=0.5),
    "model, block": Setup(drafter="model", verification="block"),
    "ngram, block": Setup(drafter="ngram", verification="block"),
}
POLICIES: tuple[LengthConfig, ...] = (
    FixedLengthConfig(max=0),
    FixedLengthConfig(max=1),
    FixedLengthConfig(max=4),
    HeuristicLengthConfig(start=2, max=5),
    ConfidenceLengthConfig(max=5, threshold=0.5),
    AdaptiveLengthConfig(max=5),
)


@pytest.mark.parametrize("max_step_tokens", [3, 7, 32])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_greedy_text_is_that_of_the_naive_loop(drafter: str, max_step_tokens: int) -> None:
    preemptions = reused = 0
    for policy, block_size, num_requests in itertools.product(POLICIES, (2, 4), (1, 3, 8)):
        requests = guided(greedy(num_requests))
        want = {(r.id, 0): answer(r, naive_target(), mask=mask_of(r)) for r in requests}
        longest = max(len(r.prompt_ids) + r.sampling.max_tokens for r in requests)
        for num_blocks in (-(-longest // block_size), 200):  # the smaller pool holds the longest request and nothing beside it
            setup = replace(DRAFTERS[drafter], policy=policy, block_size=block_size, num_blocks=num_blocks, max_step_tokens=max_step_tokens)
            outcome = drive(make_core(setup), requests)
            assert outcome.tokens == want, setup
            preemptions += sum(step.num_preemptions for step in outcome.steps)
            reused += sum(step.num_prefix_hit_tokens for step in outcome.steps)
    assert preemptions > 0, "the small pool did not force a preemption"
    assert reused > 0, "no block was reused"


@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES.keys() - {"llama"}))
def test_greedy_text_of_every_architecture_is_that_of_the_naive_loop(architecture: str, drafter: str) -> None:
    requests = greedy(8)
    want = {(r.id, 0): answer(r, naive_target(architecture)) for r in requests}
    assert min(len(r.prompt_ids) + len(want[r.id, 0]) for r in requests) > WINDOW
    base = replace(DRAFTERS[drafter], architecture=architecture, block_size=2)
    preemptions = 0
    for policy, num_blocks, max_step_tokens in ((POLICIES[2], 12, 7), (POLICIES[3], 200, 32)):
        setup = replace(base, policy=policy, num_blocks=num_blocks, max_step_tokens=max_step_tokens)
        outcome = drive(make_core(setup), requests)
        assert outcome.tokens == want, setup
        preemptions += sum(step.num_preemptions for step in outcome.steps)
    assert preemptions > 0, "the small pool did not force a preemption"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_drafts_are_accepted_and_rejected(architecture: str) -> None:
    """The matrix proves nothing if the drafter is always right or never."""
    rounds = drive(make_core(Setup(architecture=architecture)), greedy(8)).rounds
    drafted, accepted = sum(r.num_draft for r in rounds), sum(r.num_accepted for r in rounds)
    assert 0.1 * drafted < accepted < 0.9 * drafted


def test_a_drafter_that_is_the_target_is_always_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.tiny.drafter_model", target_model)
    outcome = drive(make_core(Setup()), greedy(8))
    assert outcome.rounds
    assert all(r.num_accepted == r.num_draft for r in outcome.rounds)
