"""The real engine in a process of its own: the same tokens as in a thread, and its refusals as the program says them."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import msgspec

from engine.client import EngineClient, ThreadClient
from engine.errors import EngineDead
from engine.process import ProcessClient
from engine.request import Request, SamplingParams
from engine.supervision import Supervision
from tests.process.fake import make_config
from tests.process.processes import engines
from tests.process.real import FACTORY
from tests.server.conftest import until
from tests.tiny import Setup, make_core

ROOT = Path(__file__).parents[2]
SAMPLINGS = (SamplingParams(max_tokens=20, temperature=0), SamplingParams(max_tokens=20, temperature=1, seed=7, is_seeded=True))
REQUESTS = [
    Request(id=f"{i}-{j}", prompt_ids=tuple(range(i, i + 5)), sampling=sampling) for i in range(5) for j, sampling in enumerate(SAMPLINGS)
]


async def answers_of(client: EngineClient) -> list[list[int]]:
    async def answer(request: Request) -> list[int]:
        return [token async for batch in client.submit(request) for delta in batch for token in delta.token_ids]

    return await asyncio.gather(*map(answer, REQUESTS))


async def test_the_same_tokens_as_in_a_thread_and_after_a_restart() -> None:
    in_thread = ThreadClient(lambda: make_core(Setup()))
    in_process = ProcessClient(make_config(), supervision=Supervision(backoff_seconds=0.01), factory=FACTORY)
    try:
        await in_thread.start()
        await in_process.start()
        expected = await answers_of(in_thread)
        assert await answers_of(in_process) == expected
        assert msgspec.structs.replace(in_process.info, incarnation="") == msgspec.structs.replace(in_thread.info, incarnation="")
        long = in_process.submit(msgspec.structs.replace(REQUESTS[0], sampling=SamplingParams(max_tokens=59)))
        (child,) = engines()
        child.kill()
        try:
            async for _ in long:
                pass
        except EngineDead:  # unless it was quicker
            pass
        await until(lambda: not in_process.health.is_ready)
        await until(lambda: in_process.health.is_ready, seconds=60)
        assert await answers_of(in_process) == expected
    finally:
        await in_thread.close()
        await in_process.close()


def test_what_cannot_be_loaded_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(f"model: {{name: a, target: {{source: {tmp_path}}}}}\nserver: {{port: 0}}\n")
    command = [sys.executable, "-c", "from server.cli import main; main()", "serve", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[1:] == [f"Error: {tmp_path} is not a model in the transformers format: {tmp_path} has no config.json."]
