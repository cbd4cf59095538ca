"""A bound for what comes in front of a request: uvicorn would wait for the rest of a head, or for a first byte, for ever, and whoever opens
connections and goes on so slowly would hold all that this process may have. Bodies have their bound in server/body.py.
"""

from __future__ import annotations

import asyncio
from typing import ClassVar

from uvicorn.protocols.http.auto import AutoHTTPProtocol


def bounded(seconds: float) -> type[asyncio.Protocol]:
    """uvicorn's protocol, on whose connections the head of a request may take so long."""
    return type("BoundedHeads", (_BoundedHeads,), {"seconds": seconds})


class _BoundedHeads(AutoHTTPProtocol):  # type: ignore[valid-type, misc]  # h11's or httptools', whichever is installed
    """Closes a connection on which nothing is being answered and no head was completed in time.

    The clock starts with the connection, and again with the first byte behind an answer; uvicorn itself closes one that stays silent there.
    The end is without an answer: nobody has asked anything yet. What a client goes on sending of a body that was refused counts as well.
    """

    seconds: ClassVar[float]
    _clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._keep_time()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._keep_time()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        super().connection_lost(exc)

    def _keep_time(self) -> None:
        is_answering = self.cycle is not None and not self.cycle.response_complete
        if is_answering:
            self._stop_clock()
        elif self._clock is None:
            self._clock = self.loop.call_later(self.seconds, self.transport.close)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None
