"""The requests that an engine is answering, as whoever asked sees them: who is let in, which delta goes to which stream, and what a lost
engine does to all of them. Every client of an engine has one OpenRequests. Lives on one event loop; knows nothing of where the engine runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from types import TracebackType

from engine.errors import EngineError, InvalidRequest
from engine.request import Request, TokenDelta
from engine.sched.admission import Admission
from engine.stats import EngineInfo

_GIVEN_UP = 32  # requests that are remembered, prompts and all; few are given up within a step


class DeltaStream:
    """A Stream fed by a client on the same event loop."""

    def __init__(self, request: Request, abort: Callable[[str, int], None]):
        self.request = request
        self._abort = abort
        self._open = {choice.index for choice in request.choices}
        self._waiting: list[TokenDelta] = []
        self._wake = asyncio.Event()
        self._error: EngineError | None = None

    @property
    def open_choices(self) -> frozenset[int]:
        return frozenset(self._open)

    def deliver(self, delta: TokenDelta) -> None:
        """Hand over a delta; those of aborted choices are dropped."""
        if delta.choice in self._open:
            self._waiting.append(delta)
            if delta.finish_reason is not None:
                self._open.discard(delta.choice)
            self._wake.set()

    def fail(self, error: EngineError) -> None:
        """End the stream with an error, behind what was already delivered."""
        self._error = error
        self._wake.set()

    def abort(self, choice: int) -> None:
        if choice in self._open:
            self._open.discard(choice)
            self._waiting = [d for d in self._waiting if d.choice != choice]
            if self._error is None:  # else the engine that ran it is lost, and another one may have a request of this id
                self._abort(self.request.id, choice)
            self._wake.set()

    def __aiter__(self) -> DeltaStream:
        return self

    async def __anext__(self) -> list[TokenDelta]:
        while not self._waiting:
            if not self._open:
                raise StopAsyncIteration
            if self._error is not None:
                raise self._error.with_traceback(None)  # it is raised many times; each would add its frames, and keep them alive
            self._wake.clear()
            await self._wake.wait()
        deltas, self._waiting = self._waiting, []
        return deltas

    async def __aenter__(self) -> DeltaStream:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for choice in self.open_choices:
            self.abort(choice)


class OpenRequests:
    """What is queued or running in one engine, oldest first. `add` gives it a request, `abort` tells it that a choice is given up."""

    def __init__(self, max_queued: int, add: Callable[[Request], None], abort: Callable[[str, int], None]):
        self._max_queued = max_queued
        self._add_to_engine = add
        self._abort_in_engine = abort
        self._admission: Admission | None = None
        self._streams: dict[str, DeltaStream] = {}
        self._given_up: dict[str, Request] = {}  # of late, the first first: a step may run them still
        self._running: tuple[str, ...] = ()  # ids of what the engine works for

    def __len__(self) -> int:
        return len(self._streams)

    def admit_to(self, info: EngineInfo) -> None:
        """Check requests against this engine from now on."""
        self._admission = Admission(info, self._max_queued)

    def open(self, request: Request) -> DeltaStream:
        """Give a request to the engine. Raises ClientError (it can never be served) or QueueFull."""
        assert self._admission is not None, "a client opens nothing before its engine is loaded"
        if request.id in self._streams:
            raise InvalidRequest(f"Request id {request.id!r} is in use.", "id")
        self._admission.check(request, num_open=sum(len(stream.open_choices) for stream in self._streams.values()))
        self._add_to_engine(request)
        stream = self._streams[request.id] = DeltaStream(request, self._abort)
        return stream

    def deliver(self, deltas: Iterable[TokenDelta]) -> list[Request]:
        """Hand deltas to their streams. Returns the requests that are complete with them."""
        complete = []
        for delta in deltas:
            stream = self._streams.get(delta.request_id)
            if stream is None:  # aborted while the step ran
                continue
            stream.deliver(delta)
            if not stream.open_choices:
                complete.append(self._streams.pop(delta.request_id).request)
        return complete

    def fail(self, error: EngineError) -> None:
        """End all streams with `error`; their requests are no longer open."""
        for stream in self._streams.values():
            stream.fail(error)
        self._streams.clear()
        self._given_up.clear()
        self._running = ()

    def note_running(self, request_ids: tuple[str, ...]) -> None:
        """The engine is about to work for these and no others."""
        self._running = request_ids
        if not request_ids:
            self._given_up.clear()

    def may_be_running(self) -> list[Request]:
        """Those that are not at their end."""
        found = (stream.request if (stream := self._streams.get(i)) else self._given_up.get(i) for i in self._running)
        return [request for request in found if request is not None]

    def _abort(self, request_id: str, choice: int) -> None:
        self._abort_in_engine(request_id, choice)
        if not (stream := self._streams[request_id]).open_choices:
            del self._streams[request_id]
            self._given_up[request_id] = stream.request
            while len(self._given_up) > _GIVEN_UP:
                del self._given_up[next(iter(self._given_up))]
