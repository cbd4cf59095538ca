"""Clients of an engine in a process of its own, over a fake core."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psutil

from engine.client import Stream
from engine.process import ProcessClient
from engine.supervision import Supervision
from tests.process.fake import FACTORY, make_config
from tests.server.conftest import until

QUICK = Supervision(backoff_seconds=0.01, max_backoff_seconds=0.05, end_seconds=2, max_restarts=100)


def make_client(supervision: Supervision = QUICK, **script: object) -> ProcessClient:
    return ProcessClient(make_config(**script), 10, supervision=supervision, factory=FACTORY)


def loading(said: list[str], **script: object) -> ProcessClient:
    """One whose progress is written down."""
    return ProcessClient(make_config(**script), 10, said.append, QUICK, FACTORY)


@asynccontextmanager
async def started(supervision: Supervision = QUICK, **script: object) -> AsyncIterator[ProcessClient]:
    client = make_client(supervision, **script)
    await client.start()
    try:
        yield client
    finally:
        await client.close()


def child_of(client: ProcessClient) -> psutil.Process:
    assert client._child is not None
    return psutil.Process(client._child._process.pid)


async def tokens_of(stream: Stream) -> list[int]:
    return [token for batch in [batch async for batch in stream] for delta in batch for token in delta.token_ids]


async def back(client: ProcessClient) -> None:
    await until(lambda: client.health.is_ready, seconds=20)
