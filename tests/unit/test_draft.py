"""Torch-free drafters and draft-length policies."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from engine.draft.length import FixedLength, HeuristicLength, share_budget
from engine.draft.ngram import NGramDrafter
from engine.plan import Chunk, QKind, StepPlan
from tests.unit.factories import make_sequence


def drafts(tokens: tuple[int, ...], num: int = 4, max_n: int = 3, min_n: int = 1) -> list[int]:
    seq = make_sequence(tokens)
    batch = NGramDrafter(max_n, min_n).propose(StepPlan((Chunk(seq, len(tokens), True, num),)), 100)
    assert isinstance(batch.ids, list)
    return batch.ids[0][: batch.lengths[0]]


def test_the_longest_match_wins_and_of_equal_ones_the_latest() -> None:
    assert drafts((1, 2, 3, 50, 9, 2, 3, 60, 9, 1, 2, 3), 1) == [50], "three tokens match at the start"
    assert drafts((2, 3, 50, 2, 3, 60, 4, 2, 3), 1) == [60], "two tokens match twice, the later one counts"


def test_a_continuation_that_reaches_the_end_repeats_the_period() -> None:
    assert drafts((1, 2, 3, 1, 2, 3), 7) == [1, 2, 3, 1, 2, 3, 1]
    assert drafts((5, 5), 3) == [5, 5, 5]


def test_nothing_is_drafted_where_nothing_matches_or_nothing_is_wanted() -> None:
    assert drafts((1, 2, 3, 4)) == []
    assert drafts((1, 1), 0) == []
    assert drafts((1,)) == []
    assert drafts((4, 1, 9, 1), min_n=2) == []


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 6))
def test_the_index_agrees_with_a_search(tokens: list[int], num: int) -> None:
    want: list[int] = []
    for n in (3, 2, 1):
        starts = [i for i in range(n, len(tokens)) if tokens[i - n : i] == tokens[-n:]] if n <= len(tokens) else []
        if starts:
            text = list(tokens)
            for i in range(num):
                text.append(text[starts[-1] + i])
            want = text[len(tokens) :]
            break
    assert drafts(tuple(tokens), num) == want


def test_growing_a_sequence_costs_the_same_a_token_at_any_length() -> None:
    drafter, seq = NGramDrafter(), make_sequence((1, 2, 3))
    times = []
    for start in (0, 20_000):
        seq.tokens += [i * i % 997 for i in range(start, start + 20_000 - 200)]
        drafter.propose(StepPlan((Chunk(seq, 1, True, 4),)), 100)
        began = time.perf_counter()
        for i in range(200):
            seq.tokens.append(i % 7)
            drafter.propose(StepPlan((Chunk(seq, 1, True, 4),)), 100)
        times.append(time.perf_counter() - began)
    assert times[1] < 5 * times[0] + 0.01


def test_kinds_and_forgetting() -> None:
    drafter, seq = NGramDrafter(), make_sequence((1, 2, 1, 2))
    plan = StepPlan((Chunk(seq, 2, False), Chunk(seq, 4, True, 2), Chunk(make_sequence((8, 9)), 2, True, 2)))
    batch = drafter.propose(plan, 100)
    assert (batch.lengths, batch.ids) == ((2, 0), [[1, 2], [0, 0]])
    assert batch.kinds == [[QKind.ONE_HOT, QKind.ONE_HOT, QKind.NONE], [QKind.NONE] * 3]
    assert (batch.drafter_computed, batch.lagging) == ((0, 0, 0), (False,) * 3)
    drafter.forget(seq)
    assert seq not in drafter._indexes


@given(st.lists(st.integers(0, 9), max_size=8), st.integers(0, 40))
def test_a_budget_cuts_the_longest_first(wanted: list[int], budget: int) -> None:
    got = share_budget(wanted, budget)
    assert sum(got) == min(sum(wanted), budget)
    assert all(0 <= g <= w for g, w in zip(got, wanted, strict=True))
    assert all(g == w or g >= max(got) - 1 for g, w in zip(got, wanted, strict=True)), "only the longest are cut"


def test_the_heuristic_follows_what_was_accepted() -> None:
    policy, seq = HeuristicLength(start=4, max_length=7), make_sequence((1,))
    lengths = []
    for accepted in (4, 6, 0, 0, 0, 0, 0, 0, 0):
        (num,) = policy.lengths([seq], [99], 100, 1)
        lengths.append(num)
        policy.observe(seq, num, min(accepted, num))
    assert lengths == [4, 6, 7, 6, 5, 4, 3, 2, 1]
    policy.forget(seq)
    assert policy.lengths([seq], [99], 100, 1) == [4]
    policy.observe(seq, 0, 0)
    assert policy.lengths([seq], [99], 100, 1) == [4], "a round without drafts says nothing"


def test_fixed_is_fixed() -> None:
    policy, seq = FixedLength(3), make_sequence((1,))
    policy.observe(seq, 3, 0)
    assert policy.lengths([seq, seq], [9, 9], 5, 2) == [3, 2]
    assert policy.lengths([seq, seq], [0, 9], 5, 2) == [0, 3], "a limit leaves the budget to others"
