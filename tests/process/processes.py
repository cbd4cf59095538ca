"""Finding the engine's processes from outside."""

from __future__ import annotations

import os
import tempfile

import psutil


def engines(parent: int | None = None) -> list[psutil.Process]:
    """Those of a process, None for this one. It may have other children, such as trackers of multiprocessing."""
    return [child for child in psutil.Process(parent).children() if "engine.child" in _command_of(child)]


def _command_of(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):  # it has just ended
        return []


def folders() -> list[str]:
    """Folders of sockets that were left behind."""
    return [name for name in os.listdir(tempfile.gettempdir()) if name.startswith("cascade-engine-")]
