"""Runs a program that a model wrote, as far away from everything else as this machine allows. Judges nothing but how it ended.

Always: a session and a folder of its own, an empty environment, the standard library alone, and limits on processor time, wall time,
memory, the size of files, open files and processes. Where the system permits: no network, no view of other processes, files that cannot be
written outside the folder, and a user without rights. `Isolation` says which of these held. It is a fence, not a prison: what the user may
read the program may read, and a kernel has holes. Run it only on a machine that you can lose.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

JAIL = Path(__file__).with_name("jail.py")

Verdict = Literal["passed", "failed", "timeout"]


@dataclass(frozen=True)
class Limits:
    """What a program may use."""

    cpu_seconds: int = 10
    wall_seconds: float = 15.0
    memory_bytes: int = 512 << 20  # of address space
    file_bytes: int = 1 << 20  # of one file, what it prints included
    folder_bytes: int = 16 << 20  # of all files, where its folder can be bounded
    open_files: int = 32


class Isolation(msgspec.Struct, frozen=True):
    """What the system permitted."""

    network: bool  # it has none
    processes: bool  # it sees no others, and its own end with it
    files: bool  # it can write in its own folder alone
    user: bool  # it runs without rights


@dataclass(frozen=True)
class Outcome:
    """How a program ended."""

    verdict: Verdict
    detail: str  # the last line that it printed, or why it was ended
    isolation: Isolation


NOTHING_SAID = Isolation(False, False, False, False)


def run(program: str, limits: Limits | None = None) -> Outcome:
    """Run Python text to its end. It passed if its last line was reached: an early exit has not."""
    limits, mark = limits or Limits(), secrets.token_hex(16)
    folder = Path(tempfile.mkdtemp(prefix="cascade-sandbox-"))
    try:
        folder.chmod(0o777)  # a user without rights writes here
        with tempfile.TemporaryFile() as printed:
            status, said = _ended(f"{program}\nprint()\nprint({mark!r})\n", folder, limits, printed.fileno())
            printed.seek(max(0, printed.seek(0, os.SEEK_END) - 4096))
            lines = printed.read().decode("utf-8", "replace").strip().splitlines()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    isolation = msgspec.json.decode(said, type=Isolation) if said else NOTHING_SAID
    last = lines[-1][:200] if lines else ""
    if status is None:
        return Outcome("timeout", f"ran for {limits.wall_seconds:g} s", isolation)
    if status in (128 + signal.SIGXCPU, 128 + signal.SIGKILL):
        return Outcome("timeout", f"used {limits.cpu_seconds} s of processor time", isolation)
    if status == 0 and last == mark:
        return Outcome("passed", "", isolation)
    return Outcome("failed", f"ended early with {status}" if status == 0 or not last else last, isolation)


def _ended(program: str, folder: Path, limits: Limits, output: int) -> tuple[int | None, bytes]:
    """Exit status, None for a program that had to be killed, and what the jail said of itself."""
    python = Path(sys.executable).resolve()  # no virtual environment: its packages are not the program's
    spec = {
        "python": str(python),
        "folder": str(folder),
        "drops_rights": os.geteuid() == 0 and _is_open_to_all(python),
        "cpu_seconds": limits.cpu_seconds,
        "memory_bytes": limits.memory_bytes,
        "file_bytes": limits.file_bytes,
        "folder_bytes": limits.folder_bytes,
        "open_files": limits.open_files,
    }
    process = subprocess.Popen(
        [str(python), "-I", "-S", str(JAIL), json.dumps(spec)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=output,
        env={},
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(program.encode(), timeout=limits.wall_seconds)
        return process.returncode if process.returncode >= 0 else 128 - process.returncode, said
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]
    finally:
        _end_group(process.pid)


def _end_group(group: int) -> None:
    try:
        os.killpg(group, signal.SIGKILL)  # what the program left behind
    except (ProcessLookupError, PermissionError):
        return


def _is_open_to_all(path: Path) -> bool:
    """Whether any user may read and run the file."""
    return all(place.stat().st_mode & 0o001 for place in (path, *path.parents)) and bool(path.stat().st_mode & 0o004)
