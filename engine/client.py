"""How the rest of the world talks to an engine: the EngineClient protocol, and the engine in a thread of this process.

The loop of the engine never waits for a consumer: deltas go to unbounded queues, one per request, and a consumer that comes late
finds all that is waiting as one batch. An exception in the engine reaches every open stream and every later call.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Protocol

import msgspec

from engine.errors import EngineDead, EngineError, InvalidRequest
from engine.request import Request, TokenDelta
from engine.sched.admission import Admission
from engine.stats import EngineInfo, StepOutput, StepStats

_log = logging.getLogger(__name__)


class Health(msgspec.Struct, frozen=True):
    """Whether the engine lives, and whether it moves while it has work."""

    is_alive: bool
    is_ready: bool  # loaded, warmed up, and steps make progress whenever there is work
    reason: str = ""  # why not


class Stream(Protocol):
    """The deltas of one request. Leaving the context aborts what has not finished."""

    def __aiter__(self) -> Stream: ...

    async def __anext__(self) -> list[TokenDelta]:
        """All deltas that are waiting, at least one. Ends when every choice has finished. Raises EngineDead."""

    async def __aenter__(self) -> Stream: ...

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None: ...

    def abort(self, choice: int) -> None:
        """Stop one choice. No further delta of it is delivered."""


class EngineClient(Protocol):
    """One engine, wherever it runs."""

    @property
    def info(self) -> EngineInfo:
        """What is served. Raises EngineDead before `start` has returned."""

    @property
    def health(self) -> Health: ...

    async def start(self) -> None:
        """Load and warm up. Raises what loading raised (ConfigError and its kin)."""

    def submit(self, request: Request) -> Stream:
        """Queue a request. Raises ClientError (it can never be served), QueueFull or EngineDead."""

    def on_step(self, callback: Callable[[StepStats], None]) -> None:
        """Call back on the event loop after every step."""

    async def close(self) -> None:
        """End the engine; open streams raise EngineDead."""


class Steppable(Protocol):
    """What a client needs of an EngineCore."""

    @property
    def info(self) -> EngineInfo: ...

    @property
    def has_work(self) -> bool: ...

    def add(self, request: Request) -> None: ...

    def abort(self, request_id: str, choice: int) -> None: ...

    def step(self) -> StepOutput: ...


class DeltaStream:
    """A Stream fed by a client on the same event loop."""

    def __init__(self, request: Request, abort: Callable[[str, int], None]):
        self._request_id = request.id
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
            self._abort(self._request_id, choice)
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


class ThreadClient:
    """An engine in a thread of this process.

    `build` makes the core; it is called in the engine's thread, so that loading does not block the event loop.
    """

    STALL_SECONDS = 30.0  # a step may take this long, or ten times the longest one so far, before the engine counts as stuck

    def __init__(self, build: Callable[[], Steppable], max_queued: int = 256):
        self._build = build
        self._max_queued = max_queued
        self._admission: Admission | None = None
        self._core: Steppable | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._streams: dict[str, DeltaStream] = {}
        self._callbacks: list[Callable[[StepStats], None]] = []
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._error: EngineError | None = None
        self._longest_step = 0.0
        self._step_began: float | None = None

    # ------------------------------------------------------------------ the event loop's side
    @property
    def info(self) -> EngineInfo:
        return self._live_core().info

    @property
    def health(self) -> Health:
        if self._error is not None:
            return Health(False, False, str(self._error))
        if self._core is None:
            return Health(True, False, "the model is being loaded")
        began = self._step_began
        if began is not None and time.monotonic() - began > max(self.STALL_SECONDS, 10 * self._longest_step):
            return Health(True, False, f"the current step has been running for {time.monotonic() - began:.0f} s")
        return Health(True, True)

    async def start(self) -> None:
        if self._thread is not None:
            raise EngineDead("This client was started before; an engine is started once.")
        self._loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(ready,), name="cascade-engine", daemon=True)
        self._thread.start()
        await ready

    def submit(self, request: Request) -> DeltaStream:
        core = self._live_core()
        assert self._admission is not None
        if request.id in self._streams:
            raise InvalidRequest(f"Request id {request.id!r} is in use.", "id")
        self._admission.check(request, num_open=sum(len(s.open_choices) for s in self._streams.values()))
        stream = DeltaStream(request, self._abort)
        self._streams[request.id] = stream
        self._send(partial(core.add, request))
        return stream

    def on_step(self, callback: Callable[[StepStats], None]) -> None:
        self._callbacks.append(callback)

    async def close(self) -> None:
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)
        if self._error is None:
            self._fail(EngineDead("The engine was closed."))

    def _live_core(self) -> Steppable:
        if self._error is not None:
            raise self._error.with_traceback(None)
        if self._core is None:
            raise EngineDead("The engine is not started.")
        return self._core

    def _abort(self, request_id: str, choice: int) -> None:
        core = self._core
        if core is not None and self._error is None:
            self._send(partial(core.abort, request_id, choice))
        stream = self._streams.get(request_id)
        if stream is not None and not stream.open_choices:
            del self._streams[request_id]

    def _send(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _deliver(self, output: StepOutput) -> None:
        for delta in output.deltas:
            stream = self._streams.get(delta.request_id)
            if stream is None:  # aborted while the step ran
                continue
            stream.deliver(delta)
            if not stream.open_choices:
                del self._streams[delta.request_id]
        for callback in self._callbacks:
            callback(output.stats)

    def _fail(self, error: EngineError) -> None:
        self._error = error
        for stream in self._streams.values():
            stream.fail(error)
        self._streams.clear()

    # ------------------------------------------------------------------ the engine thread's side
    def _run(self, ready: asyncio.Future[None]) -> None:
        try:
            core = self._build()
        except BaseException as error:  # noqa: BLE001  # whatever loading raises belongs to the caller of start()
            self._post(partial(self._failed_to_start, ready, error))
            return
        self._post(partial(self._started, ready, core))
        try:
            while self._await_work(core):
                self._step_began = time.monotonic()
                output = core.step()
                self._longest_step = max(self._longest_step, time.monotonic() - self._step_began)
                self._step_began = None
                self._post(partial(self._deliver, output))
        except BaseException as error:  # noqa: BLE001  # it is logged, and told to everyone who waits or calls
            _log.exception("The engine stopped at an internal error")
            dead = EngineDead(f"The engine stopped at an internal error ({type(error).__name__}: {error}).")
            dead.__cause__ = error
            self._post(partial(self._fail, dead))

    def _await_work(self, core: Steppable) -> bool:
        """Wait until there is something to step for, apply commands; False when the engine is to end."""
        with self._wake:
            while not (self._closing or self._commands or core.has_work):
                self._wake.wait()
            commands, self._commands = self._commands, deque()
            if self._closing:
                return False
        for command in commands:
            command()
        return True

    def _started(self, ready: asyncio.Future[None], core: Steppable) -> None:
        self._core = core
        self._admission = Admission(core.info, self._max_queued)
        if not ready.cancelled():
            ready.set_result(None)

    def _failed_to_start(self, ready: asyncio.Future[None], error: BaseException) -> None:
        self._fail(error if isinstance(error, EngineError) else EngineDead(f"Loading failed: {error}"))
        if not ready.cancelled():
            ready.set_exception(error)

    def _post(self, call: Callable[[], None]) -> None:
        """Run `call` on the event loop; a loop that has ended needs nothing more."""
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(call)
        except RuntimeError:
            if not self._loop.is_closed():
                raise
