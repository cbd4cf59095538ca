"""A result as a file, for report.py and for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from benchmarks.errors import BenchmarkError


def write(path: Path, content: dict[str, Any]) -> None:
    """A result as a file. Raises BenchmarkError."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.format(msgspec.json.encode(content)) + b"\n")
    except OSError as error:
        raise BenchmarkError(f"--output {path}: cannot be written: {error.strerror}.") from error
