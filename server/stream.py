"""Long answers over HTTP: server-sent events, and what happens when the client leaves. Knows no OpenAI shapes but the last event."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping
from contextlib import aclosing
from types import TracebackType
from typing import Any, Protocol, TypeVar

from fastapi import Request
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.types import Receive, Scope, Send

from engine.errors import EngineError
from server import logs
from server.errors import ClientGone, body_of, entry_of

T = TypeVar("T")

DOCUMENTED: dict[int | str, dict[str, Any]] = {  # what /openapi.json says of routes that stream
    200: {
        "content": {"text/event-stream": {"schema": {"type": "string"}}},
        "description": "The answer; with `stream`, events of chunks and [DONE].",
    }
}

logger = logging.getLogger(__name__)

# Clients that split lines as Python's str.splitlines does would cut an event at these; in JSON they may be escaped.
_LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}


class Owned(Protocol):
    """What a stream leaves when it is over, however that comes about."""

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> object: ...


class EventStream(EventSourceResponse):
    """JSON texts as server-sent events, with `[DONE]` at the end and a comment whenever `keep_alive_seconds` have passed.

    An error behind the first byte is one event with OpenAI's error object. `owner` is left even if nothing was ever sent.
    """

    def __init__(self, events: AsyncGenerator[str, None], owner: Owned, headers: Mapping[str, str], keep_alive_seconds: float):
        super().__init__(_framed(events), headers=headers, ping=keep_alive_seconds, ping_message_factory=_comment, sep="\n")
        self._owner = owner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._owner.__aexit__(None, None, None)

    async def _listen_for_exit_signal_with_grace(self) -> None:
        """Never: sse-starlette would end all streams at SIGTERM, and here server/drain.py decides when they end."""
        await asyncio.Event().wait()


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client leaves. Raises ClientGone."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _framed(events: AsyncGenerator[str, None]) -> AsyncIterator[ServerSentEvent]:
    try:
        async with aclosing(events):
            async for event in events:
                yield ServerSentEvent(event.translate(_LINE_ENDS), sep="\n")
    except Exception as error:
        # Whatever it is: the status line has long been sent, so this is the last place that can tell the client. A stream that just
        # ends looks like an answer to some clients.
        if not isinstance(error, EngineError):
            logger.exception("A stream was ended by an error that nobody foresaw.")
        logs.note_error(entry_of(error).code or "invalid_request")
        yield ServerSentEvent(json.dumps(body_of(error)), sep="\n")
    yield ServerSentEvent("[DONE]", sep="\n")


def _comment() -> ServerSentEvent:
    return ServerSentEvent(comment="keep-alive", sep="\n")
