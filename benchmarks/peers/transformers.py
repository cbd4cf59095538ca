"""`python -m benchmarks.peers.transformers`: the same prompts through an engine in this process and through transformers' generate.

Greedy, one stream, prompt by prompt in turns: the deployment as it is, transformers plain, transformers with prompt lookup. Prefill is
measured apart, with long prompts and one new token. Standard output gets one JSON line; the tables go to standard error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import options
from benchmarks.environment import Environment, environment
from benchmarks.options import PromptOptions
from benchmarks.output import progress_bar, write
from benchmarks.prompts import Prompt
from benchmarks.stats import Estimate
from benchmarks.turns import Rows, Sides, Turns, compare, in_turns
from engine.threads import set_defaults
from server.cli import one_line_errors

if TYPE_CHECKING:
    from benchmarks.programs import EngineProgram, Run, TransformersProgram

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

PLAIN, LOOKUP = "transformers", "transformers, prompt lookup"


class PeerFigures(msgspec.Struct, frozen=True):
    """One way to answer, and how the engine compares with it. Ratios above 1 say that the engine is faster."""

    name: str
    tokens_per_second: Estimate
    engine_over_it: Estimate | None  # None for the engine itself
    repetitions: tuple[float, ...]
    equal_answers: int  # the same tokens as the engine's
    answers: int


class PrefillFigures(msgspec.Struct, frozen=True):
    """A long prompt and one token."""

    prompt_tokens: int
    engine_seconds: float
    transformers_seconds: float
    ratio: Estimate  # transformers' time over the engine's


class TransformersReport(msgspec.Struct, frozen=True):
    """What a run leaves behind."""

    benchmark: str
    headline: tuple[str, ...]
    environment: Environment
    target: dict[str, Any]
    load: dict[str, Any]
    decoding: tuple[PeerFigures, ...]
    prefill: PrefillFigures


@dataclass(frozen=True)
class Work:
    """What both sides are asked to do."""

    prompts: list[Prompt]
    max_tokens: int
    prompt_lookup: int
    prefill_tokens: int
    repetitions: int

    @property
    def num_prefills(self) -> int:
        return min(4, len(self.prompts))


def main() -> None:
    """Entry point of the module."""
    set_defaults()  # as `cascade` does
    app()


@app.command()
def run(
    config: Annotated[Path, typer.Option(metavar="FILE", help="The deployment.")] = Path("configs/default.yaml"),
    prompts: options.Prompts = None,
    category: options.Category = None,
    num_requests: Annotated[int, typer.Option(metavar="N", min=1, help="How many prompts.")] = 8,
    max_tokens: options.MaxTokens = 128,
    prompt_lookup: Annotated[int, typer.Option(metavar="N", min=1, help="generate's prompt_lookup_num_tokens.")] = 4,
    prefill_tokens: Annotated[int, typer.Option(metavar="N", min=2, help="Length of the prompts of the prefill part.")] = 1000,
    repetitions: Annotated[int, typer.Option(metavar="N", min=1, help="How often each prompt is measured.")] = 3,
    output: options.Output = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
) -> None:
    """Compare an engine with transformers' generate: medians over prompts, with 95 % bootstrap intervals over prompts."""
    console = Console(stderr=True)
    with one_line_errors(debug):
        asked = PromptOptions(prompts, category, None, num_requests).choose()
        report = measure(config, Work(asked, max_tokens, prompt_lookup, prefill_tokens, repetitions), console)
        console.print(_decoding_table(report), _prefill_text(report.prefill))
        print(msgspec.json.encode(report).decode(), flush=True)
        if output is not None:
            write(output, msgspec.to_builtins(report))


def measure(config: Path, work: Work, console: Console) -> TransformersReport:
    """Load both sides and run them. Raises BenchmarkError or ConfigError."""
    from benchmarks.programs import TransformersProgram, engine_program, variant  # torch and transformers take seconds

    engine = engine_program(variant(config, {}))
    theirs = TransformersProgram(engine.info)
    with progress_bar(console, "Prompts", (len(work.prompts) + work.num_prefills) * work.repetitions) as tick:
        decoding = _decoding(engine, theirs, work, tick)
        prefill = _prefill(engine, theirs, work, tick)
    return TransformersReport(
        benchmark="peers.transformers",
        headline=_headline(decoding, prefill),
        environment=environment("python -m benchmarks.peers.transformers"),
        target={"config": str(config), "device": f"{engine.info.device}, {engine.info.dtype}", "drafter": engine.info.drafter},
        load={"prompts": len(work.prompts), "max_tokens": work.max_tokens, "repetitions": work.repetitions},
        decoding=decoding,
        prefill=prefill,
    )


def _decoding(engine: EngineProgram, theirs: TransformersProgram, work: Work, tick: Callable[[], None]) -> tuple[PeerFigures, ...]:
    from benchmarks.programs import PromptEncoder

    encoder, num_tokens = PromptEncoder(engine.info.target_path), work.max_tokens
    ways: dict[str, Callable[[tuple[int, ...]], Run]] = {
        f"engine, drafter {engine.info.drafter}": lambda ids: engine.answer(ids, num_tokens),
        PLAIN: lambda ids: theirs.answer(ids, num_tokens),
        f"{LOOKUP} {work.prompt_lookup}": lambda ids: theirs.answer(ids, num_tokens, prompt_lookup=work.prompt_lookup),
    }
    sides = Sides(lambda i: encoder.new(work.prompts[i]), list(ways.values()))
    rows = in_turns(sides, Turns(len(work.prompts), work.repetitions, tick))
    return tuple(_figures(rows, side, name) for side, name in enumerate(ways))


def _figures(rows: Rows[Run], side: int, name: str) -> PeerFigures:
    comparison = compare(rows, lambda row: row[0].tokens_per_second / row[side].tokens_per_second)
    pairs = [row for repetition in rows for row in repetition]
    return PeerFigures(
        name=name,
        tokens_per_second=compare(rows, lambda row: row[side].tokens_per_second).value,
        engine_over_it=comparison.value if side else None,
        repetitions=comparison.repetitions,
        equal_answers=sum(row[side].token_ids == row[0].token_ids for row in pairs),
        answers=len(pairs),
    )


def _prefill(engine: EngineProgram, theirs: TransformersProgram, work: Work, tick: Callable[[], None]) -> PrefillFigures:
    from benchmarks.programs import PromptEncoder

    encoder = PromptEncoder(engine.info.target_path)
    sides = Sides(lambda _: encoder.words(work.prefill_tokens), [lambda ids: engine.answer(ids, 1), lambda ids: theirs.answer(ids, 1)])
    rows = in_turns(sides, Turns(work.num_prefills, work.repetitions, tick))
    pairs = [row for repetition in rows for row in repetition]
    return PrefillFigures(
        prompt_tokens=work.prefill_tokens,
        engine_seconds=median(row[0].seconds for row in pairs),
        transformers_seconds=median(row[1].seconds for row in pairs),
        ratio=compare(rows, lambda row: row[1].seconds / row[0].seconds).value,
    )


def _headline(decoding: tuple[PeerFigures, ...], prefill: PrefillFigures) -> tuple[str, ...]:
    peers = [(peer.name, peer.engine_over_it) for peer in decoding]
    ratios = [f"{_interval(ratio)} of {name}" for name, ratio in peers if ratio is not None]
    return (*ratios, f"prefill of {prefill.prompt_tokens} tokens {_interval(prefill.ratio)}")


def _decoding_table(report: TransformersReport) -> Table:
    table = Table(title=f"One greedy stream, at most {report.load['max_tokens']} tokens, prompts included", title_justify="left")
    for column in ("", "tokens/s", "engine over it", "repetitions", "equal answers"):
        table.add_column(column, justify="left" if not column else "right")
    for peer in report.decoding:
        spread = f"{min(peer.repetitions):.2f} to {max(peer.repetitions):.2f}" if peer.engine_over_it else ""
        ratio = _interval(peer.engine_over_it) if peer.engine_over_it else ""
        equal = f"{peer.equal_answers} of {peer.answers}" if peer.engine_over_it else ""
        table.add_row(peer.name, f"{peer.tokens_per_second.median:.1f}", ratio, spread, equal)
    return table


def _prefill_text(prefill: PrefillFigures) -> str:
    return (
        f"Prefill of {prefill.prompt_tokens} tokens: engine {prefill.engine_seconds:.2f} s, "
        f"transformers {prefill.transformers_seconds:.2f} s, ratio {_interval(prefill.ratio)}"
    )


def _interval(value: Estimate) -> str:
    return f"{value.median:.2f}x ({value.low:.2f} to {value.high:.2f})"


if __name__ == "__main__":
    main()
