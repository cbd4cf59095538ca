"""How an engine's process ends, over a fake core: with its client, by signals, with its parent; and that nothing is left of it."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from engine.errors import EngineDead
from engine.supervision import Supervision
from tests.process.clients import back, child_of, make_client, started, tokens_of
from tests.process.processes import engines, folders
from tests.server.conftest import until
from tests.unit.factories import make_request

ROOT = Path(__file__).parents[2]


async def test_closing_fails_open_streams_and_leaves_nothing() -> None:
    client = make_client(delay=0.01)
    await client.start()
    child, stream = child_of(client), client.submit(make_request(max_tokens=10**5))
    await anext(stream)
    await client.close()
    await client.close()
    with pytest.raises(EngineDead, match="closed"):
        await tokens_of(stream)
    assert not child.is_running()
    assert not engines()
    assert not folders()


async def test_a_process_that_does_not_end_is_killed() -> None:
    client = make_client(Supervision(end_seconds=0.2))
    await client.start()
    child = child_of(client)
    child.suspend()
    await client.close()
    assert not child.is_running()


async def test_ctrl_c_is_the_parents_business_and_sigterm_ends() -> None:
    async with started(delay=0.005) as client:
        stream = client.submit(make_request(max_tokens=40))
        child_of(client).send_signal(signal.SIGINT)
        assert len(await tokens_of(stream)) == 40
        child_of(client).terminate()
        await until(lambda: not client.health.is_ready)
        await back(client)


async def test_twenty_restarts_leave_nothing_behind() -> None:
    process = psutil.Process()
    async with started(delay=0.001) as client:
        counts: list[tuple[int, int, int]] = []
        for attempt in range(20):
            stream = client.submit(make_request(prompt=(attempt,), max_tokens=10**5))
            await anext(stream)
            child_of(client).kill()
            with pytest.raises(EngineDead):
                await tokens_of(stream)
            await back(client)
            gc.collect()
            counts.append((process.num_fds(), process.num_threads(), process.memory_info().rss))
        assert len(engines()) == 1
        assert counts[-1][:2] == counts[1][:2]
        assert counts[-1][2] - counts[4][2] < 8 << 20
        assert len(asyncio.all_tasks()) <= 6
        assert not folders()


PARENT = """
import asyncio, sys
from engine.process import ProcessClient
from tests.fakes import make_info
from tests.process.fake import FACTORY, make_config
from tests.unit.factories import make_request

async def main():
    client = ProcessClient(make_config({script}), factory=FACTORY, progress=lambda text: print(text, flush=True))
    await client.start()
    stream = client.submit(make_request(max_tokens=10**5))
    await anext(stream)
    print("stepping", flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize(("script", "line"), [("loads=600", "Loading the fake"), ("delay=0.01", "stepping"), ("sticks_at=2", "stepping")])
def test_the_engine_ends_with_its_parent(script: str, line: str) -> None:
    """Killed, so that nothing of the parent runs any more: while the engine loads, between steps, and in a step that keeps the lock."""
    code = PARENT.replace("{script}", script)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        while parent.stdout.readline().strip() != line:
            pass
        time.sleep(0.2)  # the second step has begun
        (child,) = engines(parent.pid)
        parent.kill()
    _, alive = psutil.wait_procs([child], timeout=5)
    for process in alive:
        process.kill()
    assert not alive
    assert not folders()
