"""Carries out the Dockerfile's steps without a container engine: installs into a clean environment, starts as the image's user, asks.

    python deploy/rehearse.py --build-arg TORCH_INDEX=

Its absolute paths are put below one folder, and everything else is done as it is written there: RUN by a shell, COPY without what
.dockerignore leaves out, ENV, WORKDIR, USER, the health check, the entry point. Left out: the base image, whose Python is `--python` here,
and useradd, which would change this machine; the user is its number alone. It needs root to be somebody else, some GB in the
temporary folder, and minutes. What an instruction means that it does not know is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

SOURCE = Path(__file__).parents[1]
MOVED = re.compile(r"(?<![\w./])/(opt/venv|build|app|cache)\b")  # absolute paths of the image
PASSED = re.compile(r"PIP_|SSL_|REQUESTS_|LANG|https?_proxy|no_proxy", re.IGNORECASE)  # where this machine's packages come from
IGNORED = ("EXPOSE", "LABEL", "VOLUME")  # say something and do nothing here
QUESTION = {"model": "smollm2-135m-instruct", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8}


class RehearsalFailed(Exception):
    """A step did not do what the image needs."""


@dataclass(frozen=True)
class Instruction:
    word: str
    rest: str


def instructions_of(text: str) -> list[Instruction]:
    """Those of a Dockerfile, continued lines joined, comments left out."""
    lines = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    joined = re.sub(r"\\\n\s*", " ", lines)
    return [Instruction(line.split(maxsplit=1)[0].upper(), line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


@dataclass
class Rehearsal:
    """The state that the steps change. `root` is where absolute paths lie."""

    root: Path
    python: Path
    arguments: Mapping[str, str]
    environment: dict[str, str] = field(default_factory=dict)
    folder: Path = Path("/")
    user: int | None = None
    entry: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    health: list[str] = field(default_factory=list)

    def carry_out(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            say(f"{instruction.word} {instruction.rest}")
            if instruction.word not in IGNORED:
                step = getattr(self, f"_{instruction.word.lower()}", None)
                if step is None:
                    raise RehearsalFailed(f"{instruction.word} is not known here.")
                step(instruction.rest)

    def run(self, command: list[str], **more: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(self.as_user(command), cwd=self.folder, env=self.all_variables(more), check=False)

    def as_user(self, command: list[str]) -> list[str]:
        if self.user is None or self.user == os.geteuid():
            return command
        return ["setpriv", f"--reuid={self.user}", f"--regid={self.user}", "--clear-groups", *command]

    def all_variables(self, more: Mapping[str, str]) -> dict[str, str]:
        here = {name: value for name, value in os.environ.items() if PASSED.match(name)}
        return here | {"TMPDIR": str(self.root / "tmp")} | self.environment | more

    def _from(self, rest: str) -> None:
        self.environment = {"PATH": f"{self.root / 'bin'}:/usr/local/bin:/usr/bin:/bin"}
        self.folder, self.user = self.root, None

    def _arg(self, rest: str) -> None:
        name, _, value = rest.partition("=")
        self.environment[name] = self.arguments.get(name, value)

    def _env(self, rest: str) -> None:
        for name, value in re.findall(r"(\w+)=(\S*)", rest):
            known = re.sub(r"\$\{?(\w+)\}?", lambda match: self.environment.get(match[1], ""), self._moved(value))
            self.environment[name] = known

    def _workdir(self, rest: str) -> None:
        self.folder = Path(self._moved(rest))
        self.folder.mkdir(parents=True, exist_ok=True)

    def _run(self, rest: str) -> None:
        if rest.startswith("useradd"):
            say("  left out: this machine keeps its users")
        elif code := self.run(["/bin/sh", "-c", self._moved(rest)]).returncode:
            raise RehearsalFailed(f"RUN {rest} ended with {code}.")

    def _copy(self, rest: str) -> None:
        *sources, target = rest.split()
        if sources[0].startswith("--from="):  # both stages lie in one folder here
            if not Path(self._moved(target)).exists():
                raise RehearsalFailed(f"{target} was not made by the stage that {sources[0]} names.")
            return
        for source in sources:
            copy(SOURCE / source, self.folder / target / (Path(source).name if target.endswith("/") else ""))

    def _user(self, rest: str) -> None:
        self.user = int(rest.split(":")[0])

    def _healthcheck(self, rest: str) -> None:
        self.health = json.loads(rest.partition(" CMD ")[2])

    def _entrypoint(self, rest: str) -> None:
        self.entry = json.loads(rest)

    def _cmd(self, rest: str) -> None:
        self.command = json.loads(rest)

    def _moved(self, text: str) -> str:
        return MOVED.sub(lambda match: f"{self.root}{match[0]}", text)


def copy(source: Path, target: Path) -> None:
    """A file or folder, without what .dockerignore leaves out. Raises RehearsalFailed for one that it leaves out altogether."""
    name = source.relative_to(SOURCE).as_posix()
    if is_left_out(name):
        raise RehearsalFailed(f"COPY {name}: .dockerignore leaves it out.")
    if source.is_file():
        target = target / source.name if target.is_dir() else target
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        return
    for file in (file for file in sorted(source.rglob("*")) if file.is_file() and not is_left_out(file.relative_to(SOURCE).as_posix())):
        below = target / file.relative_to(source)
        below.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, below)


def is_left_out(name: str) -> bool:
    """Whether .dockerignore leaves a path out: the last pattern that fits it, or a folder above it, decides."""
    parts = name.split("/")
    above = ["/".join(parts[: length + 1]) for length in range(len(parts))]
    is_out = False
    for pattern in (line.strip() for line in (SOURCE / ".dockerignore").read_text("utf-8").splitlines() if line.strip()):
        plain = pattern.removeprefix("!")
        anywhere = plain.removeprefix("**/")
        if any(fnmatch(path, plain) or (anywhere != plain and fnmatch(path.rpartition("/")[2], anywhere)) for path in above):
            is_out = not pattern.startswith("!")
    return is_out


# ---------------------------------------------------------------------- starting
@contextlib.contextmanager
def started(rehearsal: Rehearsal, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """The image's process, by its entry point."""
    command = rehearsal.as_user([*rehearsal.entry, *rehearsal.command])
    process = subprocess.Popen(command, cwd=rehearsal.folder, env=rehearsal.all_variables({"CASCADE_PORT": str(port)}))
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def check_serving(rehearsal: Rehearsal) -> None:
    """Start, wait for the health check, ask once, stop. Raises RehearsalFailed."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    begin = time.monotonic()
    with started(rehearsal, port) as process, Memory(process.pid) as memory:
        while rehearsal.run(rehearsal.health, CASCADE_PORT=str(port)).returncode:
            if process.poll() is not None or time.monotonic() > begin + 300:
                raise RehearsalFailed("The server did not become healthy.")
            time.sleep(2)
        say(f"healthy after {time.monotonic() - begin:.0f} s; it runs as the user {Path(f'/proc/{process.pid}').stat().st_uid}")
        say(f"it answers: {ask(port)!r}")
        held = kilobytes_of(process.pid) >> 10
        say(f"it holds {held} MiB of memory, and needed {memory.peak_megabytes} MiB at most, conversion included")
        process.send_signal(signal.SIGTERM)
        if code := process.wait(60):
            raise RehearsalFailed(f"SIGTERM ended it with {code}.")


def ask(port: int) -> str:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(QUESTION).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as answer:
        text: str = json.load(answer)["choices"][0]["message"]["content"]
    if not text:
        raise RehearsalFailed("The answer is empty.")
    return text


class Memory:
    """The most that a process and all that it started have held together since this was entered, looked at ten times a second."""

    def __init__(self, process: int):
        self._process = process
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._peak = 0

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    @property
    def peak_megabytes(self) -> int:
        return self._peak >> 10

    def _look(self) -> None:
        while not self._is_over.wait(0.1):
            self._peak = max(self._peak, kilobytes_of(self._process))


def kilobytes_of(process: int) -> int:
    """The memory of a process and of its children, pages that two of them share counted in parts."""
    try:
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text("ascii")
        of_threads = [path.read_text("ascii") for path in Path(f"/proc/{process}/task").glob("*/children")]
    except OSError:  # it has just ended
        return 0
    own = re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)
    return (int(own[1]) if own else 0) + sum(kilobytes_of(int(child)) for children in of_threads for child in children.split())


def check_written(rehearsal: Rehearsal, since: float) -> None:
    """Nothing outside /cache and /tmp may have been written since: the image must run with a read-only root."""
    for part in ("opt", "app"):
        for file in (rehearsal.root / part).rglob("*"):
            if file.lstat().st_mtime > since:
                raise RehearsalFailed(f"{file} was written while the server ran.")


def megabytes(folder: Path) -> int:
    return sum(file.lstat().st_size for file in folder.rglob("*") if not file.is_dir()) >> 20


def say(text: str) -> None:
    print(f"--- {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as docker build has it")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="the base image's Python; the image's user must reach it")
    parser.add_argument("--no-start", action="store_true", help="install only")
    parser.add_argument("--keep", action="store_true", help="keep the folder")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="cascade-image-"))
    root.chmod(0o755)
    rehearsal = Rehearsal(root, options.python, dict(argument.partition("=")[::2] for argument in options.build_arg))
    try:
        (root / "bin").mkdir()
        (root / "bin" / "python").symlink_to(options.python)
        (root / "tmp").mkdir()
        (root / "tmp").chmod(0o1777)
        rehearsal.carry_out(instructions_of((SOURCE / "Dockerfile").read_text("utf-8")))
        since = time.time()
        if not options.no_start:
            check_serving(rehearsal)
            check_written(rehearsal, since)
        say(", ".join(f"/{part}: {megabytes(root / part)} MiB" for part in ("opt", "app", "cache")))
    except RehearsalFailed as error:
        say(f"FAILED: {error}")
        return 1
    finally:
        if not options.keep:
            shutil.rmtree(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
