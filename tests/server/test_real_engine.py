"""The app over the real engine with tiny models: a soak, disconnects, and random input down to the last layer."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from engine.client import ThreadClient
from engine.config import HeuristicLengthConfig
from engine.core import EngineCore
from server.app import create_app
from tests.reference import NaiveModel, softmax
from tests.server.conftest import listen, make_deployment, until
from tests.tiny import Setup, make_core, target_model

NUM_REQUESTS, NUM_AT_ONCE = 500, 40


@dataclass
class Running:
    """A server over a real engine, and a look at its inside."""

    http: httpx.AsyncClient
    client: ThreadClient
    core: EngineCore

    def is_at_rest(self) -> bool:
        return not self.core.has_work and not self.client._requests and not self.client._commands


@asynccontextmanager
async def running(folder: Path, drafter: str, max_queued: int = 20) -> AsyncIterator[Running]:
    setup = Setup(
        drafter=drafter,
        policy=HeuristicLengthConfig(start=3, max=5),
        num_blocks=40,
        max_drafter_tokens=12,
        vocab=300,
        path=folder,
        end_token_ids=(2,),
    )
    core = make_core(setup)
    client = ThreadClient(lambda: core, max_queued)
    async with (
        listen(create_app(client, make_deployment(max_queued_requests=max_queued))) as (_, url),
        httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=None)) as http,
    ):
        yield Running(http, client, core)


def random_body(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A request of random length and parameters; about one in ten is refused."""
    words = " ".join(rng.choice(["the", "quick", "fox", "hello", "🙂", "<|im_end|>", "one"]) for _ in range(rng.randint(1, 6)))
    body: dict[str, Any] = {
        "model": rng.choice(["tiny", "tiny:off", "tiny:short", "org/tiny"]),
        "max_tokens": rng.choice([1, 2, 5, 9, 14, 14, 500]) if rng.random() < 0.9 else -1,
        "temperature": rng.choice([0, 0.7, 1, 1.5]),
        "top_p": rng.choice([1, 0.9, 0.5]),
        "top_k": rng.choice([0, 5, 40]),
        "min_p": rng.choice([0, 0.1]),
        "n": rng.choice([1, 1, 1, 2, 3]),
        "stream": rng.random() < 0.6,
        "stop": rng.choice([None, "e", ["th", "zz"], ["a", "b", "c", "d"]]),
    }
    if rng.random() < 0.5:
        body["seed"] = rng.randint(-(2**63), 2**63)
    if rng.random() < 0.3:
        body["speculation"] = {"enabled": rng.random() < 0.5, "max_draft": rng.choice([None, 0, 1, 3])}
    if rng.random() < 0.4:
        return "/v1/completions", body | {"prompt": rng.choice([words, [words, "x"], [5, 6, 7], [[8], [9, 10]]])}
    return "/v1/chat/completions", body | {"messages": [{"role": "user", "content": words[:12]}]}


async def one_request(running: Running, seed: int) -> str:
    """Send one, perhaps leave it half way. Says what became of it."""
    rng = random.Random(seed)
    path, body = random_body(rng)
    if rng.random() < 0.15:  # leaves before the answer, also where it is no stream
        try:
            async with asyncio.timeout(rng.random() * 0.05):
                await running.http.post(path, json=body)
        except TimeoutError:
            return "left"
        return "done"
    async with running.http.stream("POST", path, json=body) as response:
        assert response.status_code in (200, 400, 503), await response.aread()
        if response.status_code != 200:
            return str(response.status_code)
        leaves_after = rng.randint(0, 6) if rng.random() < 0.3 else None
        lines = [line async for line in _lines(response, leaves_after)]
    if leaves_after is None and body["stream"]:
        _check_stream(lines)
    return "left" if leaves_after is not None else "done"


async def _lines(response: httpx.Response, leaves_after: int | None) -> AsyncIterator[str]:
    count = 0
    async for line in response.aiter_lines():
        if leaves_after is not None and count >= leaves_after:
            return
        count += 1
        yield line


def _check_stream(lines: list[str]) -> None:
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    reasons = Counter(c["index"] for event in events[:-1] for c in json.loads(event)["choices"] if c["finish_reason"] is not None)
    assert reasons
    assert set(reasons.values()) == {1}, "exactly one finish reason a choice"


@pytest.mark.parametrize("drafter", ["model", "ngram"])
async def test_nothing_is_left_after_500_requests(folder: Path, drafter: str) -> None:
    """No block, no sequence, no task, no file handle; a fifth of the clients leave half way, some are refused, some find the queue full."""
    process = psutil.Process()
    async with running(folder, drafter) as it:
        await one_request(it, 0)  # what is opened once and stays is open now
        await until(it.is_at_rest)
        await it.http.get("/metrics")
        before = len(asyncio.all_tasks()), process.num_threads()
        gate, results, refused = asyncio.Semaphore(NUM_AT_ONCE), Counter[str](), set[int]()

        async def gated(seed: int) -> None:
            async with gate:
                while (result := await one_request(it, seed)) == "503":
                    refused.add(seed)
                    await asyncio.sleep(0.05)
                results[result] += 1

        async with asyncio.TaskGroup() as group:
            for seed in range(1, NUM_REQUESTS + 1):
                group.create_task(gated(seed))
        await until(it.is_at_rest, seconds=30)
        it.core.check()
        assert it.core._parts.scheduler.pool.num_used == 0
        assert not it.core._parts.scheduler.running
        assert not getattr(it.core._parts.drafter, "_indexes", {})
        assert it.client.health.is_ready
        assert sum(results.values()) == NUM_REQUESTS
        assert results["done"] > 150, results
        assert results["left"] > 50, results
        assert results["400"] > 10, results
        assert refused, "the queue was never full"
        await it.http.aclose()
        await until(lambda: len(asyncio.all_tasks()) <= before[0], seconds=10)
        assert process.num_threads() <= before[1] + 6, [t.name for t in threading.enumerate()]  # the pool for long texts
    gc.collect()
    assert not [c for c in process.net_connections() if c.status == "ESTABLISHED"]


async def test_files_are_closed_when_the_server_has_ended(folder: Path) -> None:
    process, counts = psutil.Process(), []
    for _ in range(3):
        async with running(folder, "ngram") as it:
            for seed in range(20):
                await one_request(it, seed)
        gc.collect()
        counts.append(process.num_fds())
    assert counts[2] <= counts[0]


async def test_a_client_that_leaves_frees_its_sequence_within_a_step(folder: Path) -> None:
    async with running(folder, "model") as it:
        body = {"model": "tiny", "prompt": [5, 6, 7], "max_tokens": 50, "temperature": 1, "seed": 1, "stream": True}
        steps: list[int] = []
        it.client.on_step(lambda stats: steps.append(stats.num_running))
        async with it.http.stream("POST", "/v1/completions", json=body) as response:
            await anext(response.aiter_lines())
        await until(it.is_at_rest)
        assert steps[-1] in (0, 1)
        assert it.core._parts.scheduler.pool.num_used == 0


async def test_the_same_seed_gives_the_same_text_under_load_and_alone(folder: Path) -> None:
    async with running(folder, "model") as it:
        body = {"model": "tiny", "prompt": [5, 6, 7, 8], "max_tokens": 20, "seed": 11}

        async def text(**more: Any) -> list[str]:
            answer = (await it.http.post("/v1/completions", json=body | more)).json()
            return [choice["text"] for choice in answer["choices"]]

        alone = await text()
        neighbours = [text(seed=i, prompt=[i, i]) for i in range(6)]
        together = await asyncio.gather(text(), *neighbours, text(n=2), text(speculation={"max_draft": 1}))
        assert together[0] == alone
        assert together[-2][0] == alone[0], "choice 0 of two is choice 0 alone"
        assert together[-1] == alone
        assert together[-2][1] != alone[0]


async def test_metrics_agree_with_what_was_answered(folder: Path) -> None:
    async with running(folder, "model") as it:
        body = {"model": "tiny", "prompt": [5, 6, 7, 8, 9], "max_tokens": 24, "temperature": 0}
        answer = (await it.http.post("/v1/completions", json=body)).json()
        spec, cascade = answer["metrics"]["speculative_decoding"], answer["metrics"]["cascade"]
        text = (await it.http.get("/metrics")).text
        samples = {line.split("{")[0]: float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if "{" in line and "bucket" not in line}
        tokens = answer["usage"]["completion_tokens"]
        assert samples["cascade_generation_tokens_total"] == tokens
        assert samples["cascade_spec_decode_draft_tokens_total"] == spec["num_draft_tokens"] > 0
        assert samples["cascade_spec_decode_accepted_tokens_total"] == spec["num_accepted_draft_tokens"]
        assert sum(spec["acceptance_histogram"]) == spec["num_spec_steps"] <= cascade["target_calls"]
        assert cascade["drafter_calls"] > 0
        assert tokens == spec["num_accepted_draft_tokens"] + cascade["target_calls"], "every pass of the target adds one token of its own"


async def test_likelihoods_of_prompts_are_the_models_own(folder: Path) -> None:
    """As lm-evaluation-harness asks for them, many at once: the naive loop's, to the last digit that JSON carries."""
    rng, naive = random.Random(8), NaiveModel(target_model(vocab=300))
    prompts = [[rng.randrange(3, 300) for _ in range(rng.randint(2, 20))] for _ in range(12)]
    fields = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    async with running(folder, "model") as it:
        bodies = [{"model": "tiny", "prompt": prompts[i : i + 3], **fields} for i in range(0, len(prompts), 3)]
        responses = await asyncio.gather(*(it.http.post("/v1/completions", json=body) for body in bodies))
        choices = [choice for response in responses for choice in response.json()["choices"]]
        for prompt, choice in zip(prompts, choices, strict=True):
            found, tops = choice["logprobs"]["token_logprobs"], choice["logprobs"]["top_logprobs"]
            assert len(found) == len(prompt) + 1
            assert (found[0], tops[0]) == (None, None)
            for i in range(1, len(prompt)):
                row = [math.log(x) for x in softmax(naive.logits(prompt[:i]))]
                assert found[i] == pytest.approx(row[prompt[i]], abs=1e-9)
                assert max(tops[i].values()) == pytest.approx(max(row), abs=1e-9)
        await until(it.is_at_rest)
