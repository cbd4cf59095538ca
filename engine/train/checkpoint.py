"""A training run on disk: one file with everything that decides how it goes on, replaced whole; and a log of one JSON line a step.

The log is cut back to where the checkpoint was, so that after a kill it reads as if there had been none.
"""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path
from typing import Any

import torch

from engine.errors import SourceError
from engine.train.shards import write_whole

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"


class RunFolder:
    """Checkpoint and log of one run."""

    def __init__(self, folder: Path):
        self._checkpoint, self._log = folder / CHECKPOINT, folder / LOG
        self._folder = folder

    def load(self) -> dict[str, Any] | None:
        """The newest checkpoint; None for a run that begins. Changes nothing. Raises SourceError."""
        if not self._checkpoint.exists():
            return None
        try:
            state: dict[str, Any] = torch.load(self._checkpoint, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise SourceError(
                f"{self._checkpoint} cannot be read ({type(error).__name__}). Remove it, and the run begins again."
            ) from error
        return state

    def go_on_from(self, state: dict[str, Any] | None) -> None:
        """Cut the log back to where a checkpoint was, or begin it. Raises SourceError."""
        num_bytes = 0 if state is None else state["log_bytes"]
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._log.open("a+b") as file:
                file.seek(0)
                kept = file.read(num_bytes)  # less where somebody took of it; then what is left of the last line is no line
                file.truncate(kept.rfind(b"\n") + 1)
        except OSError as error:
            raise SourceError(f"{self._log} cannot be written: {error.strerror}.") from error

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint, behind the lines that it counts. Raises SourceError."""
        num_bytes = 0
        if self._log.exists():
            with self._log.open("rb") as file:
                os.fsync(file.fileno())
                num_bytes = os.fstat(file.fileno()).st_size
        content = io.BytesIO()
        torch.save(state | {"log_bytes": num_bytes}, content)
        write_whole(self._checkpoint, content.getvalue())

    def log(self, entry: dict[str, Any]) -> None:
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def entries(self, kind: str, state: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        """The log's lines of one kind, in order; with a checkpoint's state those up to it: a training may be writing on."""
        if not self._log.exists():
            return []
        content = self._log.read_bytes()[: None if state is None else state["log_bytes"]]
        lines = map(json.loads, content[: content.rfind(b"\n") + 1].splitlines())
        return [entry for entry in lines if entry["kind"] == kind]
