"""Figures, against values that were computed by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from benchmarks.evaluate.figures import LENGTH, NATS, REPETITION, TIME, PointFigures, Quality, figures_of, recommend
from benchmarks.evaluate.points import EXACT, TARGET, Point
from benchmarks.evaluate.texts import common_prefix, distinct, repetition
from benchmarks.stats import estimate_difference_per
from tests.evaluate.records import make_record

CASCADE = Point("rule", "token_v3", 0.2)


def test_common_prefix() -> None:
    assert common_prefix((1, 2, 3), (1, 2, 4)) == 2
    assert common_prefix((1, 2), (1, 2, 4)) == 2
    assert common_prefix((), (1,)) == 0


def test_distinct_and_repetition() -> None:
    assert distinct((1, 2, 1, 2), 1) == 0.5
    assert distinct((1, 2, 1, 2), 2) == pytest.approx(2 / 3)  # 12 21 12
    assert distinct((1,), 2) is None
    assert repetition((1, 2, 3, 4, 5)) == 0
    assert repetition((7,) * 8) == pytest.approx(4 / 5)  # five runs of four, all the same
    assert repetition((1, 2, 3)) is None


def test_a_difference_is_paired() -> None:
    """A prompt that is hard for both adds nothing to the interval of their difference."""
    ones, others = [(1.5, 1), (10.5, 1), (100.5, 1)], [(1, 1), (10, 1), (100, 1)]
    difference = estimate_difference_per(ones, others)
    assert (difference.low, difference.median, difference.high) == pytest.approx((0.5, 0.5, 0.5))
    assert estimate_difference_per([(6, 2), (0, 4)], [(1, 1), (1, 1)]).median == pytest.approx(0)  # sums first: 6 / 6 - 2 / 2


def table(*points: tuple[Point, dict[str, Any]], num_prompts: int = 2, measure: str = NATS) -> dict[str, PointFigures]:
    records = {point.label: [make_record(point.label, str(i), **changes) for i in range(num_prompts)] for point, changes in points}
    return {f.point: f for f in figures_of(records, [point for point, _ in points], Quality(measure, 0.05, end_token_ids=(2,)))}


def value(figures: PointFigures, name: str) -> float:
    found = figures.figures[name]
    assert found is not None
    return found.median


def test_figures_by_hand() -> None:
    changes = {"token_ids": (5, 6, 9, 9, 9), "seconds": 0.6, "num_first": 2, "nats": 5.0, "num_target_calls": 2, "finish_reason": "length"}
    changes |= {"num_draft_tokens": 4, "num_accepted_tokens": 3, "num_lossy_tokens": 1}
    figures = table((TARGET, {}), (EXACT, {}), (CASCADE, changes))[CASCADE.label]
    expected = {
        "ms_per_token": 1000 * 0.2 / 3,
        "seconds_per_answer": 0.6,
        "tokens_per_target_call": 2.5,
        "output_tokens": 5,
        "stopped": 0,
        "nats_per_token": 1,
        "agreement": 2 / 5,
        "equal_to_greedy": 0,
        "repetition": 0,
        "distinct_1": 3 / 5,
        "distinct_2": 3 / 4,
        "acceptance": 3 / 4,
        "lossy_kept": 1 / 5,
    }
    assert {name: value(figures, name) for name in expected} == pytest.approx(expected)
    assert figures.figures["passed"] is None
    assert figures.perplexity.median == pytest.approx(math.e)
    assert (figures.rule, figures.alpha, figures.num_prompts) == ("token_v3", 0.2, 2)


def test_an_end_token_is_no_word_but_a_token() -> None:
    figures = table((TARGET, {"token_ids": (8, 8, 2)}), (EXACT, {"token_ids": (8, 8, 2)}))["exact"]
    assert (value(figures, "distinct_1"), value(figures, "output_tokens")) == (0.5, 3)
    assert figures.figures[REPETITION] is None  # too short to say a thing twice


def test_all_tokens_at_once_have_no_time_of_their_own() -> None:
    assert table((TARGET, {"num_first": 4}), (EXACT, {"num_first": 4}))["exact"].figures[TIME] is None


def test_beside_exact_times_are_factors_and_the_rest_differences() -> None:
    over = table((TARGET, {}), (EXACT, {}), (CASCADE, {"seconds": 0.7, "nats": 3.0}))[CASCADE.label].over_exact
    time, nats = over[TIME], over[NATS]
    assert time is not None
    assert nats is not None
    assert (time.median, nats.median) == pytest.approx((0.5, 0.25))


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        ({"seconds": 0.7}, None),
        ({"seconds": 0.7, "nats": 2.1}, None),
        ({"seconds": 0.7, "nats": 2.5}, "not shown to be as good in nats a token"),
        ({"seconds": 1.2}, "not faster"),
        ({"seconds": 0.7, "nats": 2.5, "token_ids": (5, 6, 7, 8, 2)}, "runs on longer"),
    ],
)
def test_what_speaks_against_a_point(changes: dict[str, Any], refusal: str | None) -> None:
    assert table((TARGET, {}), (EXACT, {}), (CASCADE, changes))[CASCADE.label].refusal == refusal


def test_a_point_that_repeats_itself_is_refused() -> None:
    varied = {"token_ids": tuple(range(10, 20))}
    dull = {"token_ids": (7,) * 10, "seconds": 0.7}
    assert table((TARGET, varied), (EXACT, varied), (CASCADE, dull))[CASCADE.label].refusal == "repeats itself more"


def test_the_fastest_that_nothing_speaks_against_is_recommended() -> None:
    faster, bold = Point("rule", "token_v3", 0.3), Point("rule", "opt", 0.4)
    points: tuple[tuple[Point, dict[str, Any]], ...] = (
        (TARGET, {}),
        (EXACT, {}),
        (CASCADE, {"seconds": 0.8}),
        (faster, {"seconds": 0.7}),
        (bold, {"seconds": 0.5, "nats": 9.0}),
    )
    best = recommend(list(table(*points).values()), Quality(NATS, 0.05))
    assert best.point == faster.label
    assert best.reason.startswith("0.50 of exact's time a token (0.50 to 0.50); nats a token +0.000")


def test_where_nothing_is_faster_exact_stays() -> None:
    assert recommend(list(table((TARGET, {}), (EXACT, {})).values()), Quality(NATS, 0.05)).point == "exact"


def test_the_target_alone_is_recommended_where_drafts_cost_more_than_they_bring() -> None:
    assert recommend(list(table((TARGET, {"seconds": 0.6}), (EXACT, {})).values()), Quality(NATS, 0.05)).point == "target"


def test_right_answers_are_a_quality_of_which_more_is_better() -> None:
    right, wrong = {"verdict": "passed"}, {"verdict": "failed", "seconds": 0.7}
    found = table((TARGET, right), (EXACT, right), (CASCADE, wrong), measure="passed")
    assert found[CASCADE.label].refusal == "not shown to be as good in passed"
    assert value(found["exact"], "passed") == 1
    assert found[CASCADE.label].over_exact[LENGTH] is not None


def test_the_criterion_says_what_is_tolerated() -> None:
    assert "shown to be worse than exact's by at most 0.05," in Quality(NATS, 0.05).criterion
    losing: dict[str, Any] = {"seconds": 0.7, "nats": 2.1}  # 0.025 a token
    records = {point.label: [make_record(point.label, **(losing if point == CASCADE else {}))] for point in (TARGET, EXACT, CASCADE)}
    assert figures_of(records, [CASCADE], Quality(NATS, 0.05))[0].refusal is None
