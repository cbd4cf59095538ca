"""Which points a curve has."""

from __future__ import annotations

import pytest

from benchmarks.errors import BenchmarkError
from benchmarks.evaluate.points import GRIDS, choose
from engine.dials import DIALS


def labels(rules: str = "token_v3", alphas: str | None = None, is_quick: bool = False) -> list[str]:
    return [point.label for point in choose(rules, alphas, "model", has_probabilities=True, is_quick=is_quick).chosen]


def test_every_rule_has_a_grid_within_its_bounds_that_holds_its_default() -> None:
    assert GRIDS.keys() == DIALS.keys() - {"exact"}
    for rule, grid in GRIDS.items():
        assert DIALS[rule].default in grid
        assert list(grid) == sorted(set(grid))
        assert not any(DIALS[rule].mistake(alpha) for alpha in grid)
        assert DIALS[rule].target_at < grid[0]
        assert grid[-1] < DIALS[rule].drafter_at


def test_ends_exact_and_the_baseline_are_always_there() -> None:
    lossy = [f"lossy={alpha:g}" for alpha in GRIDS["lossy"]]
    assert labels() == ["target", "exact", *lossy, *(f"token_v3={alpha:g}" for alpha in GRIDS["token_v3"]), "drafter"]
    assert labels("exact", "lossy=0.3") == ["target", "exact", "lossy=0.3", "drafter"]
    assert len(labels("all")) == 3 + sum(map(len, GRIDS.values()))


def test_alphas_are_given_by_rule() -> None:
    assert labels("token_v3,opt", "token_v3=0.05, 0.1;opt=-0.5;lossy=0.5") == [
        "target", "exact", "lossy=0.5", "token_v3=0.05", "token_v3=0.1", "opt=-0.5", "drafter",
    ]  # fmt: skip
    assert labels(is_quick=True) == ["target", "exact", "lossy=0.2", "token_v3=0.2", "drafter"]


def test_without_probabilities_some_points_are_skipped_with_a_reason() -> None:
    found = choose("token_v2,opt", None, "ngram", has_probabilities=False)
    assert {point.rule for point in found.chosen} == {"exact", "token_v2"}
    assert found.skipped.keys() == {"lossy", "opt", "drafter"}
    assert found.skipped["opt"] == "it reads the drafter's probabilities, and a drafter of kind ngram has none"


@pytest.mark.parametrize(
    ("rules", "alphas", "message"),
    [
        ("tokenv3", None, "--rules tokenv3: there is no such rule"),
        ("opt", "token_v3=0.1", "'token_v3' is not among lossy, opt"),
        ("opt", "opt", "'opt' has no ="),
        ("opt", "opt=x", "--alphas opt=x: not a number"),
        ("opt", "opt=inf", "--alphas opt=inf: must be finite"),
        ("token_v3", "token_v3=2", "--alphas token_v3=2: must be at most 1"),
        ("opt", "opt=1;opt=2", "opt is there twice"),
    ],
)
def test_mistakes_are_named(rules: str, alphas: str | None, message: str) -> None:
    with pytest.raises(BenchmarkError, match=message):
        labels(rules, alphas)


def test_a_curve_needs_a_drafter() -> None:
    with pytest.raises(BenchmarkError, match=r"model\.drafter: none"):
        choose("exact", None, "none", has_probabilities=False)
