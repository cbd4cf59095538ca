"""A sweep's result as JSON for programs, as Markdown for documents and as a table for the terminal. No arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.table import Table

from benchmarks.environment import Environment
from benchmarks.errors import BenchmarkError
from benchmarks.evaluate.figures import AGREEMENT, CALLS, LENGTH, MEASURES, NATS, PASS_RATE, REPETITION, TIME, PointFigures, Recommendation
from benchmarks.evaluate.sandbox import Isolation
from benchmarks.stats import Estimate

SHORT = (TIME, CALLS, LENGTH, NATS, AGREEMENT, REPETITION, PASS_RATE)  # what fits a terminal, and the summary


class Evaluation(msgspec.Struct, frozen=True):
    """What a run leaves behind. Estimates are values with 95 % bootstrap intervals over prompts."""

    benchmark: str
    headline: tuple[str, ...]
    environment: Environment
    target: dict[str, Any]
    load: dict[str, Any]
    is_quick: bool
    criterion: str
    recommendation: Recommendation
    points: tuple[PointFigures, ...]
    skipped: dict[str, str]  # rules and ends that were not measured, and why
    sandbox: Isolation | None  # what held while programs were run; None where none were


def summary(evaluation: Evaluation, files: Sequence[str]) -> dict[str, Any]:
    """The line for programs: values without intervals."""
    points = {
        figures.point: {name: value.median for name in SHORT if (value := figures.figures[name]) is not None}
        for figures in evaluation.points
    }
    return {
        "benchmark": evaluation.benchmark,
        "task": evaluation.load["task"],
        "num_prompts": evaluation.load["num_prompts"],
        "is_quick": evaluation.is_quick,
        "recommended": evaluation.recommendation.point,
        "reason": evaluation.recommendation.reason,
        "points": points,
        "skipped": evaluation.skipped,
        "files": list(files),
    }


def terminal_table(evaluation: Evaluation) -> Table:
    """Values alone; the intervals are in the files."""
    table = Table(title=evaluation.load["text"], title_justify="left")
    names = [name for name in SHORT if _is_measured(evaluation, name)]
    table.add_column("point", no_wrap=True)
    for column in (*(MEASURES[name].title for name in names), "time over exact"):
        table.add_column(column, justify="right")
    table.add_column("not recommended", min_width=20)
    for figures in evaluation.points:
        over = figures.over_exact[TIME]
        is_best = figures.point == evaluation.recommendation.point
        table.add_row(
            figures.point,
            *(_value(figures.figures[name], MEASURES[name].decimals) for name in names),
            _value(over, 2),
            "RECOMMENDED" if is_best else figures.refusal or _SLOWER,
        )
    return table


def markdown(evaluation: Evaluation, plots: Sequence[str]) -> str:
    """The whole result as a page."""
    parts = [f"# {evaluation.target['name']}: cost and quality on {evaluation.load['task']}", _facts(evaluation)]
    if evaluation.is_quick:
        parts.append("Measured with `--quick`: the figures mean little.")
    best = evaluation.recommendation
    parts += [f"**{best.point}** is recommended. {best.reason}", evaluation.criterion]
    parts += [f"![{name}]({name})" for name in plots]
    parts += ["## Points", _NOTE, _table(evaluation, _point_rows(evaluation)), "## Beside exact", _PAIRED, _paired(evaluation)]
    if evaluation.skipped:
        parts += ["## Not measured", "\n".join(f"- {name}: {reason}" for name, reason in evaluation.skipped.items())]
    return "\n\n".join(parts) + "\n"


def write_text(path: Path, text: str) -> None:
    """Raises BenchmarkError."""
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be written: {error.strerror}.") from error


# ---------------------------------------------------------------------- parts
_SLOWER = "slower than another"
_NOTE = (
    "Values with 95 % bootstrap intervals over the prompts. Times are medians over prompts, other values means. `ms a token` counts the "
    "tokens behind the first ones, and `s an answer` the whole answer; the prompt's KV was cached, for all points alike. `nats a token` is "
    "-log p of the emitted text under the target at temperature 1. `agreement` is the length of the beginning that is common with the "
    "target's greedy text, over the longer of the two. `repetition` is the share of runs of 4 tokens that were there before."
)
_PAIRED = "Paired by prompt: times as a factor, everything else as a difference; 95 % bootstrap intervals."


def _facts(evaluation: Evaluation) -> str:
    target, where = evaluation.target, evaluation.environment
    versions = ", ".join(f"{name} {version}" for name, version in where.versions.items())
    return "\n".join(
        (
            f"- {evaluation.load['text']}",
            f"- target {target['target']}, drafter {target['drafter']}, {target['device']}",
            f"- {where.machine}, {where.num_cpus} CPUs; {versions}; {where.date}",
            f"- `{where.command}`",
        )
    )


def _point_rows(evaluation: Evaluation) -> list[tuple[str, list[str]]]:
    """Each measure that any point has, and a cell for every point."""
    points = evaluation.points
    rows = [("prompts", [str(figures.num_prompts) for figures in points])]
    for name, measure in MEASURES.items():
        if _is_measured(evaluation, name):
            rows.append((measure.title, [_interval(figures.figures[name], measure.decimals) for figures in points]))
        if name == NATS:
            rows.append(("perplexity", [_interval(figures.perplexity, 2) for figures in points]))
    return rows


def _paired(evaluation: Evaluation) -> str:
    rows = [
        (measure.title, [_interval(figures.over_exact[name], 3, measure.kind == "mean") for figures in evaluation.points])
        for name, measure in MEASURES.items()
        if _is_measured(evaluation, name)
    ]
    best = evaluation.recommendation.point
    rows.append(("", ["recommended" if f.point == best else f.refusal or _SLOWER for f in evaluation.points]))
    return _table(evaluation, rows)


def _table(evaluation: Evaluation, rows: Sequence[tuple[str, list[str]]]) -> str:
    """A line for each point, a column for each measure."""
    head = ["point", *(title for title, _ in rows)]
    lines = [
        [f"`{figures.point}`", *cells]
        for figures, cells in zip(evaluation.points, zip(*(cells for _, cells in rows), strict=True), strict=True)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def _is_measured(evaluation: Evaluation, name: str) -> bool:
    return any(figures.figures[name] is not None for figures in evaluation.points)


def _interval(value: Estimate | None, decimals: int, is_signed: bool = False) -> str:
    if value is None:
        return "-"
    sign = "+" if is_signed else ""
    return f"{value.median:{sign}.{decimals}f} ({value.low:{sign}.{decimals}f} to {value.high:{sign}.{decimals}f})"


def _value(value: Estimate | None, decimals: int) -> str:
    return "-" if value is None else f"{value.median:.{decimals}f}"
