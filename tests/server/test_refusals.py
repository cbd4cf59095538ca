"""How soon a server of its own process says no, at 200 requests a second."""

from __future__ import annotations

import asyncio
import sys
from asyncio.subprocess import DEVNULL, PIPE
from pathlib import Path

import pytest

from benchmarks.errors import BenchmarkError
from benchmarks.refusals import Connections, Kind, Server, figures, measure

PROMISED_MS = 5.0
PATIENCE = 8  # machines that run other tests at the same time


async def test_a_refusal_comes_at_once(folder: Path) -> None:
    command = (sys.executable, "-m", "tests.server.refusing", str(folder))
    process = await asyncio.create_subprocess_exec(*command, cwd=Path(__file__).parents[2], stdout=PIPE, stderr=DEVNULL)
    try:
        assert process.stdout is not None
        server = Server("127.0.0.1", int(await process.stdout.readline()), "tiny", "key")
        everything, *kinds = await measure(server, rate=200, seconds=3)
        assert [kind.status for kind in kinds] == [400, 400, 404, 413, 401]
        assert everything.num_requests == 600
        assert everything.p50_ms < PROMISED_MS * PATIENCE
        with pytest.raises(BenchmarkError, match="answered 400 where 404"):
            await Connections(server).ask(Kind(404, server.kinds()[0].request))
    finally:
        process.terminate()
        await process.wait()


def test_figures() -> None:
    found = figures(400, [i / 1000 for i in range(101, 0, -1)])
    assert (found.status, found.num_requests, found.p50_ms, found.p99_ms, found.max_ms) == (400, 101, 51.0, 100.0, 101.0)
