"""A server over an engine in a process of its own, as clients and operators see it when that process is lost."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from engine.process import ProcessClient
from engine.supervision import Supervision
from server.app import create_app
from tests.process.fake import FACTORY, POISON, make_config
from tests.process.processes import engines, folders
from tests.server.conftest import chunks_of, events_of, listen, make_deployment, until

ROOT = Path(__file__).parents[2]


@dataclass
class Running:
    """A server on a socket, and the client of its engine."""

    http: httpx.AsyncClient
    client: ProcessClient

    def kill(self) -> None:
        assert self.client._child is not None
        psutil.Process(self.client._child._process.pid).kill()

    async def complete(self, prompt: list[int] | None = None, **body: Any) -> httpx.Response:
        return await self.http.post("/v1/completions", json={"model": "tiny", "prompt": prompt or [5, 6], "max_tokens": 4} | body)

    async def status(self, path: str) -> int:
        return (await self.http.get(path)).status_code

    async def value(self, metric: str) -> float:
        """Of a metric that is labelled by the model alone."""
        lines = (await self.http.get("/metrics")).text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"cascade_{metric}{{"))


@asynccontextmanager
async def serving(max_restarts: int = 5, backoff: float = 0.3) -> AsyncIterator[Running]:
    supervision = Supervision(backoff_seconds=backoff, max_backoff_seconds=backoff, max_restarts=max_restarts)
    config = make_config(delay=0.01)
    client = ProcessClient(config, 4, supervision=supervision, factory=FACTORY)
    async with listen(create_app(client, make_deployment())) as (_, url), httpx.AsyncClient(base_url=url, timeout=30) as http:
        await until(lambda: client.health.is_ready, seconds=20)
        yield Running(http, client)


async def test_a_crash_in_mid_stream() -> None:
    async with serving() as it:
        tasks = [asyncio.ensure_future(it.complete(max_tokens=10**5, stream=stream)) for stream in (True, False)]
        await until(lambda: len(it.client._requests) == 2)
        await asyncio.sleep(0.2)
        assert await it.value("running_sequences") == 2
        it.kill()
        events, whole = events_of(await tasks[0]), await tasks[1]
        assert len(events) > 5
        error = json.loads(events[-2])["error"]
        assert (error["code"], events[-1]) == ("engine_dead", "[DONE]")
        assert "killed by signal 9" in error["message"]
        assert (whole.status_code, whole.headers["x-should-retry"]) == (500, "false")
        assert (await it.status("/health"), await it.status("/ready")) == (200, 503)
        assert "being restarted" in (await it.http.get("/ready")).json()["reason"]
        assert await it.status("/v1/models") == 200
        meanwhile = await it.complete()
        assert (meanwhile.status_code, meanwhile.json()["error"]["code"]) == (503, "engine_restarting")
        assert int(meanwhile.headers["retry-after"]) >= 1
        assert "x-should-retry" not in meanwhile.headers
        assert [await it.value(name) for name in ("running_sequences", "kv_used_blocks", "engine_restarts_total")] == [0, 0, 1]
        await until(lambda: it.client.health.is_ready, seconds=20)
        assert await it.status("/ready") == 200
        assert chunks_of(await it.complete(stream=True))[-1]["choices"][0]["finish_reason"] == "length"


async def test_a_client_that_leaves_frees_its_sequences() -> None:
    async with serving() as it:
        running: list[int] = []
        it.client.on_step(lambda stats: running.append(stats.num_running))
        body = {"model": "tiny", "prompt": [5], "max_tokens": 10**5, "stream": True, "n": 2}
        async with it.http.stream("POST", "/v1/completions", json=body) as response:
            await anext(response.aiter_lines())
        await until(lambda: not len(it.client._requests))
        await it.complete()
        assert (max(running), running[-1]) == (2, 0)


async def test_a_request_that_crashes_the_engine_is_refused_at_the_fourth_try() -> None:
    async with serving(backoff=0.01) as it:
        for _ in range(3):
            assert (await it.complete([POISON])).status_code == 500
            await until(lambda: it.client.health.is_ready, seconds=20)
        refused = await it.complete([POISON])
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "request_crashes_engine")
        assert (await it.complete()).status_code == 200


async def test_when_the_engine_stays_away_health_says_so() -> None:
    async with serving(max_restarts=1, backoff=0.01) as it:
        it.kill()
        await until(lambda: not it.client.health.is_ready)
        await until(lambda: it.client.health.is_ready, seconds=20)
        it.kill()
        await until(lambda: not it.client.health.is_alive)
        assert (await it.status("/health"), await it.status("/ready")) == (503, 503)
        response = await it.complete()
        assert (response.status_code, response.json()["error"]["code"]) == (500, "engine_dead")
        assert response.headers["x-should-retry"] == "false"
        assert [await it.value(name) for name in ("engine_restarts_total", "kv_blocks")] == [1, 0]


# ---------------------------------------------------------------------- the program
PROGRAM = """
import sys
import server.launch
from engine.process import ProcessClient
from server.listener import bind
from server.settings import Deployment
from tests.process.fake import FACTORY, make_config

server.launch._engine = lambda deployment, say, factory: ProcessClient(make_config(SCRIPT), progress=say, factory=FACTORY)
server_settings = {"port": 0, "drain_seconds": 20}
deployment = Deployment.model_validate({"model": {"name": "tiny", "target": {"source": "x"}}, "server": server_settings})
server.launch.run(deployment, bind(deployment.server), lambda text: print(text, flush=True))
print("heavy:", [name for name in ("torch", "transformers") if name in sys.modules])
"""


@dataclass
class Program:
    """The server as a program, and the process of its engine."""

    process: subprocess.Popen[str]
    engine: psutil.Process
    line: str

    def rest(self) -> list[str]:
        """What it says until it ends; its engine must have ended, too."""
        said, _ = self.process.communicate(timeout=20)
        _, alive = psutil.wait_procs([self.engine], timeout=5)
        for process in alive:
            process.kill()
        assert not alive
        return said.splitlines()


@contextmanager
def program(until_line: str, **script: object) -> Iterator[Program]:
    arguments = ", ".join(f"{key}={value!r}" for key, value in script.items())
    command = [sys.executable, "-c", PROGRAM.replace("SCRIPT", arguments)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            while not (line := process.stdout.readline()).startswith(until_line):
                assert line, "it ended too soon"
            (engine,) = engines(process.pid)
            yield Program(process, engine, line)
        finally:
            process.kill()


def stream_from(it: Program, num_tokens: int) -> Iterator[str]:
    """Lines of a stream that has begun."""
    url = re.findall(r"http://[^ ]+", it.line)[0]
    body = {"model": "tiny", "prompt": [5], "max_tokens": num_tokens, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=20) as response:
        yield from response.iter_lines()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of threads")
async def test_the_thread_that_serves_gives_way_and_no_engine_inherits_that() -> None:
    with program("Ready on", delay=0.01) as it:
        assert (os.getpriority(os.PRIO_PROCESS, it.process.pid), it.engine.nice()) == (19, 0)
        it.engine.kill()
        await until(lambda: engines(it.process.pid) not in ([it.engine], []))
        (engine,) = engines(it.process.pid)
        assert (engine.nice(), os.sched_getscheduler(engine.pid)) == (0, os.SCHED_OTHER)
        await until(lambda: not folders(), seconds=20)  # a server that is killed before its engine has connected leaves one behind


def test_sigterm_lets_what_runs_finish_and_ends_the_engine() -> None:
    with program("Ready on", delay=0.01) as it:
        lines = stream_from(it, 50)
        next(lines)
        it.process.send_signal(signal.SIGTERM)
        assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert it.rest()[-2:] == ["Stopped", "heavy: []"]
        assert it.process.returncode == 0


def test_ctrl_c_leaves_the_engine_to_its_parent() -> None:
    with program("Ready on", delay=0.01) as it:
        lines = stream_from(it, 50)
        next(lines)
        it.engine.send_signal(signal.SIGINT)  # the terminal sends it to both
        it.process.send_signal(signal.SIGINT)
        assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert it.rest()[-2:] == ["Stopped", "heavy: []"]


def test_a_second_signal_ends_the_engine_at_once() -> None:
    with program("Ready on", delay=0.01) as it:
        lines = stream_from(it, 10**5)
        next(lines)
        it.process.send_signal(signal.SIGTERM)
        assert it.process.stdout is not None
        assert it.process.stdout.readline().startswith("SIGTERM: finishing 1 request")
        it.process.send_signal(signal.SIGTERM)
        with pytest.raises(httpx.HTTPError):
            list(lines)
        assert it.rest() == ["Second signal (SIGTERM): stopped at once"]
        assert it.process.returncode == 128 + signal.SIGTERM


def test_a_signal_while_loading_ends_both() -> None:
    with program("Loading the fake", loads=60) as it:
        it.process.send_signal(signal.SIGTERM)
        assert it.rest() == ["Stopped while loading"]
        assert it.process.returncode == 0
    assert not folders()
