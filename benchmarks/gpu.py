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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.environment import environment
from benchmarks.errors import BenchmarkError
from benchmarks.output import progress_bar, write
from benchmarks.speed import Bar, BarResult, SpeedReport
from engine.errors import EngineError
from engine.threads import set_defaults
from server.cli import one_line_errors

if TYPE_CHECKING:
    from benchmarks.gpu_setting import GpuSetting
    from benchmarks.measuring import Measured

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
_log = logging.getLogger(__name__)

RANDOM = "random weights"
TUNED = "random weights, agreement tuned to {}, drafter: the target's first layer and its head"
REAL = "real weights and text"


@dataclass(frozen=True, kw_only=True)
class GpuBar(Bar):
    """What is promised, on what weights, and what is expected."""

    weights: str = RANDOM
    predicted: float
    why: str  # the arithmetic of the prediction


# Predictions are for one H100 SXM (3.35 TB/s, of which copies reach 2.9; 650 Tflop/s of 989 for real matrices) and were written on
# 2026-11-22, before this engine had run there with these shapes. An engine that launches its kernels one by one takes 10 us for each,
# some 20 a layer; predictions are for such a one.
BARS: dict[str, GpuBar] = {
    "decode-1": GpuBar(
        "8B, one stream, no drafts: bytes of weights and KV read a second, of the bytes copied a second",
        75.0,
        "at least",
        " %",
        predicted=65.0,
        why="15.0 GB are 5.2 ms of copying; 32 layers of 20 kernels are 6.4 ms of launches, and 1.5 ms sample and schedule: 8 ms",
    ),
    "decode-64": GpuBar(
        "8B, 64 streams of 1,000 tokens, no drafts: the same",
        60.0,
        "at least",
        " %",
        predicted=60.0,
        why="15.0 GB and 8.9 GB of KV are 8.2 ms of copying; KV read where it lies, sampling and scheduling of 64 take 5 ms more",
    ),
    "verify-6": GpuBar(
        "8B, a pass over 6 tokens over a pass over 1: time",
        1.10,
        "at most",
        "x",
        predicted=1.03,
        why="the weights are read once for both; 6 rows leave the tensor cores idle as 1 does; KV and head are a little more",
    ),
    "idle-32": GpuBar(
        "8B, 32 streams, no drafts: the share of a step in which the GPU does nothing",
        8.0,
        "at most",
        " %",
        predicted=20.0,
        why="busy for 15.0 GB and small kernels: 7 ms; launches take 6.4 ms beside them, and 1.8 ms of sampling and planning lie between",
    ),
    "prefill": GpuBar(
        "8B, a prompt of 8,192 tokens: operations a second, of those of a product of matrices",
        55.0,
        "at least",
        " %",
        predicted=50.0,
        why="132 Tflop are 0.20 s at 650 Tflop/s; norms, rotation, activations and KV move 0.3 TB (0.1 s); attention at half the rate",
    ),
    "draft-step": GpuBar(
        "0.6B, one stream: time of a drafted token over that of copying the weights it reads",
        1.5,
        "at most",
        "x",
        predicted=14.0,
        why="1.14 GB are 0.39 ms of copying; 28 layers of 20 launches at 10 us are 5.6 ms. Recorded launches would make it 1.6",
    ),
    "fused": GpuBar(
        "8B, a pass over 1 token with torch's operations between products over one with our kernels: time",
        1.0,
        "at least",
        "x",
        predicted=1.2,
        why="a layer launches 4 kernels for 23 and 12 for 31 in all: busy for 5.2 ms and 2 us a kernel, 7.2 over 6.0 ms, recorded or not",
    ),
    "int8": GpuBar(
        "8B, one stream, no drafts, 8-bit weights: tokens/s over bfloat16",
        1.0,
        "at least",
        "x",
        predicted=1.2,
        why="7.5 GB for 15.0: 2.6 ms less of 8, were it not for launches, of which there are as many; a prompt takes a copy of weights",
    ),
    "fp8": GpuBar(
        "8B, one stream, no drafts, 8-bit floating point: tokens/s over bfloat16",
        1.0,
        "at least",
        "x",
        predicted=0.6,
        why="2.6 ms less of reading, but 129 layers round inputs with 5 launches each: 6 ms more. Recorded launches would make it 1.4",
    ),
    "generate": GpuBar(
        "8B, one stream, five drafts at a time: tokens/s over transformers' generate, no drafts",
        4.0,
        "at least",
        "x",
        weights=TUNED.format(0.8),
        predicted=5.5,
        why="generate takes 25 ms a token; a round takes 8 ms and 5 drafts of 1.2 ms, and brings 3.7 tokens: 3.8 ms, prompt included 4.5",
    ),
    "generate-assisted": GpuBar(
        "8B, one stream, five drafts at a time: tokens/s over generate with the same drafter as its assistant_model",
        3.0,
        "at least",
        "x",
        weights=TUNED.format(0.8),
        predicted=2.8,
        why="its round takes 28 ms and 5 drafts of 3 ms, ours 14 ms, for the same 3.7 tokens",
    ),
    "agreement-0.8": GpuBar(
        "8B, one stream, five drafts at a time: tokens/s over no drafts",
        2.0,
        "at least",
        "x",
        weights=TUNED.format(0.8),
        predicted=2.1,
        why="(1 - 0.8^6) / 0.2 = 3.69 tokens for a pass and 5 drafts of 9.3 % of its bytes each: 2.5; launches make a draft 15 %",
    ),
    "agreement-0.7": GpuBar(
        "8B, one stream, five drafts at a time: tokens/s over no drafts",
        1.0,
        "at least",
        "x",
        weights=TUNED.format(0.7),
        predicted=1.7,
        why="(1 - 0.7^6) / 0.3 = 2.94 tokens for the same",
    ),
    "agreement-0.6": GpuBar(
        "8B, one stream, five drafts at a time: tokens/s over no drafts",
        1.0,
        "at least",
        "x",
        weights=TUNED.format(0.6),
        predicted=1.35,
        why="(1 - 0.6^6) / 0.4 = 2.38 tokens for the same",
    ),
    **{
        f"adaptive-{num}": GpuBar(
            f"8B, {num} stream{'s' * (num > 1)}, adaptive lengths: tokens/s over no drafts",
            0.98,
            "at least",
            "x",
            weights=TUNED.format(0.8),
            predicted=predicted,
            why=why,
        )
        for num, predicted, why in (
            (1, 2.0, "as agreement-0.8, less what choosing costs"),
            (8, 1.8, "48 rows still cost what 8 do; what each stream's drafts cost the host grows"),
            (32, 1.5, "192 rows are at the ridge of the tensor cores (650 Tflop/s over 2.9 TB/s: 224 rows)"),
            (128, 1.05, "128 rows are half way to the ridge: a draft more for each costs nearly what it brings"),
        )
    },
    "real-text": GpuBar(
        "the embedded pair of 135 million parameters, one stream, exact: tokens/s over no drafts",
        0.98,
        "at least",
        "x",
        weights=REAL,
        predicted=1.0,
        why="every pass of so small a model is launches alone, and a draft's are a tenth of them: drafts pay where they stand",
    ),
}


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
