"""The arithmetic of a benchmark against cases computed by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks.errors import BenchmarkError, RequestFailed
from benchmarks.figures import Goal, figures_of, parse_goal
from benchmarks.load import Answer, Drafting, LoadResult, Outcome
from benchmarks.stats import estimate, percentile, summarise
from benchmarks.turns import Sides, Turns, compare, in_turns

ANSWER = Answer(
    sent_at=10.0,
    delivered_at=(10.5, 10.7, 11.3),
    ended_at=11.5,
    num_prompt_tokens=7,
    num_cached_tokens=2,
    num_output_tokens=6,
    finish_reason="stop",
    drafting=Drafting(num_draft_tokens=8, num_accepted_tokens=3, num_rounds=2),
    num_target_calls=3,
)


def result_of(*results: Answer | RequestFailed, seconds: float = 4.0) -> LoadResult:
    outcomes = tuple(Outcome(i, "ab"[i % 2], 9.75, result) for i, result in enumerate(results))
    return LoadResult(outcomes, seconds, cpu_seconds=0.006)


def test_times_of_an_answer() -> None:
    assert ANSWER.ttft == pytest.approx(0.5)
    assert ANSWER.e2e == pytest.approx(1.5)
    assert ANSWER.tpot == pytest.approx((1.5 - 0.5) / 5)
    assert ANSWER.gaps == pytest.approx([0.2, 0.6])


def test_an_answer_of_one_token_has_no_time_per_token_and_one_without_text_begins_when_it_ends() -> None:
    empty = replace(ANSWER, delivered_at=(), num_output_tokens=1)
    assert (empty.tpot, empty.gaps) == (None, [])
    assert empty.ttft == pytest.approx(1.5)
    assert Goal("tpot", 0.0).is_met(empty)


@pytest.mark.parametrize(("percent", "expected"), [(0, 1.0), (50, 2.5), (95, 3.85), (100, 4.0)])
def test_percentiles_lie_between_the_nearest_values(percent: float, expected: float) -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], percent) == pytest.approx(expected)


def test_a_summary_of_nothing_is_none() -> None:
    assert summarise([]) is None
    assert summarise([3.0]) is not None


def test_a_bootstrap_interval_of_equal_values_is_a_point_and_others_hold_the_median() -> None:
    assert (estimate([2.0] * 5).low, estimate([2.0] * 5).high) == (2.0, 2.0)
    spread = estimate([float(value) for value in range(101)])
    assert spread.median == 50
    # the median of 101 uniform values has a standard error of about 101 / (2 * sqrt(101)), so the interval is near 50 -+ 9.8
    assert spread.low == pytest.approx(40, abs=3)
    assert spread.high == pytest.approx(60, abs=3)


def test_figures_of_a_run() -> None:
    figures = figures_of(result_of(ANSWER, ANSWER, RequestFailed("timeout", "too long"), RequestFailed("timeout", "again")), is_open=True)
    assert (figures.all.num_requests, figures.all.num_failed) == (4, 2)
    assert figures.requests_per_second == 0.5
    assert figures.output_tokens_per_second == 3.0
    assert figures.total_tokens_per_second == 6.5
    assert figures.all.num_cached_prompt_tokens == 4
    assert figures.cpu_ms_per_token == pytest.approx(0.5)
    assert figures.client_wait_ms is not None
    assert figures.client_wait_ms.median == pytest.approx(250)
    assert figures.all.itl_ms is not None
    assert figures.all.itl_ms.count == 4
    assert figures.all.itl_ms.mean == pytest.approx(400)
    assert [(failures.kind, failures.count, failures.example) for failures in figures.failures] == [("timeout", 2, "too long")]


def test_drafting_counts_all_answers_together() -> None:
    figures = figures_of(result_of(ANSWER, replace(ANSWER, drafting=Drafting(2, 2, 1))))
    assert figures.all.drafting is not None
    assert figures.all.drafting.acceptance_rate == pytest.approx(5 / 10)
    assert figures.all.drafting.mean_accepted_length == pytest.approx(1 + 5 / 3)
    assert figures.all.tokens_per_target_call == 2.0
    assert figures_of(result_of(replace(ANSWER, drafting=None, num_target_calls=None))).all.tokens_per_target_call is None


def test_categories_are_apart() -> None:
    figures = figures_of(result_of(ANSWER, RequestFailed("timeout", ""), ANSWER))
    assert {name: (group.num_requests, group.num_failed) for name, group in figures.categories.items()} == {"a": (2, 0), "b": (1, 1)}


def test_goodput_wants_every_goal_and_counts_failures_as_bad() -> None:
    slow = replace(ANSWER, delivered_at=(11.0,))
    goals = (parse_goal("ttft:600ms"), parse_goal("e2e:1.5s"))
    goodput = figures_of(result_of(ANSWER, slow, RequestFailed("timeout", ""), ANSWER), goals).goodput
    assert goodput is not None
    assert (goodput.num_good, goodput.share, goodput.requests_per_second) == (2, 0.5, 0.5)


@pytest.mark.parametrize("text", ["ttft", "ttft:500", "itl:5ms", "ttft:-1ms", "ttft:ms"])
def test_a_goal_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(BenchmarkError, match="--goodput"):
        parse_goal(text)


def test_a_run_without_answers_has_no_latencies() -> None:
    figures = figures_of(result_of(RequestFailed("timeout", "")))
    assert (figures.all.ttft_ms, figures.cpu_ms_per_token, figures.requests_per_second) == (None, None, 0)


def test_turns_change_who_is_first_and_give_all_sides_the_same() -> None:
    asked: list[tuple[str, int]] = []
    made = iter(range(100))

    def side(name: str, value: int) -> int:
        asked.append((name, value))
        return value

    sides = Sides(lambda prompt: next(made), [lambda value: side("a", value), lambda value: side("b", value)])
    rows = in_turns(sides, Turns(2, 2, lambda: None))
    assert rows == [[[0, 0], [1, 1]], [[2, 2], [3, 3]]]
    assert asked == [("a", 0), ("b", 0), ("b", 1), ("a", 1), ("b", 2), ("a", 2), ("a", 3), ("b", 3)]


def test_a_comparison_is_the_median_over_prompts_of_medians_over_repetitions() -> None:
    rows = [[[2.0, 1.0], [9.0, 1.0]], [[4.0, 1.0], [7.0, 1.0]], [[100.0, 1.0], [8.0, 1.0]]]
    comparison = compare(rows, lambda row: row[0] / row[1])
    assert comparison.value.median == pytest.approx((4 + 8) / 2)
    assert comparison.repetitions == pytest.approx((5.5, 5.5, 54.0))
