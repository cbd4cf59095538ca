"""`python -m benchmarks.gpu`: what this engine makes of a GPU, one named bar each, against what the GPU itself does and transformers.

Needs no network and reads no weights but those of the bar `real-text`: models have real shapes and random weights, made on the device.
Where a figure hangs on how often drafts stand, the pair's agreement is tuned, and the figure says so (gpu_models.py).

What is expected stands beside each bar, with its arithmetic, and was written down before anything was measured; a run prints how far off it
was. Standard output gets one line, a JSON object; with --output it is written after every bar, so that a run that is cut off keeps what it
has. Exit codes as those of speed.py: 0 every measured bar is met, 1 one is missed, 2 it could not be run as asked, or a bar failed.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment
from benchmarks.errors import BenchmarkError
from benchmarks.gpu_predictions import BARS
from benchmarks.output import progress_bar, write
from benchmarks.speed import BarResult, SpeedReport
from engine.errors import EngineError
from engine.threads import set_defaults
from server.cli import one_line_errors

if TYPE_CHECKING:
    from benchmarks.gpu_setting import GpuSetting
    from benchmarks.measuring import Measured

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
_log = logging.getLogger(__name__)


class GpuBarResult(BarResult, frozen=True, kw_only=True):
    """One bar: measured, skipped or failed, and what had been expected."""

    weights: str
    predicted: float
    why: str
    seconds: float  # that it took, models and tuning included

    @property
    def distance(self) -> str:
        """From what was predicted."""
        return "-" if self.value is None else f"{100 * (self.value.median / self.predicted - 1):+.0f} %"

    @property
    def headline(self) -> str:
        return f"{super().headline} ({self.weights}; predicted {self.predicted:g}{self.unit})"


class GpuReport(SpeedReport, frozen=True):
    """The same, of bars on a GPU."""

    bars: tuple[GpuBarResult, ...]


def main() -> None:
    """Entry point of the module."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    set_defaults()  # as `cascade` does
    app()


@app.command()
def gpu(
    bar: Annotated[list[str] | None, typer.Option(metavar="NAME", help=f"One of {', '.join(BARS)}; several times for several.")] = None,
    device: Annotated[str, typer.Option(metavar="NAME", help="cuda, cuda:N, or cpu, which only shows that it runs.")] = "cuda",
    shape: Annotated[str, typer.Option(metavar="NAME", help="full, or tiny, whose figures mean little.")] = "full",
    config: Annotated[Path, typer.Option(metavar="FILE", help="The deployment of real-text.")] = Path("configs/default.yaml"),
    repetitions: Annotated[int, typer.Option(metavar="N", min=1, help="How often each prompt is measured.")] = 3,
    budget: Annotated[float, typer.Option(metavar="SECONDS", min=0, help="A bar begins no further prompt behind it.")] = 60.0,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result there as JSON, after every bar.")] = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
) -> None:
    """Measure the bars of a GPU: medians over prompts, with 95 % bootstrap intervals over prompts, beside what was predicted."""
    console = Console(stderr=True)
    if not console.is_terminal:
        console.width = 200  # of a log; at 80 no word of so many columns is whole
    with one_line_errors(debug):
        names = bar or list(BARS)
        if unknown := [name for name in names if name not in BARS]:
            raise BenchmarkError(f"--bar {unknown[0]}: there is none of that name; there are {', '.join(BARS)}.")
        from benchmarks.gpu_models import SHAPES, Models
        from benchmarks.gpu_setting import GpuSetting  # torch and transformers take seconds
        from engine.model.loader import resolve_device

        if shape not in SHAPES:
            raise BenchmarkError(f"--shape {shape}: there are {' and '.join(SHAPES)}.")
        models = Models(SHAPES[shape], resolve_device(device))
        setting, results = GpuSetting(models, config, repetitions, budget), list[GpuBarResult]()
        for name in names:
            results.append(_measure(name, setting, console))
            report = _report(results, setting)
            if output is not None:
                write(output, msgspec.to_builtins(report))
        console.print(_table(report))
        print(msgspec.json.encode(report).decode(), flush=True)
    if any(result.failed for result in results):
        raise typer.Exit(2)
    if any(result.is_met is False for result in results) and not report.is_quick:
        raise typer.Exit(1)


def _measure(name: str, setting: GpuSetting, console: Console) -> GpuBarResult:
    from benchmarks.gpu_bars import GPU_MEASURES
    from benchmarks.measuring import BarSkipped

    start = time.monotonic()
    with progress_bar(console, name, total=None) as tick:
        try:
            result = _result(name, GPU_MEASURES[name](replace(setting, tick=tick)))
        except BarSkipped as reason:
            result = _result(name, skipped=str(reason))
        except EngineError as error:
            result = _result(name, failed=str(error))
        except Exception as error:  # noqa: BLE001  # a mistake in one bar must not cost what the others measured
            _log.exception("%s failed", name)
            result = _result(name, failed=f"{type(error).__name__}: {error}")
    _free()
    result = msgspec.structs.replace(result, seconds=time.monotonic() - start)
    line = f"{name}: {result.measured}, bar {result.bar}, predicted {result.predicted:g}{result.unit} ({result.distance}); {result.weights}"
    console.print(f"{line}; took {result.seconds:.0f} s", markup=False, highlight=False, soft_wrap=True)
    return result


def _free() -> None:
    """Have the engines of a bar gone before the next one makes its own."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _result(name: str, measured: Measured | None = None, skipped: str | None = None, failed: str | None = None) -> GpuBarResult:
    bar = BARS[name]
    return GpuBarResult(
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
        weights=bar.weights,
        predicted=bar.predicted,
        why=bar.why,
        seconds=0.0,
    )


def _report(results: list[GpuBarResult], setting: GpuSetting) -> GpuReport:
    shape = setting.shape
    target = {"device": _device_name(setting), "shape": shape.name, "dtype": str(shape.dtype).removeprefix("torch.")}
    headline = tuple(result.headline for result in results)
    return GpuReport("gpu", headline, environment("python -m benchmarks.gpu"), target, shape.name != "full", tuple(results))


def _device_name(setting: GpuSetting) -> str:
    import torch

    device = setting.device
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _table(report: GpuReport) -> Table:
    quick = " (tiny shapes: the figures mean little)" if report.is_quick else ""
    table = Table(title=f"Bars of {report.target['device']}, {report.target['dtype']}{quick}", title_justify="left")
    for column in ("bar", "what", "weights", "wanted", "predicted", "measured (95 % interval)", "off by", "repetitions", "met"):
        table.add_column(column, overflow="fold")
    for result in report.bars:
        spread = f"{min(result.repetitions):.3g} to {max(result.repetitions):.3g}" if result.repetitions else "-"
        met = {None: "skipped" if result.skipped else "FAILED", True: "yes", False: "NO"}[result.is_met]
        predicted = f"{result.predicted:g}{result.unit}"
        table.add_row(result.name, result.what, result.weights, result.bar, predicted, result.measured, result.distance, spread, met)
    return table


if __name__ == "__main__":
    main()
