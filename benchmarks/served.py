"""`cascade serve` as a child of a benchmark: started, waited for, looked at, ended. Sends no load."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx2
import yaml

from benchmarks.errors import BenchmarkError
from engine.config import EngineConfig
from server.settings import ENV_PREFIX, OTHER_VARIABLES, Deployment

STARTING_SECONDS = 300.0
ENDING_SECONDS = 60.0


@dataclass(frozen=True)
class ServedDeployment:
    """A server that is ready."""

    process: subprocess.Popen[bytes]
    url: str
    seconds_to_ready: float

    def resident_bytes(self) -> int:
        """Memory of the server and of every process that it started. Raises BenchmarkError where psutil is missing."""
        try:
            import psutil
        except ImportError as error:
            raise BenchmarkError("Resident memory is read with psutil: pip install -e '.[test]'") from error
        server = psutil.Process(self.process.pid)
        return sum(process.memory_info().rss for process in (server, *server.children(recursive=True)))


@contextmanager
def serve(config: EngineConfig, program: Sequence[str] = ()) -> Iterator[ServedDeployment]:
    """Start `cascade serve`, or another program that takes a deployment file, and end it as an operator would.

    Raises BenchmarkError with its last words.
    """
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "stderr").open("w+b") as words:
        port = _free_port()
        deployment = Deployment.model_validate(config.model_dump() | {"server": {"port": port}})
        file = Path(folder) / "deployment.yaml"
        file.write_text(yaml.safe_dump(deployment.model_dump(mode="json")), "utf-8")
        start = time.perf_counter()
        process = subprocess.Popen([*(program or (_program(), "serve")), str(file)], stdout=words, stderr=words, env=_environment())
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_until_ready(process, url, Path(words.name))
            yield ServedDeployment(process, url, time.perf_counter() - start)
        finally:
            _end(process)


def _program() -> str:
    program = Path(sys.executable).with_name("cascade")
    if not program.exists():
        raise BenchmarkError(
            f"{program} is not there: install this project into the environment that runs the benchmark (pip install -e .)."
        )
    return str(program)


def _environment() -> dict[str, str]:
    """This process's, without the variables that would win over the deployment file."""
    return {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX) or name in OTHER_VARIABLES}


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait_until_ready(process: subprocess.Popen[bytes], url: str, words: Path) -> None:
    deadline = time.monotonic() + STARTING_SECONDS
    with httpx2.Client(trust_env=False, timeout=10) as client:
        while not _is_ready(client, url):
            if process.poll() is not None or time.monotonic() > deadline:
                last = words.read_text("utf-8", "replace").strip().splitlines()[-1:]
                raise BenchmarkError(
                    f"cascade serve did not become ready (exit code {process.poll()}): {' '.join(last) or 'it said nothing'}"
                )
            time.sleep(0.02)


def _is_ready(client: httpx2.Client, url: str) -> bool:
    try:
        return client.get(f"{url}/ready").status_code == 200
    except httpx2.TransportError:  # it does not listen yet
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(ENDING_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
