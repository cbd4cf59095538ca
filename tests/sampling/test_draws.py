"""Position-keyed numbers and inverse-CDF draws."""

from __future__ import annotations

import itertools

import pytest
import torch

from engine.sampling.draws import Purpose, draw, favourites, keys_of_round, uniforms
from engine.sequence import choice_key
from tests.reference import uniform


def test_numbers_are_those_of_the_reference() -> None:
    places = list(itertools.product((0, 1, -5, 2**63 - 1, -(2**63)), (0, 3), (0, 1, 77, 10**6), Purpose))
    for seed, choice, position, purpose in places:
        got = uniforms(torch.tensor([choice_key(seed, choice)]), torch.tensor([position]), purpose)
        assert got.item() == uniform(seed, choice, position, purpose)
        assert 0 <= got.item() < 1


def test_numbers_do_not_depend_on_what_is_computed_beside_them() -> None:
    keys = torch.tensor([choice_key(seed, 0) for seed in range(50)])
    positions = torch.arange(50)
    together = uniforms(keys, positions, Purpose.ACCEPT)
    alone = torch.cat([uniforms(keys[i : i + 1], positions[i : i + 1], Purpose.ACCEPT) for i in range(50)])
    assert torch.equal(together, alone)


def test_numbers_are_uniform_and_uncorrelated() -> None:
    """Along positions, seeds, choices and purposes: means, and correlation of neighbours, within five standard errors."""
    num = 20_000
    keys = torch.full((num,), choice_key(3, 0))
    along = {
        "positions": uniforms(keys, torch.arange(num), Purpose.DRAFT),
        "seeds": uniforms(torch.tensor([choice_key(s, 0) for s in range(num)]), torch.zeros(num, dtype=torch.long), Purpose.DRAFT),
        "rounds": uniforms(keys_of_round(keys, torch.arange(num)), torch.full((num,), num), Purpose.DRAFT),
        "choices": uniforms(torch.tensor([choice_key(0, c) for c in range(num)]), torch.zeros(num, dtype=torch.long), Purpose.DRAFT),
    }
    other = uniforms(keys, torch.arange(num), Purpose.ACCEPT)
    standard_error = num**-0.5
    for u in along.values():
        assert abs(u.mean() - 0.5) < 5 * standard_error * 12**-0.5
        assert abs(torch.corrcoef(torch.stack([u[1:], u[:-1]]))[0, 1]) < 5 * standard_error
    for one in (along["positions"], along["rounds"]):
        assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 5 * standard_error


def test_draw_is_the_inverse_cdf() -> None:
    weights = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]]).repeat(6, 1)
    u = torch.tensor([0.0, 0.2499, 0.25, 0.5, 0.9999999, 1 - 2**-53], dtype=torch.float64)
    assert draw(weights, u).tolist() == [1, 1, 3, 3, 3, 3]


def test_draw_never_gives_a_token_without_weight() -> None:
    generator = torch.Generator().manual_seed(1)
    weights = torch.rand(200, 49_152, generator=generator).mul_(torch.rand(200, 49_152, generator=generator) < 0.001)
    for value in (0.0, 0.5, 1 - 2**-53):
        tokens = draw(weights, torch.full((200,), value, dtype=torch.float64))
        assert (weights.gather(-1, tokens.unsqueeze(-1)) > 0).all()


def test_draw_has_the_law_of_its_weights() -> None:
    weights = torch.tensor([0.5, 0.0, 0.3, 0.15, 0.05]).repeat(40_000, 1)
    u = uniforms(torch.full((40_000,), choice_key(9, 1)), torch.arange(40_000), Purpose.RECOVER)
    counts = torch.bincount(draw(weights, u), minlength=5) / 40_000
    assert torch.allclose(counts, weights[0], atol=0.012)
    assert counts[1] == 0


@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_a_row_without_weight_gives_a_token_and_no_error(bad: float) -> None:
    """Rows that are computed beside the wanted ones, and thrown away, may hold anything."""
    assert 0 <= draw(torch.full((1, 7), bad), torch.tensor([0.5], dtype=torch.float64)).item() < 7


@pytest.mark.parametrize("vocab", [1, 24, 128, 130, 1000])
def test_favourites_are_the_first_of_the_largest(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    weights = torch.randint(0, 5, (200, vocab), generator=generator).double().log()  # ties, and absent tokens
    weights[0] = -torch.inf
    assert favourites(weights).tolist() == weights.argmax(-1, keepdim=True).tolist()
    assert favourites(weights[:0]).shape == (0, 1)
