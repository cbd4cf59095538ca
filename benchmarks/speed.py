"""`python -m benchmarks.speed`: the speed that this project holds itself to, one named bar each, measured against what it promises.

Standard output gets one line, a JSON object; the table goes to standard error. Exit codes: 0 every measured bar is met, 1 one is missed,
2 it could not be run as asked, or a bar failed. A bar that cannot be measured here is skipped with its reason; one that fails leaves what
the others measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.environment import Environment, environment
from benchmarks.errors import BenchmarkError
from benchmarks.output import progress_bar, write
from benchmarks.stats import Estimate
from engine.errors import EngineError
from engine.threads import set_defaults
from server.cli import one_line_errors

if TYPE_CHECKING:
    from benchmarks.measuring import Measured, Setting

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

DATA = Path("data")  # in the working directory


@dataclass(frozen=True)
class Bar:
    """What is promised."""

    what: str
    bound: float
    sense: Literal["at least", "at most"]
    unit: str = "x"

    @property
    def text(self) -> str:
        return f"{self.sense} {_number(self.bound, self.unit)}"

    def is_met(self, value: float) -> bool:
        return value >= self.bound if self.sense == "at least" else value <= self.bound


BARS = {
    "one-stream": Bar("one float32 stream, no drafts: tokens/s over transformers' generate", 1.4, "at least"),
    "forward-window": Bar("a pass over 6 tokens over a pass over 1, 200 tokens into a sequence: time", 1.4, "at most"),
    "ngram": Bar("one greedy stream with n-gram drafts, summaries and retrieval: tokens/s over no drafts", 1.5, "at least"),
    "eight-streams": Bar("8 streams together over one after another, no drafts: tokens/s", 4.0, "at least"),
    "prefill": Bar("a prompt of 1,500 tokens: transformers' time over ours", 1.2, "at least"),
    "int8": Bar("one stream in int8 over float32, no drafts: tokens/s", 2.0, "at least"),
    "int8-perplexity": Bar("perplexity of GSM8K's answers in int8 over that in float32", 1.01, "at most"),
    "start": Bar("cascade serve to ready, not the first start", 12.0, "at most", " s"),
    "http-overhead": Bar("time per token of an HTTP client, less that of the engine stepped in a program", 2.0, "at most", " ms"),
    "memory": Bar("resident memory of server and engine after 200 requests over that after 20", 1.05, "at most"),
    "drafter-step": Bar("a drafted token, drawn greedily, over a step of the target: time", 6.0, "at most", " %"),
    "drafter-step-sampled": Bar("a drafted token, drawn at temperature 1, over a step of the target: time", 6.0, "at most", " %"),
    "accepted-chat": Bar("tokens a target call, exact, 5 drafts, chat questions", 2.2, "at least", ""),
    "accepted-all": Bar("tokens a target call, exact, 5 drafts, all questions", 1.8, "at least", ""),
    "accepted-chat-token_v3": Bar("tokens a target call, token_v3, 5 drafts, chat questions", 2.6, "at least", ""),
    "accepted-all-token_v3": Bar("tokens a target call, token_v3, 5 drafts, all questions", 2.1, "at least", ""),
    "lengths-1": Bar("adaptive draft lengths, one stream: tokens/s over the best fixed length", 0.95, "at least"),
    "lengths-4": Bar("adaptive draft lengths, 4 streams: tokens/s over the best fixed length", 0.95, "at least"),
    "lengths-16": Bar("adaptive draft lengths, 16 streams: tokens/s over the best fixed length", 0.95, "at least"),
    "never-slower": Bar("exact over no drafts at 1, 4 and 16 streams, the worst kind of prompts: tokens/s", 0.97, "at least"),
    "http-exact": Bar("a client's tokens/s, exact over no drafts, chat questions", 1.4, "at least"),
    "http-default": Bar("a client's tokens/s, the deployment's rule over no drafts, chat questions", 1.6, "at least"),
    "prediction": Bar(
        "a 300-line file with a name changed, scripted target: time with the file as prediction over without", 1 / 3, "at most"
    ),
    "schema": Bar("one stream held to a JSON schema over the same without: tokens/s", 0.9, "at least"),
    "front": Bar(
        "64 streams of an engine that pretends, a token each a millisecond: tokens/s through HTTP", 20_000, "at least", " tokens/s"
    ),
    "refusals": Bar("200 refused requests a second: 95 of 100 are answered within", 5.0, "at most", " ms"),
    "scrape": Bar("/metrics under 64 streams: 95 of 100 scrapes are answered within", 20.0, "at most", " ms"),
    "scrape-cost": Bar("64 streams while /metrics is scraped every second over in peace: tokens/s", 0.99, "at least"),
}


class BarResult(msgspec.Struct, frozen=True):
    """One bar: measured, skipped or failed."""

    name: str
    what: str
    bar: str
    bound: float
    unit: str
    value: Estimate | None
    repetitions: tuple[float, ...]
    detail: dict[str, Any]
    is_met: bool | None
    skipped: str | None  # why
    failed: str | None  # how

    @property
    def measured(self) -> str:
        if self.value is None:
            return self.skipped or f"failed: {self.failed}"
        return f"{_number(self.value.median, self.unit)} ({self.value.low:.3g} to {self.value.high:.3g})"

    @property
    def headline(self) -> str:
        """For the table of results, in which no bar that was asked for is missing; why one was not measured may name a machine's paths."""
        if self.value is None:
            return f"{self.name}: {'skipped' if self.skipped else 'failed'}, bar {self.bar}"
        return f"{self.name} {self.measured}, bar {self.bar}: {'met' if self.is_met else 'missed'}"


class SpeedReport(msgspec.Struct, frozen=True):
    """What a run leaves behind."""

    benchmark: str
    headline: tuple[str, ...]
    environment: Environment
    target: dict[str, Any]
    is_quick: bool
    bars: tuple[BarResult, ...]


def main() -> None:
    """Entry point of the module."""
    set_defaults()  # as `cascade` does
    app()


@app.command()
def speed(
    bar: Annotated[list[str] | None, typer.Option(metavar="NAME", help=f"One of {', '.join(BARS)}; several times for several.")] = None,
    config: Annotated[Path, typer.Option(metavar="FILE", help="The deployment whose models are used.")] = Path("configs/default.yaml"),
    data: Annotated[Path, typer.Option(metavar="FILE", help="Spec-Bench's questions, for the bar ngram.")] = DATA / "spec_bench_dev.jsonl",
    answers: Annotated[Path, typer.Option(metavar="FILE", help="GSM8K, for int8-perplexity.")] = DATA / "gsm8k_test_dev.jsonl",
    repetitions: Annotated[int, typer.Option(metavar="N", min=1, help="How often each prompt is measured.")] = 3,
    quick: Annotated[bool, typer.Option("--quick", help="Only show that it runs: few prompts, few tokens, once.")] = False,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result there as JSON.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
) -> None:
    """Measure the speed bars: medians over prompts, with 95 % bootstrap intervals over prompts, and the range of the repetitions."""
    console = Console(stderr=True)
    with one_line_errors(debug):
        names = bar or list(BARS)
        if unknown := [name for name in names if name not in BARS]:
            raise BenchmarkError(f"--bar {unknown[0]}: there is none of that name; there are {', '.join(BARS)}.")
        from benchmarks.measuring import Setting  # torch and transformers take seconds

        setting = Setting(config, data, answers, 1 if quick else repetitions, quick)
        target = {"config": str(config), "device": setting.device}  # mistakes in the file are said before anything is measured
        results = [_measure(name, setting, console) for name in names]
        report = _report(results, target, quick)
        console.print(_table(report))
        print(msgspec.json.encode(report).decode(), flush=True)
        if output is not None:
            write(output, msgspec.to_builtins(report))
    if any(result.failed for result in results):
        raise typer.Exit(2)
    if any(result.is_met is False for result in results) and not quick:
        raise typer.Exit(1)


def _measure(name: str, setting: Setting, console: Console) -> BarResult:
    from benchmarks.bars import MEASURES
    from benchmarks.measuring import BarSkipped

    with progress_bar(console, name, total=None) as tick:
        try:
            result = _result(name, MEASURES[name](replace(setting, tick=tick)))
        except BarSkipped as reason:
            result = _result(name, skipped=str(reason))
        except EngineError as error:
            result = _result(name, failed=str(error))
    console.print(f"{name}: {result.measured}, bar {result.bar}", markup=False, highlight=False, soft_wrap=True)
    return result


def _result(name: str, measured: Measured | None = None, skipped: str | None = None, failed: str | None = None) -> BarResult:
    bar = BARS[name]
    return BarResult(
        name=name,
        what=bar.what,
        bar=bar.text,
        bound=bar.bound,
        unit=bar.unit,
        value=measured.value if measured else None,
        repetitions=measured.repetitions if measured else (),
        detail=dict(measured.detail) if measured else {},
        is_met=bar.is_met(measured.value.median) if measured else None,
        skipped=skipped,
        failed=failed,
    )


def _report(results: list[BarResult], target: dict[str, Any], is_quick: bool) -> SpeedReport:
    headline = tuple(result.headline for result in results)
    return SpeedReport("speed", headline, environment("python -m benchmarks.speed"), target, is_quick, tuple(results))


def _table(report: SpeedReport) -> Table:
    table = Table(title="Speed bars" + (" (quick: the figures mean little)" if report.is_quick else ""), title_justify="left")
    for column in ("bar", "what", "wanted", "measured (95 % interval)", "repetitions", "met"):
        table.add_column(column, overflow="fold")
    for result in report.bars:
        spread = f"{min(result.repetitions):.3g} to {max(result.repetitions):.3g}" if result.repetitions else "-"
        met = {None: "skipped" if result.skipped else "FAILED", True: "yes", False: "NO"}[result.is_met]
        table.add_row(result.name, result.what, result.bar, result.measured, spread, met)
    return table


def _number(value: float, unit: str) -> str:
    return f"{value:.3g}{unit}"


if __name__ == "__main__":
    main()
