"""Writes deploy/constraints.txt: what the project needs, and what that needs, in the versions that are installed beside this Python.

    .venv/bin/python deploy/constraints.py

To be run where the tests have passed. What only a torch with CUDA brings along is left out: torch itself pins that.
"""

from __future__ import annotations

import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
HEAD = """\
# The versions in the image: those that were tested. deploy/constraints.py writes this file.
"""
OF_CUDA = ("cuda-", "nvidia-", "triton")


def dependencies() -> list[Requirement]:
    """Those that pyproject.toml names."""
    return [Requirement(text) for text in tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]]


def installed() -> dict[str, str]:
    """Name to version of everything that serving needs. Raises PackageNotFoundError."""
    found: dict[str, str] = {}
    seen: set[str] = set()
    todo = dependencies()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if str(requirement) in seen or name.startswith(OF_CUDA):
            continue
        seen.add(str(requirement))
        found[name] = metadata.version(name).partition("+")[0]  # torch 2.13.0 is 2.13.0+cpu, too
        todo += _needed(requirement)
    return found


def _needed(requirement: Requirement) -> list[Requirement]:
    parts = [Requirement(text) for text in metadata.requires(requirement.name) or []]
    extras = requirement.extras or {""}
    return [part for part in parts if part.marker is None or any(part.marker.evaluate({"extra": extra}) for extra in extras)]


def main() -> None:
    lines = [f"{name}=={version}\n" for name, version in sorted(installed().items())]
    (ROOT / "deploy" / "constraints.txt").write_text(HEAD + "".join(lines), "utf-8")


if __name__ == "__main__":
    main()
