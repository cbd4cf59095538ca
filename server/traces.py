"""What a request leaves behind for tracing, and nothing where nobody traces. otlp.py is what sends it, if the deployment says where to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from starlette.types import ASGIApp

if TYPE_CHECKING:
    from server.generate import Job
    from server.record import RequestRecord


class Trace(Protocol):
    """The trace of one HTTP request."""

    def note(self, job: Job, record: RequestRecord, reasons: Sequence[str]) -> None:
        """Its generation has ended; `reasons` says how, for each answer."""


class Traces(Protocol):
    """Where traces go."""

    def middleware(self, app: ASGIApp) -> ASGIApp:
        """The application, its requests traced."""

    def current(self) -> Trace:
        """That of the request which is being answered in this context."""

    async def close(self) -> None:
        """Send what was not sent yet."""


class NoTraces:
    """Nobody traces."""

    def middleware(self, app: ASGIApp) -> ASGIApp:
        return app

    def current(self) -> NoTraces:
        return self

    def note(self, job: Job, record: RequestRecord, reasons: Sequence[str]) -> None: ...

    async def close(self) -> None: ...
