"""One run of the engine's process, as its parent holds it: the process, the pipe that ties it to us, the socket, the directory.

Starts it, carries frames, and ends it. What to do when it is lost is decided elsewhere.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
import uuid
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from tempfile import TemporaryDirectory, gettempdir

import zmq
import zmq.asyncio

from engine.errors import ConfigError
from engine.programs import command_of, environment
from engine.wire import Command, Hello, Report, decode_report, encode

STACK_SECONDS = 0.5  # for a process that hangs to write its stacks to standard error
ARRIVAL_SECONDS = 0.05  # for what a process had sent before it ended to reach us
DRAIN_SECONDS = 5.0  # for what has reached us to be dealt with, at most


class Incarnation:
    """A process and everything that it costs us. `spawn` makes one, `end` gives all of it back."""

    def __init__(self, line: _Line, process: subprocess.Popen[bytes], resources: ExitStack):
        self.id = line.incarnation
        self.num_frames = 0  # received so far
        self._is_drained = False  # whoever receives waits for more, and has dealt with all before it
        self._line = line
        self._process = process
        self._status = _status_of(process)
        self._resources = resources
        self._began = time.monotonic()

    @classmethod
    def spawn(cls, starter: Executor) -> Incarnation:
        """Start a process that will say Hello, with the priority of `starter`'s thread. Raises ConfigError where no socket can be made.

        The socket is in a directory of its own that nobody else may enter. The process ends when its standard input does: when `end`
        closes our end of that pipe, and when we are gone, however we went.
        """
        with ExitStack() as resources:
            line = _listen(uuid.uuid4().hex, resources)
            read_end, write_end = os.pipe()
            resources.callback(os.close, write_end)
            try:
                process = starter.submit(
                    subprocess.Popen, command_of("engine.child", line.endpoint, line.incarnation), stdin=read_end, env=environment()
                ).result()
            finally:
                os.close(read_end)
            return cls(line, process, resources.pop_all())

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.monotonic() - self._began

    def send(self, command: Command) -> None:
        """Queue a frame for the process. Never waits; what a process that is gone has not read is lost with it."""
        self._line.socket.send(encode(command))

    async def receive(self, most: int) -> list[Report]:
        """Wait for a frame of this incarnation. With it come those that are there already, in their order and `most` in all."""
        frames: list[Report] = []
        while not frames:
            self._is_drained = True
            raw = await self._line.socket.recv()
            self._is_drained = False
            frames += self._ours(raw)
        while len(frames) < most:
            try:
                frames += self._ours(await self._line.socket.recv(zmq.DONTWAIT))
            except zmq.Again:
                break
        return frames

    def _ours(self, raw: bytes) -> list[Report]:
        """The frame, unless it is of another incarnation."""
        frame = decode_report(raw)
        if frame.incarnation != self.id:
            return []
        if isinstance(frame, Hello):
            self._line.directory.cleanup()  # a connection needs no name, and nothing is left behind if we are killed
        self.num_frames += 1
        return [frame]

    async def exited(self) -> str:
        """Wait for the process to end by itself, and for its last frames to arrive and be dealt with: many may have piled up.

        Says how it ended, as in "ended with exit status 1".
        """
        status = await asyncio.shield(self._status)
        with suppress(TimeoutError):  # who deals with them is stuck, and the loss must be told all the same
            await asyncio.wait_for(self._drained(), DRAIN_SECONDS)
        return _how(status)

    async def _drained(self) -> None:
        """Wait until nothing has come for a moment, and all that came is dealt with."""
        num_frames = -1
        while num_frames != self.num_frames or not self._is_drained:
            num_frames = self.num_frames
            await asyncio.sleep(ARRIVAL_SECONDS)

    async def kill(self) -> None:
        """End a process that hangs; it says first where it stands, if it can."""
        self._process.send_signal(signal.SIGUSR1)  # nothing where it has ended
        await asyncio.sleep(STACK_SECONDS)
        self._process.kill()

    async def end(self, seconds: float) -> None:
        """Close the pipe, and kill a process that does not end within `seconds`. Afterwards nothing of it is left."""
        self._resources.close()
        try:
            await asyncio.wait_for(asyncio.shield(self._status), seconds)
        except TimeoutError:
            pass  # it is killed below
        finally:
            self._process.kill()  # nothing where it has ended
            await self._status


@dataclass(frozen=True)
class _Line:
    """Our end of the socket, and where the other end finds it."""

    incarnation: str
    directory: TemporaryDirectory[str]
    socket: zmq.asyncio.Socket

    @property
    def endpoint(self) -> str:
        return f"ipc://{self.directory.name}/engine"


def _listen(incarnation: str, resources: ExitStack) -> _Line:
    """A socket in a directory of mode 0700. Raises ConfigError."""
    try:
        directory = TemporaryDirectory(prefix="cascade-engine-")
        resources.callback(directory.cleanup)
        context = zmq.asyncio.Context()
        resources.callback(context.destroy, 0)
        line = _Line(incarnation, directory, context.socket(zmq.PAIR))
        line.socket.set_hwm(0)  # nobody waits for the other side; what is under way is bounded by the open requests
        line.socket.bind(line.endpoint)
    except (OSError, zmq.ZMQError) as error:
        reason = os.strerror(error.errno or 0)
        advice = "Set TMPDIR to a writable folder with a short path."
        raise ConfigError(f"The engine's socket cannot be made in {gettempdir()}: {reason}. {advice}") from error
    return line


def _status_of(process: subprocess.Popen[bytes]) -> asyncio.Future[int]:
    """Its exit status, waited for in a thread of its own: the event loop's are few, and each engine would hold one as long as it lives."""
    waiter = ThreadPoolExecutor(1, "engine-exit")
    status = asyncio.get_running_loop().run_in_executor(waiter, process.wait)
    waiter.shutdown(wait=False)  # what was handed to it is still done
    return status


def _how(status: int) -> str:
    if status >= 0:
        return f"ended with exit status {status}"
    hint = "; has the machine run out of memory?" if status == -signal.SIGKILL else ""
    return f"was killed by signal {-status} ({signal.strsignal(-status)}{hint})"
