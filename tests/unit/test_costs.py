"""What passes are believed to cost, between what was measured and what was seen. No tensors."""

from __future__ import annotations

import random

import pytest

from engine.draft.costs import ROWS, CostsByBatch, PassCosts


def test_costs_lie_between_their_neighbours() -> None:
    costs = PassCosts({1: 1.0, 4: 2.0, 8: 6.0})
    assert [costs.at(rows) for rows in (1, 2, 3, 4, 6, 8, 16)] == pytest.approx([1, 4 / 3, 5 / 3, 2, 4, 6, 12])
    assert PassCosts({4: 2.0}).at(1) == 2.0


def test_a_larger_pass_never_costs_less() -> None:
    """Measured times do: of two that are equal the second may be the quicker."""
    costs = PassCosts({1: 1.1, 2: 1.0, 4: 0.9, 8: 3.0})
    assert [costs.at(rows) for rows in (1, 2, 3, 4)] == pytest.approx([1.1] * 4)
    values = [costs.at(rows) for rows in range(1, 20)]
    assert values == sorted(values)


def test_costs_follow_what_is_seen_and_not_a_single_hiccup() -> None:
    costs = PassCosts({1: 1.0, 8: 1.0})
    costs.observe(8, 1000.0)
    assert costs.at(8) < 1.2
    for _ in range(200):
        costs.observe(8, 3.0)
        costs.observe(1, 0.5)
    assert costs.at(8) == pytest.approx(3.0, rel=0.05)
    assert costs.at(1) == pytest.approx(0.5, rel=0.05)


def test_costs_that_were_never_seen_go_along() -> None:
    costs = PassCosts({1: 0.9, 16: 1.0, 32: 1.2})
    for _ in range(60):
        costs.observe(16, 2.0)
    assert costs.at(16) == pytest.approx(2.0, rel=0.05)
    assert costs.at(32) == pytest.approx(2.4, rel=0.05)
    for _ in range(60):
        costs.observe(32, 5.0)
    assert costs.at(32) == pytest.approx(5.0, rel=0.05)
    assert costs.at(16) == pytest.approx(2.0, rel=0.05), "what was seen is not changed by what is seen elsewhere"


def test_rows_that_fill_a_pass_up_cost_nothing() -> None:
    """Nor is the first row behind a full pass cheap."""
    costs = PassCosts({16: 1.0, 24: 1.4}, lambda rows: rows if rows <= 16 else -(-rows // 8) * 8)
    assert [costs.at(rows) for rows in (16, 17, 20, 24)] == pytest.approx([1.0, 1.4, 1.4, 1.4])
    for _ in range(100):
        costs.observe(18, 2.0)
    assert costs.at(16) == 1.0
    assert costs.at(17) == costs.at(24) == pytest.approx(2.0, rel=0.05)


def test_what_was_never_seen_goes_along_once() -> None:
    """However many smaller passes were seen in between: all took half as long again as was measured, and so will this one."""
    first = {1: 1.0, 2: 1.0, 4: 1.1, 6: 1.2, 8: 1.4, 16: 2.0, 32: 3.0}
    costs = PassCosts(first)
    for _ in range(100):
        for rows in (1, 2, 4, 6):
            costs.observe(rows, 1.5 * first[rows])
    for rows in (8, 16, 32):
        assert costs.at(rows) == pytest.approx(1.5 * first[rows], rel=0.05)


def test_costs_seen_long_ago_go_along_with_those_below() -> None:
    """Sixteen sequences whose texts grow: a pass with drafts, seen when they were short, would look nearly free by the end."""
    costs = PassCosts({16: 1.0, 32: 1.2})
    for _ in range(40):
        costs.observe(16, 1.0)
        costs.observe(32, 1.5)
    for step in range(200):
        costs.observe(16, 1.0 + step / 400)
    assert costs.at(16) == pytest.approx(1.5, rel=0.05)
    assert costs.at(32) / costs.at(16) == pytest.approx(1.5, rel=0.02)


def test_costs_can_begin_with_nothing() -> None:
    costs = PassCosts({})
    assert costs.at(5) == 5
    costs.observe(7, 0.25)
    assert costs.at(7) == 0.25
    costs.observe(10**6, 1.0)
    assert set(costs.table()) <= set(ROWS)
    for wrong in ({1: 0.0}, {1: float("nan")}, {7: 1.0}):
        with pytest.raises(ValueError, match="costs"):
            PassCosts(wrong)


def shrinking(costs: CostsByBatch, longer: float = 1.3, num: int = 100) -> None:
    """A batch of thirteen sequences that shrinks: drafts are seen seldom, and their rows are as many as those of the batch before."""
    for _ in range(num):
        for _ in range(9):
            costs.observe(8, 16, 2.0)
            costs.observe(8, 10, 1.5)
        costs.observe(8, 16, 2.0 * longer, has_drafts=True)


def test_passes_that_check_drafts_take_longer_than_their_rows() -> None:
    costs = CostsByBatch(PassCosts({1: 1.0, 10: 1.5, 16: 2.0, 32: 3.0}))
    shrinking(costs)
    assert costs.of(8).at(16) == pytest.approx(2.0, rel=0.02)
    assert costs.of(8).at(10) == pytest.approx(1.5, rel=0.02)
    assert costs.draft_share(8) == pytest.approx(0.3, rel=0.05)
    for i in range(100):  # of sixteen sequences all rows are full, so nothing is ever seen to tell drafts and rows apart by
        costs.observe(16, 24 if i % 2 else 16, 2.0, has_drafts=bool(i % 2))
    assert costs.of(16).at(24) * (1 + costs.draft_share(16)) == pytest.approx(2.0, rel=0.05), "what is known of others does not stay"


def test_what_drafts_take_is_not_found_in_noise_nor_in_prompts_nor_in_a_hiccup() -> None:
    costs, rng = CostsByBatch(PassCosts({1: 1.0, 32: 1.0})), random.Random(1)
    for i in range(2000):
        costs.observe(1, 4, rng.choice((0.8, 1.2)), has_drafts=i % 2 == 0)
    assert costs.draft_share(1) < 0.1
    assert costs.of(1).at(4) == pytest.approx(1.0, abs=0.1)
    costs = CostsByBatch(PassCosts({1: 1.0, 64: 4.0}))
    for i in range(100):  # the one at a prompt's end, the other at its beginning
        costs.observe(1, 64, 8.0 if i % 2 else 4.0, has_drafts=bool(i % 2), has_prompts=True)
    assert costs.draft_share(1) == 0
    shrinking(costs, longer=1.0, num=10)
    costs.observe(8, 16, 100.0, has_drafts=True)
    assert costs.draft_share(8) < 0.1


def test_costs_by_batch_can_begin_with_nothing() -> None:
    costs = CostsByBatch(PassCosts({}))
    costs.observe(1, 7, 0.25)
    assert costs.of(1).at(7) == 0.25


def test_costs_of_many_sequences_are_not_those_of_few() -> None:
    """Five rows of each of four sequences, then one of each of sixteen, whose passes take longer."""
    costs = CostsByBatch(PassCosts({1: 1.0, 16: 1.5, 32: 2.0}))
    for _ in range(100):
        costs.observe(4, 20, 3.0)
    assert costs.of(16).at(20) == pytest.approx(3.0, rel=0.05), "what was seen last is all that is known"
    for _ in range(100):
        costs.observe(16, 16, 6.0)
    many = costs.of(16)
    assert many.at(16) == pytest.approx(6.0, rel=0.05)
    assert many.at(20) - many.at(16) > 0.5, "what was seen of few does not make more rows free"
    assert costs.of(4).at(20) == pytest.approx(3.0, rel=0.05)
