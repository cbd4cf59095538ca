"""From records to figures: what is measured of an answer, each point's estimates, and which point they recommend. Runs nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from benchmarks.evaluate.points import EXACT, GREEDY, TARGET, Point
from benchmarks.evaluate.record import Record
from benchmarks.evaluate.tasks import PASSED
from benchmarks.evaluate.texts import common_prefix, distinct, repetition
from benchmarks.stats import Estimate, estimate, estimate_difference_per, estimate_mean_per

Parts = tuple[float, float]  # what is summed, and over how many


@dataclass(frozen=True)
class Answer:
    """A record and what it is compared with."""

    record: Record
    greedy_ids: tuple[int, ...]  # the target's greedy text of the same prompt
    end_token_ids: tuple[int, ...]

    @property
    def words(self) -> tuple[int, ...]:
        """Its tokens without an end token."""
        ids = self.record.token_ids
        return ids[:-1] if ids and ids[-1] in self.end_token_ids else ids


@dataclass(frozen=True)
class Measure:
    """One column. `parts` gives a total and a count of an answer, or None where the answer has none.

    mean: sum of totals over sum of counts; points differ by subtraction. median: of the answers' own ratios; points differ by a factor,
    prompt by prompt.
    """

    title: str
    parts: Callable[[Answer], Parts | None]
    kind: Literal["mean", "median"] = "mean"
    better: Literal["lower", "higher", ""] = ""
    decimals: int = 3


def _time_per_token(answer: Answer) -> Parts | None:
    """Milliseconds of the tokens behind the first ones."""
    record = answer.record
    behind = len(record.token_ids) - record.num_first
    return (1000 * (record.seconds - record.first_seconds), behind) if behind > 0 else None


def _per_target_call(answer: Answer) -> Parts | None:
    record = answer.record
    return (len(record.token_ids), record.num_target_calls) if record.num_target_calls else None


def _agreement(answer: Answer) -> Parts:
    ids, greedy = answer.record.token_ids, answer.greedy_ids
    return common_prefix(ids, greedy) / max(len(ids), len(greedy)), 1


def _acceptance(answer: Answer) -> Parts | None:
    record = answer.record
    return (record.num_accepted_tokens, record.num_draft_tokens) if record.num_draft_tokens else None


def _passed(answer: Answer) -> Parts | None:
    return None if answer.record.verdict is None else (answer.record.verdict == PASSED, 1)


def _of_words(measure: Callable[[Sequence[int]], float | None]) -> Callable[[Answer], Parts | None]:
    def parts(answer: Answer) -> Parts | None:
        value = measure(answer.words)
        return None if value is None else (value, 1)

    return parts


NATS, REPETITION, LENGTH, TIME, CALLS, AGREEMENT, PASS_RATE = (
    "nats_per_token",
    "repetition",
    "output_tokens",
    "ms_per_token",
    "tokens_per_target_call",
    "agreement",
    "passed",
)
MEASURES: Mapping[str, Measure] = {
    TIME: Measure("ms a token", _time_per_token, "median", "lower", 1),
    "seconds_per_answer": Measure("s an answer", lambda a: (a.record.seconds, 1), "median", "lower", 2),
    CALLS: Measure("tokens a target call", _per_target_call, better="higher", decimals=2),
    LENGTH: Measure("output tokens", lambda a: (len(a.record.token_ids), 1), decimals=1),
    "stopped": Measure("ended by itself", lambda a: (a.record.finish_reason == "stop", 1), decimals=2),
    NATS: Measure("nats a token", lambda a: (a.record.nats, len(a.record.token_ids)), better="lower"),
    PASS_RATE: Measure("passed", _passed, better="higher"),
    AGREEMENT: Measure("agreement with greedy", _agreement, better="higher"),
    "equal_to_greedy": Measure("equal to greedy", lambda a: (a.record.token_ids == a.greedy_ids, 1), better="higher", decimals=2),
    REPETITION: Measure("repetition", _of_words(repetition), better="lower"),
    "distinct_1": Measure("distinct-1", _of_words(lambda words: distinct(words, 1)), better="higher"),
    "distinct_2": Measure("distinct-2", _of_words(lambda words: distinct(words, 2)), better="higher"),
    "acceptance": Measure("drafts accepted", _acceptance),
    "lossy_kept": Measure("lossy-kept a token", lambda a: (a.record.num_lossy_tokens, len(a.record.token_ids))),
}


class PointFigures(msgspec.Struct, frozen=True):
    """A point of the curve. None where a measure means nothing for it."""

    point: str
    kind: str
    rule: str | None
    alpha: float | None
    num_prompts: int
    figures: dict[str, Estimate | None]
    perplexity: Estimate
    over_exact: dict[str, Estimate | None]  # a factor for times, else a difference; paired by prompt
    refusal: str | None  # why it is not recommended; None if it might be


class Recommendation(msgspec.Struct, frozen=True):
    """The fastest point that nothing speaks against."""

    point: str
    reason: str


def figures_of(records: Mapping[str, Sequence[Record]], points: Sequence[Point], quality: Quality) -> list[PointFigures]:
    """The figures of all points but the hidden one. `records` are those of `sweep.complete`."""
    reference = records[(GREEDY if GREEDY.label in records else TARGET).label]
    answers = {
        label: [Answer(record, greedy.token_ids, quality.end_token_ids) for record, greedy in zip(of_point, reference, strict=True)]
        for label, of_point in records.items()
    }
    return [_figures(point, answers[point.label], answers[EXACT.label], quality) for point in points if point != GREEDY]


@dataclass(frozen=True)
class Quality:
    """What a point may not lose."""

    measure: str  # one of MEASURES
    tolerance: float  # in its unit; a loss of up to so much is none
    end_token_ids: tuple[int, ...] = ()

    @property
    def criterion(self) -> str:
        measure = MEASURES[self.measure]
        return (
            f"Recommended is the point with the lowest {MEASURES[TIME].title} of those that are significantly faster than exact, whose "
            f"{measure.title} ({measure.better} is better) is shown to be worse than exact's by at most {self.tolerance:g}, and that "
            "neither repeat themselves nor run on significantly more than exact; where there is none, exact. Shown, significantly: the "
            "95 % bootstrap interval over prompts of the paired difference (of the paired factor, for times) lies on that side as a "
            "whole. With few prompts intervals are wide, and little but exact can be recommended."
        )


def recommend(table: Sequence[PointFigures], quality: Quality) -> Recommendation:
    """By the criterion."""
    faster = {figures.point: over for figures in table if figures.refusal is None and (over := figures.over_exact[TIME]) is not None}
    if not faster:
        return Recommendation(EXACT.label, "No other point is shown to be faster than exact and as good.")
    best = min(faster, key=lambda point: faster[point].median)
    time, loss = faster[best], next(figures for figures in table if figures.point == best).over_exact[quality.measure]
    assert loss is not None, "what has no quality is refused"
    title = MEASURES[quality.measure].title
    return Recommendation(
        best,
        f"{time.median:.2f} of exact's time a token ({time.low:.2f} to {time.high:.2f}); {title} {loss.median:+.3f} "
        f"({loss.low:+.3f} to {loss.high:+.3f}) over exact's.",
    )


# ---------------------------------------------------------------------- parts
def _figures(point: Point, answers: list[Answer], exact: list[Answer], quality: Quality) -> PointFigures:
    parts = {name: [measure.parts(answer) for answer in answers] for name, measure in MEASURES.items()}
    of_exact = {name: [measure.parts(answer) for answer in exact] for name, measure in MEASURES.items()}
    figures = {name: _estimate(MEASURES[name].kind, values) for name, values in parts.items()}
    over_exact = {name: _compare(MEASURES[name].kind, values, of_exact[name]) for name, values in parts.items()}
    nats = figures[NATS]
    assert nats is not None, "every answer has a token"
    is_rule = point.kind == "rule"
    return PointFigures(
        point=point.label,
        kind=point.kind,
        rule=point.rule if is_rule else None,
        alpha=point.alpha if is_rule and point != EXACT else None,
        num_prompts=len(answers),
        figures=figures,
        perplexity=Estimate(math.exp(nats.median), math.exp(nats.low), math.exp(nats.high)),
        over_exact=over_exact,
        refusal=_refusal(point, over_exact, quality),
    )


def _estimate(kind: str, parts: Sequence[Parts | None]) -> Estimate | None:
    there = [part for part in parts if part is not None]
    if not there:
        return None
    if kind == "median":
        return estimate([total / count for total, count in there])
    return estimate_mean_per([total for total, _ in there], [count for _, count in there])


def _compare(kind: str, mine: Sequence[Parts | None], other: Sequence[Parts | None]) -> Estimate | None:
    pairs = [(a, b) for a, b in zip(mine, other, strict=True) if a is not None and b is not None]
    if not pairs:
        return None
    if kind == "median":
        return estimate([(a[0] / a[1]) / (b[0] / b[1]) for a, b in pairs])
    return estimate_difference_per([a for a, _ in pairs], [b for _, b in pairs])


def _refusal(point: Point, over_exact: Mapping[str, Estimate | None], quality: Quality) -> str | None:
    """The first part of the criterion that a point fails."""
    if point == EXACT:
        return "what the others are compared with"
    if point.kind == "drafter":
        return "the drafter alone"
    time, value = over_exact[TIME], over_exact[quality.measure]
    if value is None or time is None:
        return "not measured"
    if _loss(value, quality.measure) > quality.tolerance:
        return f"not shown to be as good in {MEASURES[quality.measure].title}"
    for name, reason in ((REPETITION, "repeats itself more"), (LENGTH, "runs on longer")):
        change = over_exact[name]
        if change is not None and change.low > 0:
            return reason
    return None if time.high < 1 else "not faster"


def _loss(change: Estimate, measure: str) -> float:
    """How much may be lost, by the interval."""
    return change.high if MEASURES[measure].better == "lower" else -change.low
