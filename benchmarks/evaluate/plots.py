"""The curves as PNG files: quality against cost, a line for each rule over its alphas. The only file that imports matplotlib.

Drawn without a display. Refuses to begin where matplotlib is absent, naming the extra that brings it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.errors import BenchmarkError
from benchmarks.evaluate.figures import AGREEMENT, CALLS, LENGTH, NATS, PASS_RATE, REPETITION, TIME, PointFigures
from benchmarks.evaluate.points import BASELINE
from benchmarks.evaluate.report import Evaluation
from benchmarks.stats import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#7A7A00", "#332288", "#AA4499")
MARKERS = "osD^vP<>Xh"
PLACES = ((5, 3), (5, -9), (-16, 3), (-16, -9))  # of an alpha beside its point, in points, so that rules which meet stay readable
RECOMMENDED = "recommended"


@dataclass(frozen=True)
class Axis:
    """A measure as it is drawn."""

    measure: str
    title: str
    sign: int = 1  # -1 turns a loss into a quality


COSTS = (
    Axis(TIME, "milliseconds a token (left is faster)"),
    Axis(CALLS, "tokens a target call (right is cheaper)"),
    Axis(LENGTH, "tokens an answer"),
)
QUALITIES = (
    Axis(NATS, "log-likelihood under the target,\nnats a token (up is better)", -1),
    Axis(AGREEMENT, "agreement with the target's greedy text\n(up is better)"),
    Axis(PASS_RATE, "answers that are right\n(up is better)"),
    Axis(REPETITION, "runs of 4 tokens that were there before\n(down is better)"),
)


def require_matplotlib() -> None:
    """Raise BenchmarkError where plots cannot be drawn; asked before anything is measured."""
    if importlib.util.find_spec("matplotlib") is None:
        raise BenchmarkError("Plots need matplotlib: pip install 'cascade-serve[evaluate]', or leave them out with --no-plots.")


def draw(evaluation: Evaluation, folder: Path) -> list[str]:
    """One file for each quality that was measured, with a panel for each cost. Gives their names. Raises BenchmarkError."""
    import matplotlib as mpl

    mpl.use("Agg")
    return [_draw(evaluation, quality, folder) for quality in QUALITIES if _has(evaluation.points, quality)]


def _draw(evaluation: Evaluation, quality: Axis, folder: Path) -> str:
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(COSTS), figsize=(16, 5.6), sharey=True, layout="constrained")
    try:
        for panel, cost in zip(panels, COSTS, strict=True):
            _fill(panel, evaluation, cost, quality)
        panels[0].set_ylabel(quality.title)
        shown = {label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)}
        shown = dict(sorted(shown.items(), key=lambda item: item[0] == RECOMMENDED))  # last: it is no line
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=min(8, len(shown)), frameon=False)
        note = " (quick: means little)" if evaluation.is_quick else ""
        figure.suptitle(
            f"{evaluation.target['name']}, drafter {evaluation.target['drafter']}\n{evaluation.load['text']}{note}", fontsize=11
        )
        name = f"curve-{quality.measure.replace('_', '-')}.png"
        figure.savefig(folder / name, dpi=110, metadata={"Software": "cascade evaluate"})
    except OSError as error:
        raise BenchmarkError(f"{folder}: plots cannot be written: {error.strerror}.") from error
    finally:
        pyplot.close(figure)
    return name


def _fill(panel: Axes, evaluation: Evaluation, cost: Axis, quality: Axis) -> None:
    """A line for each rule, a mark for each end, and the point that is recommended with a ring around it."""
    rules = list(dict.fromkeys(figures.rule for figures in evaluation.points if figures.rule and figures.alpha is not None))
    for number, rule in enumerate(rules):
        line = [figures for figures in evaluation.points if figures.rule == rule and figures.alpha is not None]
        _line(panel, line, (cost, quality), _style(rule, number))
    for kind, marker in (("target", "s"), ("exact", "*"), ("drafter", "p")):
        ends = [figures for figures in evaluation.points if figures.point == kind]
        if ends:
            _line(panel, ends, (cost, quality), Style(_END_NAMES[kind], "black", marker, "none", 9))
    best = [figures for figures in evaluation.points if figures.point == evaluation.recommendation.point]
    _ring(panel, best, cost, quality)
    exact = next((value for figures in evaluation.points if figures.point == "exact" and (value := _value(figures, quality))), None)
    if exact is not None:
        panel.axhline(exact.median, color="black", linewidth=0.6, linestyle=":")
    panel.set_xlabel(cost.title)
    panel.grid(alpha=0.25)
    panel.margins(0.08)


_END_NAMES = {"target": "target alone", "exact": "exact", "drafter": "drafter alone"}


@dataclass(frozen=True)
class Style:
    """How a line looks."""

    label: str
    colour: str
    marker: str
    line: str = "-"
    size: int = 5
    place: tuple[int, int] = PLACES[0]


def _style(rule: str, number: int) -> Style:
    if rule == BASELINE:
        return Style(f"{rule} (baseline)", "#555555", "x", "--")
    return Style(rule, COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)], place=PLACES[number % len(PLACES)])


def _line(panel: Axes, line: Sequence[PointFigures], axes: tuple[Axis, Axis], style: Style) -> None:
    """Points with intervals in both directions, joined in the order of their alphas, each alpha beside its point."""
    drawn = [(figures, x, y) for figures in line if (x := _value(figures, axes[0])) and (y := _value(figures, axes[1]))]
    xs, ys = [x for _, x, _ in drawn], [y for _, _, y in drawn]
    panel.errorbar(
        [x.median for x in xs],
        [y.median for y in ys],
        xerr=_bars(xs),
        yerr=_bars(ys),
        label=style.label,
        color=style.colour,
        marker=style.marker,
        linestyle=style.line,
        markersize=style.size,
        linewidth=1.4,
        elinewidth=0.6,
        ecolor=(style.colour, 0.35),
    )
    for figures, x, y in drawn:
        if figures.alpha is not None:
            panel.annotate(
                f"{figures.alpha:g}", (x.median, y.median), xytext=style.place, textcoords="offset points", fontsize=7, color=style.colour
            )


def _ring(panel: Axes, best: Sequence[PointFigures], cost: Axis, quality: Axis) -> None:
    for figures in best:
        x, y = _value(figures, cost), _value(figures, quality)
        if x and y:
            panel.plot([x.median], [y.median], "o", markersize=17, fillstyle="none", color="#AA0000", label=RECOMMENDED)


def _bars(values: Sequence[Estimate]) -> list[list[float]]:
    """Lengths below and above, as matplotlib takes them; a bootstrap interval may just miss its own median."""
    return [[max(0.0, v.median - v.low) for v in values], [max(0.0, v.high - v.median) for v in values]]


def _value(figures: PointFigures, axis: Axis) -> Estimate | None:
    value = figures.figures[axis.measure]
    return value if value is None or axis.sign > 0 else Estimate(-value.median, -value.high, -value.low)


def _has(points: Sequence[PointFigures], axis: Axis) -> bool:
    return any(figures.figures[axis.measure] is not None for figures in points)
