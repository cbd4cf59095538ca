"""What a run keeps of every answer, and the file that it is appended to. A killed run goes on from there; a different one is refused."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import msgspec

from benchmarks.errors import BenchmarkError


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One answer: a point on a prompt."""

    point: str
    prompt: str
    category: str | None = None
    token_ids: tuple[int, ...]  # an end token included
    text: str
    finish_reason: str
    seconds: float  # from the request to its last token; the prompt's KV is cached, for all points alike
    first_seconds: float  # until the first tokens
    num_first: int  # tokens that came then
    num_target_calls: int = 0
    num_drafter_calls: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_lossy_tokens: int = 0  # of the accepted ones, those that the same coin would have rejected under exact
    num_cached_tokens: int = 0
    nats: float  # -log p of the emitted tokens under the target, at temperature 1
    verdict: str | None = None


class Head(msgspec.Struct, frozen=True):
    """The first line: what the answers below it were made with."""

    settings: dict[str, Any]
    hash: str


def digest(content: bytes | str) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:16]


class Journal:
    """An append-only file of records under a head. One process at a time."""

    def __init__(self, path: Path, settings: Mapping[str, Any], is_fresh: bool = False):
        """Open or begin the file. Raises BenchmarkError, naming what differs, for a file of other settings."""
        plain = msgspec.json.decode(msgspec.json.encode(settings))  # as it will be read again
        head = Head(plain, digest(msgspec.json.encode(plain, order="sorted")))
        self.records: list[Record] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = path.open("a+b")
        except OSError as error:
            raise BenchmarkError(f"{path} cannot be written: {error.strerror}.") from error
        try:
            self._lock(path)
            self._begin(path, head, is_fresh)
        except BaseException:
            self._file.close()
            raise

    def append(self, records: Iterable[Record]) -> None:
        """Keep answers that belong together: all of them or, if the process is killed meanwhile, perhaps some."""
        added = list(records)
        self._file.write(b"".join(msgspec.json.encode(record) + b"\n" for record in added))
        self._file.flush()
        self.records += added

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _lock(self, path: Path) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BenchmarkError(f"{path} is being written by another run; wait for it, or name another --output.") from error

    def _begin(self, path: Path, head: Head, is_fresh: bool) -> None:
        self._file.seek(0)
        lines = b"" if is_fresh else self._file.read()
        whole = lines[: lines.rfind(b"\n") + 1]  # a killed run may have left half a line
        self._file.truncate(len(whole))
        first, *others = whole.splitlines() or [b""]
        if not first:
            self._file.write(msgspec.json.encode(head) + b"\n")
            self._file.flush()
            return
        try:
            old = msgspec.json.decode(first, type=Head)
            self.records = [msgspec.json.decode(line, type=Record) for line in others]
        except msgspec.DecodeError as error:
            raise BenchmarkError(f"{path} is not a run of `cascade evaluate` ({error}); name another --output, or --fresh.") from error
        if old.hash != head.hash:
            changes = "; ".join(_differences(old.settings, head.settings)) or "the file was edited"
            raise BenchmarkError(
                f"{path} holds another run: {changes}. Answers of two runs cannot be compared: name another --output, or begin again with "
                "--fresh."
            )


def _differences(old: Any, new: Any, place: str = "") -> list[str]:
    """What differs between two settings, by key."""
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            text
            for key in sorted({*old, *new})
            for text in _differences(old.get(key), new.get(key), f"{place}.{key}" if place else str(key))
        ]
    return [] if old == new else [f"{place} was {_short(old)} and is {_short(new)}"]


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
