"""The engine in a process of its own: an EngineClient that starts it, watches it, and starts it again when it is lost.

What was open when it was lost fails; what arrives before it is back is told to come again; a request that was being run each time is
refused. When it is lost too often it stays away. No tensors here, and no torch: whoever imports this stays light.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

from engine.client import Health
from engine.config import EngineConfig
from engine.errors import EngineDead, EngineError, EngineRestarting
from engine.incarnation import Incarnation
from engine.logs import format_in_use
from engine.request import Request, TokenDelta
from engine.stats import EngineInfo, StepOutput, StepStats
from engine.streams import DeltaStream, OpenRequests
from engine.supervision import RestartBudget, Supervision, Suspects
from engine.wire import Abort, Add, Failed, Heartbeat, Hello, Loaded, Progress, Running, Start, Stepped

_log = logging.getLogger(__name__)

FACTORY = "engine.build:build"
FRAMES_AT_ONCE = 16  # a frame that is there already is received without letting anybody else run; fewer make more, smaller deliveries
REQUESTS_AT_ONCE = 4  # so that it is a millisecond or two until it is everybody else's turn


class ProcessClient:
    """An engine in a child process.

    `progress` is told what loading is at, at the first start and at every further one. `factory` names another maker of the core as
    "module:function"; tests have one.
    """

    def __init__(
        self,
        config: EngineConfig,
        max_queued: int = 256,
        progress: Callable[[str], None] = _log.info,
        supervision: Supervision | None = None,
        factory: str = FACTORY,
    ):
        self._config = config
        self._progress = progress
        self._supervision = supervision or Supervision()
        self._factory = factory
        self._requests = OpenRequests(max_queued, self._add, self._abort)
        self._budget = RestartBudget(self._supervision)
        self._suspects = Suspects(self._supervision)
        self._step_callbacks: list[Callable[[StepStats], None]] = []
        self._loss_callbacks: list[Callable[[bool], None]] = []
        self._starter = ThreadPoolExecutor(1, "engine-starter")  # keeps the priority that its user had at the first start
        self._supervisor: asyncio.Task[None] | None = None
        self._first_load: asyncio.Future[None] | None = None
        self._child: Incarnation | None = None  # while it is loaded and not known to be lost
        self._info: EngineInfo | None = None  # of the last one that was loaded
        self._error: EngineError | None = None  # why there will not be another one
        self._why_not_ready = "the model is being loaded"
        self._longest_step = 0.0  # of this incarnation
        self._load_seconds = 0.0  # of the last one that was loaded
        self._back_at = 0.0  # when the next one is expected

    @property
    def info(self) -> EngineInfo:
        if self._error is not None:
            raise self._error.with_traceback(None)
        if self._info is None:
            raise EngineDead("The engine is not started.")
        return self._info

    @property
    def health(self) -> Health:
        if self._error is not None:
            return Health(False, False, str(self._error))
        return Health(True, True) if self._child is not None else Health(True, False, self._why_not_ready)

    async def start(self) -> None:
        if self._supervisor is not None:
            raise EngineDead("This client was started before; it restarts its engine by itself.")
        self._first_load = asyncio.get_running_loop().create_future()
        self._supervisor = asyncio.ensure_future(self._supervise())
        await self._first_load

    def submit(self, request: Request) -> DeltaStream:
        self._live_child()
        self._suspects.check(request)
        return self._requests.open(request)

    def on_step(self, callback: Callable[[StepStats], None]) -> None:
        self._step_callbacks.append(callback)

    def on_loss(self, callback: Callable[[bool], None]) -> None:
        self._loss_callbacks.append(callback)

    async def close(self) -> None:
        if self._error is None:
            self._give_up(EngineDead("The engine was closed."))
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.wait((self._supervisor,))
        self._starter.shutdown()

    def _live_child(self) -> Incarnation:
        if self._error is None and self._child is not None:
            return self._child
        _ = self.info  # raises what a client without an engine raises
        raise EngineRestarting(max(1, math.ceil(self._back_at - time.monotonic())))

    def _add(self, request: Request) -> None:
        child = self._live_child()
        child.send(Add(incarnation=child.id, request=request))

    def _abort(self, request_id: str, choice: int) -> None:
        child = self._live_child()
        child.send(Abort(incarnation=child.id, request_id=request_id, choice=choice))

    # ------------------------------------------------------------------ one incarnation after the other
    async def _supervise(self) -> None:
        try:
            delay: float | None = 0.0
            while delay is not None:
                await asyncio.sleep(delay)
                delay = await self._run()
        except EngineError as error:  # the first start failed
            self._give_up(error)
        except Exception as error:  # noqa: BLE001  # a mistake of ours; nobody is to wait for ever because of it
            _log.exception("The supervision of the engine failed")
            self._give_up(EngineDead(f"The supervision of the engine failed ({type(error).__name__}: {error})."))

    async def _run(self) -> float | None:
        """One incarnation, from its start to its loss. Returns the seconds after which another one is due, or None."""
        try:
            child = Incarnation.spawn(self._starter)
        except OSError as error:
            return self._lose(EngineDead(f"No process for the engine can be started: {error}."))
        except EngineError as error:
            return self._lose(error)
        try:
            return self._lose(await self._attend(child))
        finally:
            self._child = None
            await child.end(self._supervision.end_seconds)

    async def _attend(self, child: Incarnation) -> EngineError:
        """Carry frames until the process fails, ends or hangs. Returns what happened."""
        tasks = [asyncio.ensure_future(watch(child)) for watch in (self._read, self._watch, self._exit_of)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return next(task for task in tasks if task in done).result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(self, child: Incarnation) -> EngineError:
        """Take frames until one says that the engine failed."""
        while True:
            outputs: list[StepOutput] = []
            failure: EngineError | None = None
            for frame in await child.receive(FRAMES_AT_ONCE):
                match frame:
                    case Running(request_ids=request_ids):
                        self._requests.note_running(request_ids)
                    case Stepped(output=output):
                        outputs.append(output)
                    case Heartbeat():
                        self._requests.note_running(())
                    case Hello():
                        child.send(self._start_frame(child))
                    case Progress(text=text):
                        self._progress(text)
                    case Loaded(info=info):
                        self._serve(child, info)
                    case Failed():
                        failure = frame.error()
            await self._deliver(outputs)
            if failure is not None:
                return failure

    async def _watch(self, child: Incarnation) -> EngineError:
        """A loaded engine that is silent for too long is killed. A tick counts once, even if we ourselves were held up for longer."""
        rules = self._supervision
        tick = rules.hang_seconds / 30
        silence, num_frames = 0.0, 0
        while silence < max(rules.hang_seconds, rules.hang_steps * self._longest_step):
            await asyncio.sleep(tick)
            is_silent = child is self._child and child.num_frames == num_frames
            silence, num_frames = (silence + tick if is_silent else 0.0), child.num_frames
        await child.kill()
        return EngineDead(f"The engine hung: nothing was heard of it for {silence:.0f} s, and its process was killed.")

    async def _exit_of(self, child: Incarnation) -> EngineError:
        how = await child.exited()
        return EngineDead(f"The engine's process {how}{'' if child is self._child else ' while it loaded the model'}.")

    def _start_frame(self, child: Incarnation) -> Start:
        return Start(
            incarnation=child.id,
            config=json.dumps(self._config.model_dump(mode="json")),  # pydantic's own JSON makes null of an infinity
            factory=self._factory,
            heartbeat_seconds=self._supervision.heartbeat_seconds,
            log_level=logging.getLogger().getEffectiveLevel(),
            log_format=format_in_use(),
        )

    def _serve(self, child: Incarnation, info: EngineInfo) -> None:
        self._info, self._child = info, child
        self._longest_step, self._load_seconds = 0.0, child.seconds
        self._requests.admit_to(info)
        if self._first_load is not None and not self._first_load.done():
            self._first_load.set_result(None)
        else:
            _log.warning("The engine is back; it took %.1f s to load", child.seconds)

    async def _deliver(self, outputs: Sequence[StepOutput]) -> None:
        """Hand out what steps have made, to a few requests at a time: an engine that is faster than its clients are served must not keep
        everybody else from running."""
        for output in outputs:  # first: who reads an answer's end finds its last step counted
            self._longest_step = max(self._longest_step, output.stats.step_seconds)
            for callback in self._step_callbacks:
                callback(output.stats)
        by_request: dict[str, list[TokenDelta]] = {}
        for delta in chain.from_iterable(output.deltas for output in outputs):
            by_request.setdefault(delta.request_id, []).append(delta)
        waiting = list(by_request.values())
        for begin in range(0, len(waiting), REQUESTS_AT_ONCE):
            for request in self._requests.deliver(chain.from_iterable(waiting[begin : begin + REQUESTS_AT_ONCE])):
                self._suspects.acquit(request)
            await asyncio.sleep(0)

    def _lose(self, loss: EngineError) -> float | None:
        """Fail what is open, and decide when there will be another incarnation. Raises the loss if none was ever loaded."""
        if self._info is None:
            raise loss
        self._child = None
        running = self._requests.may_be_running()
        self._suspects.accuse(running)
        _log.error("%s Requests lost: %d, of which %d may have been running", loss, len(self._requests), len(running))
        self._requests.fail(loss)
        delay = self._budget.take()
        if delay is None:
            self._give_up(EngineDead(f"{loss} {self._enough}"))
        else:
            self._why_not_ready = f"the engine is being restarted. {loss}"
            self._back_at = time.monotonic() + delay + self._load_seconds
        for callback in self._loss_callbacks:
            callback(delay is not None)
        return delay

    @property
    def _enough(self) -> str:
        rules = self._supervision
        return f"It was restarted {rules.max_restarts} times within {rules.window_seconds:g} s and stays away; restart the server."

    def _give_up(self, error: EngineError) -> None:
        self._error = error
        self._requests.fail(error)
        if self._first_load is not None and not self._first_load.done():
            self._first_load.set_exception(error)
