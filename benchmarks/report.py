"""`python -m benchmarks.report`: the JSON files in benchmarks/results as the table of benchmarks/README.md, between its two markers.

Every figure of that table comes from a run; nothing else writes there. With --check nothing is written, and a stale table is an error.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from benchmarks.environment import Environment
from benchmarks.errors import BenchmarkError
from server.cli import one_line_errors

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

FOLDER = Path(__file__).parent
BEGIN, END = "<!-- results: written by python -m benchmarks.report -->", "<!-- end of results -->"
HEAD = "| date | benchmark | machine, device | versions | command | figures |\n| --- | --- | --- | --- | --- | --- |"
SHOWN_VERSIONS = ("cascade-serve", "torch", "transformers")


class Result(msgspec.Struct, frozen=True):
    """What the table takes from a result, whichever benchmark wrote it."""

    benchmark: str
    headline: tuple[str, ...]
    environment: Environment
    target: dict[str, Any] = {}
    is_quick: bool = False


@app.command()
def report(
    results: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the JSON files are.")] = FOLDER / "results",
    readme: Annotated[Path, typer.Option(metavar="FILE", help="Where the table is.")] = FOLDER / "README.md",
    check: Annotated[bool, typer.Option("--check", help="Write nothing; end with 1 if the table is not that of the files.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
) -> None:
    """Write the table of results."""
    with one_line_errors(debug):
        before = readme.read_text("utf-8")
        after = with_table(before, table_of(results))
    if check:
        raise typer.Exit(before != after)
    readme.write_text(after, "utf-8")


def table_of(folder: Path) -> str:
    """One row a file, by date. Raises BenchmarkError for a file that no benchmark wrote, and for figures that mean little."""
    rows = sorted((_read(file) for file in folder.glob("*.json")), key=lambda result: result.environment.date)
    return "\n".join([HEAD, *map(_row, rows)]) if rows else "No results yet."


def with_table(text: str, table: str) -> str:
    """A text with the table between the markers replaced. Raises BenchmarkError without markers."""
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise BenchmarkError(f"The README needs the lines {BEGIN!r} and {END!r}, once each.")
    head, _, rest = text.partition(BEGIN)
    return f"{head}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}"


def _read(file: Path) -> Result:
    try:
        result = msgspec.json.decode(file.read_bytes(), type=Result)
    except msgspec.DecodeError as error:
        raise BenchmarkError(f"{file} is not the result of a benchmark: {error}.") from error
    if result.is_quick:
        raise BenchmarkError(f"{file} was measured with --quick; such figures are not for a table. Remove it.")
    return result


def _row(result: Result) -> str:
    where = result.environment
    device = result.target.get("device") or result.target.get("fingerprint")
    machine = ", ".join([where.machine, f"{where.num_cpus} CPUs", *([device] if device else [])])
    versions = ", ".join(f"{name} {where.versions[name]}" for name in SHOWN_VERSIONS if name in where.versions)
    cells = (where.date[:10], result.benchmark, machine, versions, f"`{where.command}`", "<br>".join(result.headline))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    app()
