"""ThreadClient over a scripted core: delivery, aborts, failure, closing. No tensors."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest

from engine.client import ThreadClient
from engine.errors import EngineDead, InvalidRequest, QueueFull, SourceError
from engine.request import FinishReason, Request, TokenDelta
from engine.stats import EngineInfo, StepOutput, StepStats
from tests.unit.factories import make_request
from tests.unit.test_admission import INFO


class ScriptedCore:
    """Emits 0, 1, 2, ... for every choice, one token a step."""

    def __init__(self, seconds: float = 0.0, fail_at: int | None = None):
        self.info: EngineInfo = msgspec.structs.replace(INFO, max_model_len=10**6)
        self.open: dict[tuple[str, int], int] = {}
        self.limit: dict[tuple[str, int], int] = {}
        self.aborted: list[tuple[str, int]] = []
        self.num_steps = 0
        self._seconds = seconds
        self._fail_at = fail_at

    @property
    def has_work(self) -> bool:
        return bool(self.open)

    def add(self, request: Request) -> None:
        for choice in request.choices:
            self.open[request.id, choice.index] = 0
            self.limit[request.id, choice.index] = request.sampling.max_tokens

    def abort(self, request_id: str, choice: int) -> None:
        self.aborted.append((request_id, choice))
        self.open.pop((request_id, choice), None)

    def watch(self, tell: Callable[[tuple[str, ...]], None]) -> None:
        raise AssertionError("an engine in a thread cannot be lost alone")

    def step(self) -> StepOutput:
        self.num_steps += 1
        if self.num_steps == self._fail_at:
            raise RuntimeError("boom")
        time.sleep(self._seconds)
        deltas = []
        for key, num in list(self.open.items()):
            is_last = num + 1 == self.limit[key]
            deltas.append(
                TokenDelta(request_id=key[0], choice=key[1], token_ids=(num,), finish_reason=FinishReason.LENGTH if is_last else None)
            )
            self.open[key] = num + 1
            if is_last:
                del self.open[key]
        return StepOutput(deltas=tuple(deltas), stats=msgspec.convert(_STATS, StepStats))


_STATS = dict.fromkeys(StepStats.__struct_fields__, 0) | {"draft_lengths": ()}


@asynccontextmanager
async def started(core: ScriptedCore, max_queued: int = 10) -> AsyncIterator[ThreadClient]:
    client = ThreadClient(lambda: core, max_queued)
    await client.start()
    try:
        yield client
    finally:
        await client.close()


async def test_all_that_waits_is_delivered_together_and_in_order() -> None:
    async with started(ScriptedCore()) as client:
        stream = client.submit(make_request(max_tokens=5))
        await asyncio.sleep(1)  # all five steps are over by now
        batches = [batch async for batch in stream]
    assert len(batches) == 1
    assert [d.token_ids for d in batches[0]] == [(i,) for i in range(5)]
    assert batches[0][-1].finish_reason is FinishReason.LENGTH


async def test_a_slow_step_does_not_block_the_event_loop() -> None:
    async with started(ScriptedCore(seconds=1)) as client:
        stream = client.submit(make_request(max_tokens=1))
        began = time.monotonic()
        await asyncio.sleep(0.01)
        assert time.monotonic() - began < 0.9
        assert [d.token_ids async for batch in stream for d in batch] == [(0,)]


async def test_leaving_the_stream_aborts_what_is_open() -> None:
    core = ScriptedCore(seconds=0.01)
    async with started(core) as client:
        async with client.submit(make_request(max_tokens=1000, num_choices=2)) as stream:
            await anext(stream)
            await asyncio.sleep(0.05)  # deltas of both choices are waiting now
            stream.abort(1)
            assert all(d.choice == 0 for d in await anext(stream))
        steps = core.num_steps
        await asyncio.sleep(0.1)
        assert core.num_steps <= steps + 2, "the engine rests within a step"
    assert sorted(core.aborted) == [("r", 0), ("r", 1)]


async def test_an_engine_error_reaches_open_streams_and_later_calls() -> None:
    async with started(ScriptedCore(fail_at=3)) as client:
        stream = client.submit(make_request(max_tokens=10))
        got: list[int] = []
        losses: list[bool] = []
        client.on_loss(losses.append)

        async def read() -> None:
            async for batch in stream:
                got.extend(d.token_ids[0] for d in batch)

        with pytest.raises(EngineDead, match=r"internal error \(RuntimeError\)"):
            await read()
        assert got == [0, 1], "what was made before is not lost"
        assert not client.health.is_alive
        assert losses == [False], "and nobody starts it again"
        with pytest.raises(EngineDead, match=r"internal error \(RuntimeError\)"):
            client.submit(make_request(id="next"))
        depths = []
        for _ in range(3):
            with pytest.raises(EngineDead, match=r"internal error \(RuntimeError\)") as caught:
                _ = client.info
            depths.append(len(caught.traceback))
        assert len(set(depths)) == 1, "a dead engine does not collect the frames of everybody who asked"


async def test_loading_errors_come_out_of_start() -> None:
    def build() -> ScriptedCore:
        raise SourceError("no such model")

    client = ThreadClient(build)
    assert not client.health.is_ready
    with pytest.raises(SourceError, match="no such model"):
        await client.start()
    assert not client.health.is_alive
    await client.close()


async def test_closing_fails_open_streams_and_ends_the_thread() -> None:
    client = ThreadClient(lambda: ScriptedCore(seconds=0.01))
    await client.start()
    stream = client.submit(make_request(max_tokens=100_000))
    await anext(stream)
    await client.close()
    with pytest.raises(EngineDead, match="closed"):
        _ = [batch async for batch in stream]
    assert not any(t.name == "cascade-engine" for t in threading.enumerate())


async def test_admission_is_checked_before_queueing() -> None:
    async with started(ScriptedCore(seconds=0.05), max_queued=1) as client:
        with pytest.raises(InvalidRequest):
            client.submit(make_request(prompt=(99,)))
        streams = [client.submit(make_request(id=f"r{i}", max_tokens=1)) for i in range(3)]
        with pytest.raises(QueueFull):
            client.submit(make_request(id="r3"))
        for stream in streams:
            assert [d async for batch in stream for d in batch]
        assert client.submit(make_request(id="r4", max_tokens=1)) is not None


async def test_a_step_that_takes_too_long_shows_in_health(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ThreadClient, "STALL_SECONDS", 0.05)
    core = ScriptedCore(seconds=0.4)
    async with started(core) as client:
        assert client.health.is_ready
        stream = client.submit(make_request(max_tokens=1))
        await asyncio.sleep(0.2)
        assert (client.health.is_alive, client.health.is_ready) == (True, False)
        assert "running for" in client.health.reason
        async for _ in stream:
            pass
        await asyncio.sleep(0.01)
        assert client.health.is_ready


async def test_step_stats_are_called_back_on_the_event_loop() -> None:
    seen: list[tuple[int, int]] = []
    callback: Callable[[StepStats], None] = lambda stats: seen.append((stats.num_running, threading.get_ident()))  # noqa: E731
    async with started(ScriptedCore()) as client:
        client.on_step(callback)
        async for _ in client.submit(make_request(max_tokens=3)):
            pass
    assert seen == [(0, threading.get_ident())] * 3
