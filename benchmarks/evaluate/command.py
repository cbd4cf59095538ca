"""`cascade evaluate`: the curve of a deployment's pair. What is typed, in which order things are done, and what is left behind.

Standard output gets one line, a JSON object; everything for people goes to standard error. Exit codes: 0 measured, 2 it could not be run as
asked, 130 interrupted; the same command goes on where one ended.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer
from rich.console import Console

from benchmarks.environment import Environment, environment
from benchmarks.errors import BenchmarkError
from benchmarks.evaluate import points as point_names
from benchmarks.evaluate import sandbox
from benchmarks.evaluate.figures import MEASURES, NATS, PASS_RATE, Quality, figures_of, recommend
from benchmarks.evaluate.plots import draw, require_matplotlib
from benchmarks.evaluate.points import DRAFTER, GREEDY, TARGET, Points
from benchmarks.evaluate.record import Journal, digest
from benchmarks.evaluate.report import Evaluation, markdown, summary, terminal_table, write_text
from benchmarks.evaluate.tasks import TASKS, Item, Task, of_categories, sample
from benchmarks.output import progress_bar, write

if TYPE_CHECKING:
    from benchmarks.evaluate.pair import Pair

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

QUICK_PROMPTS, QUICK_TOKENS = 3, 16
FILE_WIDTH = 140  # of a table that goes to a file; a terminal has its own


@dataclass(frozen=True)
class Options:
    """What was typed."""

    config: Path
    task: str
    data: Path | None
    category: str | None
    rules: str
    alphas: str | None
    num_prompts: int | None
    max_tokens: int | None
    temperature: float
    seed: int
    concurrency: int
    draft_length: int | None
    tolerance: float
    allow_code_execution: bool
    quick: bool


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before a model is loaded."""

    options: Options
    task: Task
    items: list[Item]
    max_tokens: int
    points: Points
    pair: Pair
    sandbox: sandbox.Isolation | None

    @property
    def text(self) -> str:
        """What a table is titled with."""
        options = self.options
        of = f"{options.task} ({self.task.judged_by})" if self.task.judged_by else options.task
        drafts = "" if options.draft_length is None else f", {options.draft_length} drafts"
        how = "greedy" if options.temperature == 0 else f"temperature {options.temperature:g}, seed {options.seed}"
        return f"{of}, {len(self.items)} prompts, {how}, at most {self.max_tokens} tokens, concurrency {options.concurrency}{drafts}"


@app.command()
def evaluate(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Deployment file, such as configs/default.yaml.", show_default=False)],
    task: Annotated[str, typer.Option(metavar="NAME", help=f"One of {', '.join(TASKS)}.")] = "chat",
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="chat: JSON lines with prompt, messages or turns (default: 24 built-in prompts); gsm8k: with question and answer; "
            "humaneval: with task_id, prompt, entry_point and test. May be .gz for the last two.",
        ),
    ] = None,
    category: Annotated[str | None, typer.Option(metavar="A,B", help="Only prompts of these categories.")] = None,
    rules: Annotated[str, typer.Option(metavar="A,B", help="Rules beside exact and the baseline lossy, or all.")] = "token_v3,token_v2,opt",
    alphas: Annotated[str | None, typer.Option(metavar="RULE=A,B;...", help="Instead of a rule's own grid of four.")] = None,
    num_prompts: Annotated[int | None, typer.Option(metavar="N", min=1, help="Default: all; of gsm8k 100.")] = None,
    max_tokens: Annotated[int | None, typer.Option(metavar="N", min=1, help="Longest answer. Default: 128, 256, 384 by task.")] = None,
    temperature: Annotated[float, typer.Option(metavar="T", min=0, max=2)] = 0.0,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Fixes which prompts, and what is drawn: prompt i gets seed N + i everywhere.")
    ] = 0,
    concurrency: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts that are asked together.")] = 1,
    draft_length: Annotated[
        int | None, typer.Option(metavar="N", min=1, max=64, help="Always so many drafts, instead of the deployment's policy.")
    ] = None,
    tolerance: Annotated[
        float, typer.Option(metavar="X", min=0, help="A loss of quality that is none, in nats a token or as a share of right answers.")
    ] = 0.05,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="humaneval runs programs that a model wrote, in a sandbox.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Only show that it runs: few prompts, few tokens, one alpha a rule.")] = False,
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Records, tables and plots. Default: runs/evaluate/TASK.", show_default=False)
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Begin again: drop the answers that are in the folder.")] = False,
    no_plots: Annotated[bool, typer.Option("--no-plots", help="Tables alone; needs no matplotlib.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,  # read by `cascade`
) -> None:
    """Measure quality against cost of every rule: the curve that says where to set the dial.

    Each prompt is answered under all points in turns: the target alone, exact, lossy speculative decoding as the baseline, the rules over
    their alphas, and the drafter alone. A killed run goes on with the same command.
    """
    options = Options(
        config, task, data, category, rules, alphas, num_prompts, max_tokens, temperature, seed, concurrency, draft_length, tolerance,
        allow_code_execution, quick,
    )  # fmt: skip
    folder, console = output or Path("runs") / "evaluate" / task, Console(stderr=True, width=None if sys.stderr.isatty() else FILE_WIDTH)
    if not no_plots:
        require_matplotlib()
    try:
        evaluation = run(options, folder / "answers.jsonl", fresh, console)
    except KeyboardInterrupt:
        console.print(f"Interrupted. The same command goes on; answers are in {folder}.", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(130) from None
    finish(evaluation, folder, not no_plots, console)


def run(options: Options, journal: Path, is_fresh: bool, console: Console) -> Evaluation:
    """Everything but the files. Raises BenchmarkError or ConfigError where it cannot be begun."""

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    prepared, where = prepare(options, say), environment("cascade")
    for name, reason in prepared.points.skipped.items():
        say(f"Skipped: {name}, since {reason}.")
    with Journal(journal, _settings(prepared, where), is_fresh) as kept:
        records = prepared.pair.records(prepared, kept, lambda total: _progress(console, total), say)
    quality = Quality(PASS_RATE if prepared.task.judged_by else NATS, options.tolerance, prepared.pair.end_token_ids)
    figures = figures_of(records, prepared.points.chosen, quality)
    best = recommend(figures, quality)
    return Evaluation(
        benchmark="evaluate",
        headline=(prepared.text, f"{best.point} recommended: {best.reason}"),
        environment=where,
        target=prepared.pair.about,
        load=_load(prepared),
        is_quick=options.quick,
        criterion=quality.criterion,
        recommendation=best,
        points=tuple(figures),
        skipped=dict(prepared.points.skipped),
        sandbox=prepared.sandbox,
    )


def prepare(options: Options, say: Callable[[str], None]) -> Prepared:
    """Refuse now what cannot be run. Loads no weights."""
    if options.task not in TASKS:
        raise BenchmarkError(f"--task {options.task}: there is none of that name; there are {', '.join(TASKS)}.")
    task, isolation = TASKS[options.task], None
    if options.task == "humaneval":
        isolation = _try_sandbox(options.allow_code_execution, say)
    count = options.num_prompts or (QUICK_PROMPTS if options.quick else task.num_items)
    items = of_categories(task.read(options.data), options.category)
    items = sample(items, count if options.num_prompts else min(count or len(items), len(items)), options.seed)
    from benchmarks.evaluate.pair import Pair  # torch and transformers take seconds

    pair = Pair.of(options.config, options.draft_length, say)
    chosen = point_names.choose(options.rules, options.alphas, pair.drafter_kind, pair.has_probabilities, options.quick)
    if options.temperature > 0:  # else it is the target's own text
        chosen = replace(chosen, chosen=(GREEDY, *chosen.chosen))
    max_tokens = options.max_tokens or (QUICK_TOKENS if options.quick else task.max_tokens)
    if DRAFTER in chosen.chosen and (reason := pair.drafter_refusal(items, max_tokens)):
        chosen = chosen.without(DRAFTER, reason)
    return Prepared(options, task, items, max_tokens, chosen, pair, isolation)


def finish(evaluation: Evaluation, folder: Path, has_plots: bool, console: Console) -> None:
    """Write what is for people and for programs."""
    plots = draw(evaluation, folder) if has_plots else []
    write(folder / "table.json", msgspec.to_builtins(evaluation))
    write_text(folder / "table.md", markdown(evaluation, plots))
    console.print(terminal_table(evaluation))
    best = evaluation.recommendation
    for text in (f"Recommended: {best.point}. {best.reason}", evaluation.criterion, f"Intervals, pairs and plots: {folder}"):
        console.print(text, markup=False, highlight=False, soft_wrap=True)
    files = [str(folder / name) for name in ("answers.jsonl", "table.json", "table.md", *plots)]
    print(msgspec.json.encode(summary(evaluation, files)).decode(), flush=True)


# ---------------------------------------------------------------------- parts
@contextmanager
def _progress(console: Console, total: int) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, and elsewhere a line now and then: a sweep may take hours."""
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        advance()
        if not console.is_terminal and done * 10 // total > (done - 1) * 10 // total:
            console.print(f"{done:,} of {total:,} answers", highlight=False)

    with progress_bar(console, "Answers", total) as advance:
        yield tick


def _try_sandbox(is_allowed: bool, say: Callable[[str], None]) -> sandbox.Isolation:
    """Raises BenchmarkError unless programs may and can be run."""
    if not is_allowed:
        raise BenchmarkError("--task humaneval runs programs that a model wrote; say --allow-code-execution if you want that.")
    outcome = sandbox.run("")
    if outcome.verdict != "passed":
        raise BenchmarkError(f"The sandbox runs nothing here: {outcome.detail}.")
    missing = [what for what, holds in zip(_FENCES, msgspec.structs.astuple(outcome.isolation), strict=True) if not holds]
    if missing:
        say(f"The sandbox cannot do everything here. A program: {'; '.join(missing)}.")
    return outcome.isolation


_FENCES = (
    "has the network",
    "sees other processes",
    "may write wherever this user may",
    "runs as root, whom no limit on the number of processes holds",
)


def _settings(prepared: Prepared, where: Environment) -> dict[str, Any]:
    """All that answers depend on. A run with others may not add to the same file."""
    options = prepared.options
    return {
        "task": options.task,
        "prompts": digest("\n".join(repr((item.name, item.messages)) for item in prepared.items)),
        "num_prompts": len(prepared.items),
        "max_tokens": prepared.max_tokens,
        "temperature": options.temperature,
        "seed": options.seed,
        "concurrency": options.concurrency,
        "points": [point.label for point in prepared.points.chosen],
        **prepared.pair.settings,
        "machine": where.machine,
        "num_cpus": where.num_cpus,
        "versions": where.versions,
    }


def _load(prepared: Prepared) -> dict[str, Any]:
    options = prepared.options
    return {
        "text": prepared.text,
        "task": options.task,
        "num_prompts": len(prepared.items),
        "max_tokens": prepared.max_tokens,
        "temperature": options.temperature,
        "seed": options.seed,
        "concurrency": options.concurrency,
        "quality": MEASURES[PASS_RATE if prepared.task.judged_by else NATS].title,
        "tolerance": options.tolerance,
        "baseline": point_names.BASELINE,
        "ends": [point.label for point in (TARGET, DRAFTER) if point in prepared.points.chosen],
    }
