"""How the rest of the world talks to an engine: the EngineClient protocol, and the engine in a thread of this process.

The loop of the engine never waits for a consumer: deltas go to unbounded queues, one per request, and a consumer that comes late
finds all that is waiting as one batch. An exception in the engine reaches every open stream and every later call. The engine in a
process of its own is in process.py.
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

from engine.errors import EngineDead, EngineError
from engine.request import Request, TokenDelta
from engine.stats import EngineInfo, StepOutput, StepStats
from engine.streams import DeltaStream, OpenRequests

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
        """What is served; after a restart another one. Raises EngineDead before `start` has returned and when no engine comes back."""

    @property
    def health(self) -> Health: ...

    async def start(self) -> None:
        """Load and warm up. Raises what loading raised (ConfigError and its kin)."""

    def submit(self, request: Request) -> Stream:
        """Queue a request. Raises ClientError (it can never be served), QueueFull, EngineRestarting or EngineDead."""

    def on_step(self, callback: Callable[[StepStats], None]) -> None:
        """Call back on the event loop after every step."""

    def on_loss(self, callback: Callable[[bool], None]) -> None:
        """Call back on the event loop when the engine is lost; the argument says whether it will be started again."""

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

    def watch(self, tell: Callable[[tuple[str, ...]], None]) -> None:
        """Have the ids of the requests told that a pass is about to begin for, or a grammar to be made ready, when they are others than
        before."""


class ThreadClient:
    """An engine in a thread of this process.

    `build` makes the core; it is called in the engine's thread, so that loading does not block the event loop.
    """

    STALL_SECONDS = 30.0  # a step may take this long, or ten times the longest one so far, before the engine counts as stuck

    def __init__(self, build: Callable[[], Steppable], max_queued: int = 256):
        self._build = build
        self._requests = OpenRequests(max_queued, self._add, self._abort)
        self._core: Steppable | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._step_callbacks: list[Callable[[StepStats], None]] = []
        self._loss_callbacks: list[Callable[[bool], None]] = []
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
        self._live_core()
        return self._requests.open(request)

    def on_step(self, callback: Callable[[StepStats], None]) -> None:
        self._step_callbacks.append(callback)

    def on_loss(self, callback: Callable[[bool], None]) -> None:
        self._loss_callbacks.append(callback)

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

    def _add(self, request: Request) -> None:
        self._send(partial(self._live_core().add, request))

    def _abort(self, request_id: str, choice: int) -> None:
        self._send(partial(self._live_core().abort, request_id, choice))

    def _send(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()

    def _deliver(self, output: StepOutput) -> None:
        self._requests.deliver(output.deltas)
        for callback in self._step_callbacks:
            callback(output.stats)

    def _fail(self, error: EngineError) -> None:
        self._error = error
        self._requests.fail(error)

    def _lose(self, error: EngineError) -> None:
        self._fail(error)
        for callback in self._loss_callbacks:
            callback(False)

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
            dead = EngineDead.of(error)
            dead.__cause__ = error
            self._post(partial(self._lose, dead))

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
        self._requests.admit_to(core.info)
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
