"""Converted copies of .gguf files, in float32 and the transformers format, so that only the first start pays for the conversion.

A copy is a folder written beside its final place, synced, and moved there by one rename; its manifest names the source and the size and
digest of every file. Every start verifies all of it: what is damaged, half-written or of an older format is said once and built again.
Digests are SHA-256, which modern CPUs compute at 1.8 GB/s a core: 0.3 s for the embedded model. They find damage, not malice.
Processes that need the same copy at the same time take turns on a lock file; a copy in its place is never written to.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import msgspec

from engine.errors import SourceError

logger = logging.getLogger(__name__)

FORMAT = 2  # raise it when a conversion of the same file would come out differently
MANIFEST = "manifest.json"

Converter = Callable[[Path, Path], None]  # (the .gguf file, the folder to fill)


class FileMark(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file must be."""

    size: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a copy was made from and what is in it."""

    format: int
    source: FileMark
    files: dict[str, FileMark]


def converted(gguf: Path, cache_dir: Path, progress: Callable[[str], None], convert: Converter | None = None) -> Path:
    """A verified copy of `gguf` in `cache_dir`, made first if there is none. Raises SourceError."""
    try:
        source = _mark(gguf)
        folder = cache_dir / f"{gguf.stem}-{source.sha256[:16]}"
        if _fault(folder, source) is None:  # a good copy needs no lock, so a read-only cache will do
            return folder
        cache_dir.mkdir(parents=True, exist_ok=True)
        with _locked(cache_dir / f".{folder.name}.lock"):
            fault = _fault(folder, source)
            if fault is not None:
                if folder.exists():
                    logger.warning("The converted copy %s is built again: %s", folder, fault)
                progress(f"Converting {gguf.name} (once; the copy is kept in {cache_dir})")
                _build(gguf, source, folder, convert or convert_gguf)
    except OSError as error:
        raise SourceError(f"{gguf}: no converted copy can be kept in {cache_dir} ({error}). Set CASCADE_CACHE_DIR.") from error
    return folder


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Fill `folder` with the model of `gguf` in a process of its own, which ends when this one does.

    Raises SourceError when the file is not readable.
    """
    command = [sys.executable, "-m", "engine.model.convert", str(gguf), str(folder)]
    with _pipe() as (child_end, _):  # nothing is written to it; that it ends tells the child
        done = subprocess.run(command, check=False, stdin=child_end, capture_output=True, text=True)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"]
        raise SourceError(f"{gguf} cannot be read as a GGUF model that is served ({reason[0]}).")


def _build(gguf: Path, source: FileMark, folder: Path, convert: Converter) -> None:
    """Convert beside `folder`, then move into place. The caller holds the lock, so other temporary folders belong to the dead."""
    prefix = f".{folder.name}.tmp-"
    for leftover in (*folder.parent.glob(f"{prefix}*"), folder):
        if leftover.exists():
            shutil.rmtree(leftover)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        convert(gguf, temporary)
        manifest = Manifest(FORMAT, source, _marks(temporary))
        (temporary / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
        for file in temporary.iterdir():
            _sync(file)
        _sync(temporary)
        temporary.rename(folder)
        _sync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _fault(folder: Path, source: FileMark) -> str | None:
    """Why the copy cannot be used; None when every byte is as it was written."""
    if not folder.is_dir():
        return "it does not exist"
    try:
        manifest = msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except msgspec.DecodeError as error:
        return f"its {MANIFEST} is damaged ({error})"
    if manifest.format != FORMAT:
        return f"it has format {manifest.format}, this version writes {FORMAT}"
    if manifest.source != source:
        return "it was made from another file"
    return _difference(folder, manifest.files)


def _difference(folder: Path, expected: dict[str, FileMark]) -> str | None:
    """The first file that is not as expected. Sizes are compared before anything is read."""
    sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.name != MANIFEST}
    for name in sorted(sizes.keys() ^ expected.keys()):
        return f"{name} is missing" if name in expected else f"{name} does not belong to it"
    for name, mark in expected.items():
        if sizes[name] != mark.size:
            return f"{name} has {sizes[name]} bytes instead of {mark.size}"
    for name, mark in _marks(folder).items():
        if mark != expected[name]:
            return f"{name} has another digest"
    return None


def _marks(folder: Path) -> dict[str, FileMark]:
    files = sorted(file for file in folder.iterdir() if file.name != MANIFEST)
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter lock; shards are read side by side
        return dict(zip((file.name for file in files), pool.map(_mark, files), strict=True))


def _mark(path: Path) -> FileMark:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileMark(os.fstat(file.fileno()).st_size, digest)


def _sync(path: Path) -> None:
    """Have a file or folder on disk before anything says that it is there."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _pipe() -> Iterator[tuple[int, int]]:
    """The two ends of a pipe, to read and to write; no child inherits the second."""
    ends = os.pipe()
    try:
        yield ends
    finally:
        for end in ends:
            os.close(end)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the kernel frees it when its holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
