"""Programs of ours that run beside us, each a module: how they are started, and that they outlive nobody."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from engine.threads import defaults

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def command_of(module: str, *arguments: str) -> tuple[str, ...]:
    """What starts a module as a program."""
    # -P: a folder of the same name in the working directory must not be taken for ours
    return (sys.executable, "-P", "-m", module, *arguments)


def environment() -> dict[str, str]:
    """Ours, with our module path."""
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    return defaults() | os.environ | {"PYTHONPATH": path}


def die_with_starter() -> None:
    """On Linux: be killed when the thread ends that started this process, whatever this process is doing. Elsewhere nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
