"""Where and how a result was measured: versions, machine, date, command. A figure without these means nothing."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import msgspec

PACKAGES = ("cascade-serve", "torch", "transformers", "tokenizers", "httpx2")


class Environment(msgspec.Struct, frozen=True):
    """Of the machine that runs the benchmark."""

    date: str
    command: str
    machine: str
    num_cpus: int  # that this process may use
    versions: dict[str, str]


def environment(program: str) -> Environment:
    """`program` is what was typed in front of the arguments."""
    return Environment(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join([*program.split(), *_arguments(program)]),
        machine=f"{_processor()}, {platform.system()}",
        num_cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        versions={"python": platform.python_version()} | {name: found for name in PACKAGES if (found := _version(name)) is not None},
    )


def _arguments(program: str) -> list[str]:
    """Keys are left out: a result is made to be shown. So is --output: where a result was written is no part of it."""
    arguments = list(sys.argv[1:])
    if program == "cascade bench" and arguments[:1] == ["bench"]:
        del arguments[0]
    shown: list[str] = []
    for argument, before in zip(arguments, ["", *arguments], strict=False):
        if argument.startswith("--output") or before == "--output":
            continue
        if argument.startswith("--api-key="):
            argument = "--api-key=(hidden)"
        shown.append("(hidden)" if before == "--api-key" else argument)
    return shown


def _processor() -> str:
    """The processor's name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
