"""What alpha does to each rule: its ends through the whole engine, its direction, its bounds."""

from __future__ import annotations

import itertools
from typing import get_args

import msgspec
import pytest
import torch

from engine.config import FixedLengthConfig, RuleName
from engine.dials import DIALS
from engine.request import Request, SamplingParams, SpeculationParams
from engine.verify.rules import RULES
from tests.reference import DRAFT, KEEPS, NEEDS_NO_Q, Pair, answer, model_alone, pi_of, softmax
from tests.tiny import Setup, drive, make_core, naive_drafter, naive_target
from tests.verify import requests

POSITION_RULES = ("chow", "diff", "opt", "chow_log", "diff_log", "bild")
TOKEN_RULES = ("token_v1", "token_v2", "token_v3")
CASCADES = tuple(rule for rule in DIALS if rule != "exact")


def seeded_under(rule: str, alpha: float) -> list[Request]:
    """Requests of every way of sampling, under one rule."""
    found = {request.sampling.temperature: request for request in requests.seeded()}
    return [msgspec.structs.replace(request, speculation=SpeculationParams(rule=rule, alpha=alpha)) for request in found.values()]


def test_every_rule_has_a_dial_a_name_in_configs_and_an_oracle() -> None:
    assert tuple(DIALS) == tuple(RULES) == get_args(RuleName)
    assert set(DIALS) <= set(KEEPS)
    for name, dial in DIALS.items():
        assert dial.needs_q == RULES[name].needs_q == (name not in NEEDS_NO_Q), name
        assert dial.mistake(dial.default) is None
        assert dial.mistake(dial.target_at) is None
        assert RULES[name].__doc__


def test_a_bound_is_named() -> None:
    assert DIALS["token_v3"].mistake(1.5) == "must be at most 1"
    assert DIALS["token_v3"].mistake(-1.5) == "must be at least -1"
    assert DIALS["token_v3"].mistake(0.5, highest=0.4) == "must be at most 0.4"
    assert DIALS["token_v3"].mistake(float("nan")) is not None
    assert DIALS["opt"].mistake(-1e9) is None


@pytest.mark.parametrize("max_draft", [0, 1, 4])
@pytest.mark.parametrize("rule", CASCADES)
def test_at_one_end_the_drafter_writes_alone(rule: str, max_draft: int) -> None:
    """Only with a bonus token that is one more draft: else every K+1-th token would be the target's."""
    asked = seeded_under(rule, DIALS[rule].drafter_at)
    if rule == "lossy":  # it trades probabilities of the rows that are sampled from, so a truncated target still has its say
        asked = [request for request in asked if request.sampling.top_p == 1 and not request.sampling.min_p]
    want = {(request.id, 0): model_alone(request, naive_drafter(), DRAFT) for request in asked}
    got = drive(make_core(Setup(policy=FixedLengthConfig(max=max_draft))), asked)
    assert got.tokens == want
    assert all(became.num_accepted == became.num_draft for became in got.rounds)


@pytest.mark.parametrize("rule", CASCADES)
def test_at_the_other_end_the_text_is_that_of_exact(rule: str) -> None:
    asked = seeded_under(rule, DIALS[rule].target_at)
    want = {(r.id, 0): answer(msgspec.structs.replace(r, speculation=SpeculationParams()), naive_target(), naive_drafter()) for r in asked}
    assert drive(make_core(Setup()), asked).tokens == want


@pytest.mark.parametrize("rule", CASCADES)
def test_at_that_end_penalties_and_biases_count(rule: str) -> None:
    """Rules compare rows in front of them; greedy, the target's favourite there need not be the token that it takes."""
    asked = [
        Request(
            id=f"g{i}",
            prompt_ids=requests.prompt(i),
            sampling=SamplingParams(max_tokens=12, temperature=0.0, **requests.wishes(i, every=1)),
            speculation=SpeculationParams(rule=rule, alpha=DIALS[rule].target_at),
        )
        for i in range(24)
    ]
    want = {(r.id, 0): answer(msgspec.structs.replace(r, speculation=SpeculationParams()), naive_target()) for r in asked}
    assert drive(make_core(Setup()), asked).tokens == want


@pytest.mark.parametrize(("rule", "alpha"), [entry for entry in requests.RULES if entry[0] in CASCADES])
def test_in_between_a_rule_keeps_some_and_defers_some(rule: str, alpha: float) -> None:
    """Or the tests of the promise would hold for rules that do nothing."""
    rounds = drive(make_core(Setup()), seeded_under(rule, alpha)).rounds
    num_verified = sum(min(became.num_accepted + 1, became.num_draft) for became in rounds)
    num_deferred = sum(became.deferred_mask.bit_count() for became in rounds)
    num_lossy = sum(became.lossy_mask.bit_count() for became in rounds)
    assert num_lossy > 0
    if rule != "lossy":  # it keeps nothing but in greedy rows
        assert 0 < num_deferred < num_verified


def acceptance(rule: str, alpha: float, at: Pair) -> float:
    """Probability that a draft stands: sum of min(q, pi)."""
    return sum(min(a, b) for a, b in zip(at.q, pi_of(rule, alpha, at), strict=True))


def random_pair(seed: int) -> Pair:
    generator = torch.Generator().manual_seed(seed)
    q, p = (softmax(tuple((2 * torch.randn(5, generator=generator, dtype=torch.float64)).tolist())) for _ in range(2))
    return Pair(q, p, q, p)


@pytest.mark.parametrize("rule", [*POSITION_RULES, "lossy"])
def test_a_larger_alpha_never_accepts_less(rule: str) -> None:
    for seed in range(200):
        at = random_pair(seed)
        rates = [acceptance(rule, alpha, at) for alpha in (-0.5, 0.0, 0.1, 0.3, 0.6, 0.9, 1.0) if DIALS[rule].mistake(alpha) is None]
        assert all(b >= a - 1e-12 for a, b in itertools.pairwise(rates)), (seed, rates)


@pytest.mark.parametrize("rule", TOKEN_RULES)
def test_a_larger_keep_set_of_tokens_can_accept_less(rule: str) -> None:
    """One more token in A lowers eta, the share of p that the others get; so acceptance is not monotone in alpha."""
    counter_examples = 0
    for seed in range(3000):
        at = random_pair(seed)
        rates = [acceptance(rule, alpha / 20, at) for alpha in range(21)]
        counter_examples += any(b < a - 1e-9 for a, b in itertools.pairwise(rates))
    assert counter_examples > 0


def test_disagreement_makes_opt_defer_less() -> None:
    """Deferring where the two disagree costs a rejection: the sign that is easily turned round."""
    raw_q, raw_p = (0.5, 0.3, 0.2), (0.6, 0.2, 0.2)
    near, far = Pair(raw_q, raw_p, raw_q, raw_p), Pair(raw_q, raw_p, (1.0, 0.0, 0.0), (0.0, 1.0, 0.0))
    assert pi_of("opt", 0.5, near) == near.p
    assert pi_of("opt", 0.5, far) == far.q
