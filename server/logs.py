"""Which request a line of the log is about: the x-request-id of whatever runs stands in every line, whoever writes it."""

from __future__ import annotations

import logging
from contextvars import ContextVar

FORMAT = "%(levelname)s %(name)s: %(about)s%(message)s"

request_id: ContextVar[str] = ContextVar("request_id", default="")  # set once for each HTTP request, before anything else happens


class AboutRequests(logging.Filter):
    """Gives each record `about`: the request's id in brackets, or nothing. For handlers, so that lines of libraries have it, too."""

    def filter(self, record: logging.LogRecord) -> bool:
        current = request_id.get()
        record.about = f"[{current}] " if current else ""
        return True
