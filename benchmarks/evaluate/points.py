"""Which points a curve has: the ends, exact, and every rule at some alphas. Names and choices only; runs nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from benchmarks.errors import BenchmarkError
from engine.dials import DIALS
from engine.request import SpeculationParams

BASELINE = "lossy"
ALL = "all"

# From careful to bold, each rule's default among them. The ends are measured as target and drafter.
GRIDS: Mapping[str, tuple[float, ...]] = {
    "lossy": (0.1, 0.2, 0.4, 0.6),
    "chow": (0.1, 0.2, 0.4, 0.6),
    "diff": (0.0, 0.1, 0.2, 0.4),
    "opt": (0.0, 0.1, 0.2, 0.4),
    "token_v1": (0.05, 0.1, 0.2, 0.4),
    "token_v2": (0.05, 0.1, 0.2, 0.4),
    "token_v3": (0.1, 0.2, 0.3, 0.5),
    "chow_log": (0.25, 0.5, 1.0, 2.0),
    "diff_log": (0.0, 0.1, 0.25, 0.5),
    "bild": (0.1, 0.2, 0.3, 0.5),
}


@dataclass(frozen=True)
class Point:
    """One way to answer: `rule` and `alpha` mean something for the kind "rule" alone.

    target: the target alone. drafter: the drafter alone, as a model of its own. greedy: the target's greedy text, which sampled texts are
    compared with; it is in no table.
    """

    kind: Literal["target", "drafter", "greedy", "rule"]
    rule: str = "exact"
    alpha: float = 0.0

    @property
    def label(self) -> str:
        """What tables and files call it."""
        if self.kind != "rule":
            return self.kind
        return self.rule if self.rule == "exact" else f"{self.rule}={self.alpha:g}"

    @property
    def speculation(self) -> SpeculationParams:
        if self.kind != "rule":
            return SpeculationParams(enabled=False)
        return SpeculationParams(rule=self.rule, alpha=self.alpha)


TARGET, DRAFTER, GREEDY, EXACT = Point("target"), Point("drafter"), Point("greedy"), Point("rule")


@dataclass(frozen=True)
class Points:
    """The points of a run in the order of its tables, and why others are not among them, by name."""

    chosen: tuple[Point, ...]
    skipped: Mapping[str, str]

    def without(self, point: Point, reason: str) -> Points:
        return Points(tuple(p for p in self.chosen if p != point), {**self.skipped, point.label: reason})


def choose(rules: str, alphas: str | None, drafter: str, has_probabilities: bool, is_quick: bool = False) -> Points:
    """Target, exact, the baseline, the rules of a list such as "token_v3,opt", and the drafter.

    `alphas` is such as "token_v3=0.1,0.2;opt=0"; a rule that it does not name gets the grid above, or in a quick run its default.
    `drafter` is the kind of the deployment's drafter. Raises BenchmarkError.
    """
    if drafter == "none":
        raise BenchmarkError("model.drafter: none - a curve needs a drafter; `kind: ngram` needs no weights.")
    names = _rules(rules)
    given = _alphas(alphas or "", names)
    chosen, skipped = [TARGET, EXACT], dict[str, str]()
    for name in names:
        if DIALS[name].needs_q and not has_probabilities:
            skipped[name] = f"it reads the drafter's probabilities, and a drafter of kind {drafter} has none"
            continue
        grid = (DIALS[name].default,) if is_quick else GRIDS[name]
        chosen += [Point("rule", name, alpha) for alpha in given.get(name, grid)]
    if has_probabilities:
        chosen.append(DRAFTER)
    else:
        skipped[DRAFTER.label] = f"a drafter of kind {drafter} writes nothing alone"
    return Points(tuple(chosen), skipped)


def _rules(text: str) -> list[str]:
    """The baseline first; exact is measured anyway."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    if ALL in names:
        names = list(GRIDS)
    if unknown := [name for name in names if name not in DIALS]:
        raise BenchmarkError(f"--rules {unknown[0]}: there is no such rule; there are {', '.join(DIALS)}, and all.")
    return [name for name in dict.fromkeys([BASELINE, *names]) if name != "exact"]


def _alphas(text: str, names: list[str]) -> dict[str, tuple[float, ...]]:
    given = dict[str, tuple[float, ...]]()
    for part in filter(None, (part.strip() for part in text.split(";"))):
        name, has_values, values = part.partition("=")
        name = name.strip()
        if not has_values or name not in names:
            known = f"{name!r} is not among {', '.join(names)}" if has_values else f"{part!r} has no ="
            raise BenchmarkError(f"--alphas: {known}; write RULE=A,B;RULE=A for rules that --rules names.")
        if name in given:
            raise BenchmarkError(f"--alphas: {name} is there twice; write its alphas in one list.")
        given[name] = tuple(dict.fromkeys(_alpha(name, value) for value in values.split(",")))
    return given


def _alpha(rule: str, text: str) -> float:
    try:
        alpha = float(text)
    except ValueError as error:
        raise BenchmarkError(f"--alphas {rule}={text.strip()}: not a number.") from error
    if not math.isfinite(alpha):
        raise BenchmarkError(f"--alphas {rule}={text.strip()}: must be finite; the ends of a dial are measured as target and drafter.")
    if mistake := DIALS[rule].mistake(alpha):
        raise BenchmarkError(f"--alphas {rule}={alpha:g}: {mistake}.")
    return alpha
