"""The end of a server's life: take nothing new, let what runs finish, and cut what takes too long. Listens to no signal itself."""

from __future__ import annotations

import asyncio
from typing import Protocol

from server.errors import ShuttingDown


class Running(Protocol):
    """Something that takes part in the drain."""

    def cut(self, error: ShuttingDown) -> None:
        """End now; the client is told `error`."""


class Draining:
    """Whether the server is ending. `app.state.draining`; whoever handles SIGTERM calls `begin`."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._running: set[Running] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.is_draining = False

    @property
    def num_running(self) -> int:
        """Requests that are being answered."""
        return len(self._running)

    def begin(self) -> None:
        """Refuse new requests from now on, and cut what still runs after the configured time.

        Safe in a signal handler and in any thread; a second call changes nothing.
        """
        if self.is_draining:
            return
        self.is_draining = True
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._start_clock)

    async def idle(self) -> None:
        """Wait until nothing runs."""
        await self._idle.wait()

    def attach(self) -> None:
        """Use the running event loop for the clock, until `detach`."""
        self._loop = asyncio.get_running_loop()

    def detach(self) -> None:
        self._loop = None
        if self._timer is not None:
            self._timer.cancel()

    def add(self, running: Running) -> None:
        """Enter a request. Raises ShuttingDown when the server is ending."""
        if self.is_draining:
            raise ShuttingDown
        self._running.add(running)
        self._idle.clear()

    def discard(self, running: Running) -> None:
        self._running.discard(running)
        if not self._running:
            self._idle.set()

    def _start_clock(self) -> None:
        if self._loop is not None:
            self._timer = self._loop.call_later(self._seconds, self._cut)

    def _cut(self) -> None:
        for running in tuple(self._running):
            running.cut(ShuttingDown())
