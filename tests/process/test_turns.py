"""An engine that is faster than its clients are served: everybody else has a turn all the same, and nothing is lost or out of order."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

import msgspec

from engine.incarnation import Incarnation
from engine.process import FRAMES_AT_ONCE, ProcessClient
from engine.request import SamplingParams, TokenDelta
from engine.stats import StepOutput, StepStats
from engine.wire import Report, Stepped
from tests.process.fake import FACTORY, make_config
from tests.unit.factories import make_request

NUM_STEPS = 800
STATS = StepStats(**dict.fromkeys(StepStats.__struct_fields__, 0) | {"step_seconds": 0.5, "draft_lengths": ()})  # type: ignore[arg-type]


class Tireless:
    """An incarnation that has always something to say."""

    id = "tireless"

    def __init__(self) -> None:
        self.num_steps = 0

    async def receive(self, most: int) -> list[Report]:
        if self.num_steps >= NUM_STEPS:
            await asyncio.Event().wait()
        deltas = tuple(TokenDelta(request_id=f"{i}", choice=0, token_ids=(1,)) for i in range(64))
        self.num_steps += most
        return [Stepped(incarnation=self.id, output=StepOutput(deltas=deltas, stats=STATS))] * most


async def test_an_engine_that_never_rests_lets_others_run() -> None:
    client, child, num_steps = ProcessClient(make_config()), Tireless(), 0

    def count(stats: StepStats) -> None:
        nonlocal num_steps
        num_steps += 1

    client.on_step(count)
    reading = asyncio.ensure_future(client._read(cast(Incarnation, child)))
    num_turns = 0
    while num_steps < NUM_STEPS:
        await asyncio.sleep(0)
        num_turns += 1
    reading.cancel()
    assert num_turns >= 4 * NUM_STEPS / FRAMES_AT_ONCE, "and not only once for each hand full of steps: all its streams would go first"
    assert client._longest_step == 0.5
    await client.close()


async def test_what_has_piled_up_arrives_in_order_and_in_parts() -> None:
    client = ProcessClient(make_config(), factory=FACTORY)
    await client.start()
    requests = [msgspec.structs.replace(make_request(id), sampling=SamplingParams(max_tokens=3000)) for id in ("a", "b")]

    async def answer(request: Any) -> tuple[list[int], int]:
        tokens, longest = list[int](), 0
        async for batch in client.submit(request):
            tokens += [token for delta in batch for token in delta.token_ids]
            longest = max(longest, len(batch))
        return tokens, longest

    answers = asyncio.gather(*map(answer, requests))
    for _ in range(5):
        await asyncio.sleep(0.01)
        time.sleep(0.1)  # noqa: ASYNC251  # so that frames pile up
    for tokens, longest in await answers:
        assert tokens == [i % 256 for i in range(3000)]
        assert 1 < longest <= FRAMES_AT_ONCE
    await client.close()
