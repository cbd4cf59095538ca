"""Several things measured in turns, prompt by prompt, so that what disturbs the machine disturbs all of them. Order and medians only."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Generic, TypeVar

import msgspec

from benchmarks.stats import Estimate, estimate

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Turns:
    """How often, and what to call after each prompt."""

    num_prompts: int
    num_repetitions: int
    tick: Callable[[], None]
    seconds: float = math.inf  # behind which no further prompt is begun; the first is measured in any case


@dataclass(frozen=True)
class Sides(Generic[Item, Result]):
    """What is compared. `make` gives what prompt number i is asked with, new in every repetition and the same for all sides."""

    make: Callable[[int], Item]
    measure: Sequence[Callable[[Item], Result]]


class Comparison(msgspec.Struct, frozen=True):
    """A figure's median over prompts with its 95 % bootstrap interval, and what each repetition alone says."""

    value: Estimate
    repetitions: tuple[float, ...]


Rows = list[list[list[Result]]]  # [repetition][prompt][side]


def in_turns(sides: Sides[Item, Result], turns: Turns) -> Rows[Result]:
    """Measure all sides for each prompt before the next; who comes first changes with every prompt and every repetition.

    Where time runs out, a repetition that is not complete is left out, unless it is the first, which then has fewer prompts.
    """
    ends = time.monotonic() + turns.seconds
    rows: Rows[Result] = []
    for repetition in range(turns.num_repetitions):
        found: list[list[Result]] = []
        for i in range(turns.num_prompts):
            if (rows or found) and time.monotonic() > ends:
                return rows or [found]
            found.append(_row(sides, i, repetition, turns.tick))
        rows.append(found)
    return rows


def compare(rows: Rows[Result], figure: Callable[[list[Result]], float]) -> Comparison:
    """A prompt's figure is the median over its repetitions, each taken from results that were measured next to each other."""
    values = [[figure(row) for row in repetition] for repetition in rows]
    return Comparison(
        value=estimate([median(of_prompt) for of_prompt in zip(*values, strict=True)]),
        repetitions=tuple(median(repetition) for repetition in values),
    )


def _row(sides: Sides[Item, Result], prompt: int, repetition: int, tick: Callable[[], None]) -> list[Result]:
    item, count = sides.make(prompt), len(sides.measure)
    first = (prompt + repetition) % count
    found = {side: sides.measure[side](item) for side in (*range(first, count), *range(first))}
    tick()
    return [found[side] for side in range(count)]
