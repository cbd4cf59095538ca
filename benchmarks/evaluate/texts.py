"""Measures of a token sequence by itself, or beside another one."""

from __future__ import annotations

from collections.abc import Sequence

REPEATED = 4  # tokens of a run that, once written, should not come again


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    for i, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return i
    return min(len(one), len(other))


def distinct(ids: Sequence[int], n: int) -> float | None:
    """Different n-grams over all n-grams; None for a sequence that is too short to have one."""
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def repetition(ids: Sequence[int]) -> float | None:
    """Share of the runs of 4 tokens that were there before: 1 - distinct-4, 0 for a text that never says a thing twice."""
    value = distinct(ids, REPEATED)
    return None if value is None else 1 - value
