"""A training run on disk: one file with everything that decides how it goes on, replaced whole; and a log of one JSON line a step.

The log is cut back to where the checkpoint was, so that after a kill it reads as if there had been none.
"""

from __future__ import annotations

import io
import json
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
        """The newest checkpoint, with the log cut back to it; None for a run that begins. Raises SourceError."""
        if not self._checkpoint.exists():
            self._cut(0)
            return None
        try:
            state: dict[str, Any] = torch.load(self._checkpoint, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise SourceError(
                f"{self._checkpoint} cannot be read ({type(error).__name__}). Remove it, and the run begins again."
            ) from error
        self._cut(state["log_bytes"])
        return state

    def save(self, state: dict[str, Any]) -> None:
        """Replace the checkpoint. Raises SourceError."""
        num_bytes = self._log.stat().st_size if self._log.exists() else 0
        content = io.BytesIO()
        torch.save(state | {"log_bytes": num_bytes}, content)
        write_whole(self._checkpoint, content.getvalue())

    def log(self, entry: dict[str, Any]) -> None:
        with self._log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def entries(self, kind: str) -> list[dict[str, Any]]:
        """The log's lines of one kind, in order."""
        if not self._log.exists():
            return []
        lines = map(json.loads, self._log.read_text("utf-8").splitlines())
        return [entry for entry in lines if entry["kind"] == kind]

    def _cut(self, num_bytes: int) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with self._log.open("ab") as file:
                file.truncate(num_bytes)
        except OSError as error:
            raise SourceError(f"{self._log} cannot be written: {error.strerror}.") from error
