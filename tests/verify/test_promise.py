"""The promise: a seeded request has the same text alone, in any batch, at any draft length, load or pool, after preemption and restart."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Literal

import msgspec
import pytest
from llguidance import LLMatcher

from engine.config import AdaptiveLengthConfig, ConfidenceLengthConfig, FixedLengthConfig, HeuristicLengthConfig, LengthConfig
from engine.request import Choice, FinishReason, Request, SamplingParams, SpeculationParams
from tests.reference import DRAFT, RECOVER, NaiveModel, answer, model_alone, softmax
from tests.tiny import (
    END,
    ForbidByPosition,
    PenaliseRepeats,
    Setup,
    drive,
    forbid_by_position,
    make_core,
    naive_drafter,
    naive_target,
    penalise_repeats,
)
from tests.verify.requests import greedy, guided, mask_of, prompt, seeded

POLICIES: tuple[LengthConfig, ...] = (
    FixedLengthConfig(max=0),
    FixedLengthConfig(max=1),
    FixedLengthConfig(max=4),
    HeuristicLengthConfig(start=3, max=6),
    ConfidenceLengthConfig(max=5, threshold=0.5),
    ConfidenceLengthConfig(max=5, threshold=0.3, cumulative=True),
    AdaptiveLengthConfig(max=5),
)
SETUPS = {
    "model": Setup(drafter="model"),
    "model, short context": Setup(drafter="model", drafter_context=12),
    "model, lagging": Setup(drafter="model", max_drafter_tokens=3),
    "model, some tokens, copying": Setup(drafter="model", drafted=tuple(range(0, 24, 2)), doubt=0.5),
    "model, states": Setup(drafter="model", reads_states="all"),
    "ngram": Setup(drafter="ngram"),
    "none": Setup(drafter="none"),
}


# of other drafters no policy reads confidence, and without a drafter every policy is length zero
CASES = [
    pytest.param(name, policy, id=f"{name}-{policy.policy}-{policy.max}")
    for name, setup in SETUPS.items()
    for policy in POLICIES
    if setup.drafter == "model" or (policy.policy != "confidence" and (setup.drafter == "ngram" or policy is POLICIES[0]))
]


@pytest.mark.parametrize("verification", ["token", "block"])
@pytest.mark.parametrize("drafter", ["model", "ngram"])
def test_an_answer_ends_where_its_grammar_leads_nowhere_whatever_is_drafted(drafter: str, verification: Literal["token", "block"]) -> None:
    """A grammar may allow a token behind which no token of the model is allowed. A draft that comes upon it, and falls, is no end."""
    grammar = LLMatcher.grammar_from_regex("([a-k]|[l-w]Z)*")  # no token has a Z
    asked = [
        Request(
            id=f"d{i}",
            prompt_ids=prompt(i),
            grammar=grammar,
            sampling=SamplingParams(max_tokens=8, temperature=i % 2, seed=i, is_seeded=verification == "token", stop_token_ids=(END,)),
        )
        for i in range(24)
    ]
    if verification == "block":  # whose text is another one at each length, but where it is greedy
        asked = [request for request in asked if request.sampling.is_greedy]
    none, some = (
        drive(make_core(Setup(drafter=drafter, policy=FixedLengthConfig(max=most), verification=verification)), asked) for most in (0, 3)
    )
    assert (some.tokens, some.reasons) == (none.tokens, none.reasons)
    assert FinishReason.ERROR in none.reasons.values()


def drafter_of(setup: Setup) -> NaiveModel | None:
    return naive_drafter(setup.drafter_context, setup.drafted, setup.doubt) if setup.drafter == "model" else None


def promised(setup: Setup) -> list[Request]:
    """A token rule over drafts without probabilities has a law that depends on the draft: its text is not promised."""
    return [r for r in seeded() if setup.drafter == "model" or not r.speculation.rule.startswith("token_")]


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_same_text_at_any_length_budget_and_pool(name: str, policy: LengthConfig) -> None:
    requests = guided(promised(SETUPS[name]))
    want = {(r.id, 0): answer(r, naive_target(), drafter_of(SETUPS[name]), mask=mask_of(r)) for r in requests}
    for i, ((num_blocks, block_size), budget) in enumerate(itertools.product(((13, 2), (7, 4), (200, 4)), (3, 7, 64))):
        setup = replace(
            SETUPS[name],
            policy=policy,
            num_blocks=num_blocks,
            block_size=block_size,
            max_step_tokens=budget,
            max_sequences=(8, 1)[i % 2],
        )
        got = drive(make_core(setup), requests).tokens
        assert got == want, (setup, [k for k in want if got[k] != want[k]])


@pytest.mark.parametrize(("name", "policy"), CASES)
def test_masks_and_penalties_see_the_text_in_front_of_every_row(name: str, policy: LengthConfig) -> None:
    """A mask that moves with the position and a penalty on repeats, for drafter and target, at every draft length."""
    setup = replace(SETUPS[name], policy=policy, max_step_tokens=16, processors=(PenaliseRepeats(), ForbidByPosition()))
    requests = promised(setup)
    want = {(r.id, 0): answer(r, naive_target(), drafter_of(setup), mask=forbid_by_position, penalty=penalise_repeats) for r in requests}
    got = drive(make_core(setup), requests).tokens
    assert got == want, [k for k in want if got[k] != want[k]]


@pytest.mark.parametrize("name", SETUPS)
def test_logprobs_are_the_targets_own_whoever_wrote_the_token(name: str) -> None:
    requests = [
        msgspec.structs.replace(r, sampling=msgspec.structs.replace(r.sampling, num_logprobs=i % 4 if i % 5 else None))
        for i, r in enumerate(seeded())
    ]
    outcome = drive(make_core(SETUPS[name]), requests)
    for request in requests:
        emitted, found = outcome.tokens[request.id, 0], outcome.logprobs[request.id, 0]
        num = request.sampling.num_logprobs
        assert len(found) == (0 if num is None else len(emitted))
        for i, token in enumerate(found):
            row = [math.log(x) for x in softmax(naive_target().logits([*request.prompt_ids, *emitted[:i]]))]
            assert token.logprob == pytest.approx(row[emitted[i]], abs=1e-6)
            likeliest = sorted(range(len(row)), key=lambda t: -row[t])[:num]
            assert [t for t, _ in token.top] == likeliest
            assert [x for _, x in token.top] == pytest.approx([row[t] for t in likeliest], abs=1e-6)


@pytest.mark.parametrize("name", SETUPS)
def test_alone_is_the_same_as_in_a_batch(name: str) -> None:
    core = make_core(SETUPS[name])
    for request in guided(promised(SETUPS[name])):
        got = drive(core, [request]).tokens
        assert got == {(request.id, 0): answer(request, naive_target(), drafter_of(SETUPS[name]), mask=mask_of(request))}


def test_a_restart_continues_with_the_same_text() -> None:
    neighbours = seeded()[:3]
    for request in seeded():
        want = answer(request, naive_target(), naive_drafter())
        for cut in range(1, len(want), 3):
            rest = msgspec.structs.replace(request, id="rest", choices=(Choice(0, want[:cut]),))
            got = drive(make_core(Setup(num_blocks=13)), [*neighbours, rest]).tokens
            assert got["rest", 0] == want[cut:]


def test_choices_have_their_own_numbers_and_share_the_prompt() -> None:
    sampling = SamplingParams(max_tokens=9, temperature=1.0, seed=3, is_seeded=True)
    request = Request(id="x", prompt_ids=prompt(4), sampling=sampling, choices=tuple(Choice(i) for i in range(5)))
    outcome = drive(make_core(Setup()), [request])
    assert outcome.tokens == {(request.id, i): answer(request, naive_target(), naive_drafter(), choice=i) for i in range(5)}
    assert len(set(outcome.tokens.values())) > 1
    shared = (len(request.prompt_ids) - 1) // 4 * 4
    assert shared == 8
    assert sum(s.num_prefix_hit_tokens for s in outcome.steps) == 4 * shared, "four siblings reuse the first one's blocks"


def test_a_rule_that_never_defers_is_the_drafter_alone() -> None:
    """Only with a bonus token that is one more draft: else every K+1-th token would be the target's."""
    requests = [msgspec.structs.replace(r, speculation=SpeculationParams(rule="keep_all")) for r in seeded()]
    want = {(r.id, 0): model_alone(r, naive_drafter(), DRAFT) for r in requests}
    for policy in POLICIES:
        assert drive(make_core(Setup(policy=policy)), requests).tokens == want


def test_speculation_off_is_the_target_alone() -> None:
    requests = [msgspec.structs.replace(r, speculation=SpeculationParams(enabled=False)) for r in seeded()]
    want = {(r.id, 0): model_alone(r, naive_target(), RECOVER) for r in requests}
    for setup in SETUPS.values():
        outcome = drive(make_core(setup), requests)
        assert outcome.tokens == want
        assert not outcome.rounds


def test_length_zero_is_no_drafter_for_unseeded_requests() -> None:
    requests = [
        msgspec.structs.replace(
            r, sampling=msgspec.structs.replace(r.sampling, is_seeded=False), speculation=SpeculationParams(rule="exact")
        )
        for r in seeded()
    ]
    without = drive(make_core(Setup(drafter="none")), requests).tokens
    assert drive(make_core(Setup(policy=FixedLengthConfig(max=0))), requests).tokens == without


@pytest.mark.parametrize("max_drafter_tokens", [None, 3])
def test_a_drafter_that_leaves_prompts_for_later_says_the_same(max_drafter_tokens: int | None) -> None:
    """Whether drafts are expected changes from step to step, as it does with the number of sequences."""
    setup = Setup(drafter="model", policy=FixedLengthConfig(max=3), max_step_tokens=7, max_drafter_tokens=max_drafter_tokens)
    requests = [*greedy(8), *promised(setup)]
    want = {(r.id, 0): answer(r, naive_target(), drafter_of(setup) if r.sampling.is_seeded else None) for r in requests}
    for expected in (itertools.repeat(False), itertools.cycle((True, False, False))):
        core = make_core(setup)
        core._parts.scheduler.policy.expects_drafts = lambda num_seqs, expected=expected: next(expected)  # type: ignore[method-assign,misc]
        outcome = drive(core, requests)
        assert outcome.tokens == want
        assert sum(became.num_draft for became in outcome.rounds), "it catches up when it drafts"
