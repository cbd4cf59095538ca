"""What a benchmark shows while it runs, and its result as a file. Nothing of it goes to standard output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.errors import BenchmarkError


@contextmanager
def progress_bar(console: Console, what: str, total: int | None) -> Iterator[Callable[[], None]]:
    """Gives what is to be called whenever one of `total` things is done; None where nobody knows how many. Shown on terminals alone."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


def write(path: Path, content: dict[str, Any]) -> None:
    """A result as a file. Raises BenchmarkError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(content)) + b"\n")
    except OSError as error:
        raise BenchmarkError(f"--output {path}: cannot be written: {error.strerror}.") from error
