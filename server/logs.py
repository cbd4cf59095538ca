"""The log as far as it is about requests: one line for each when it is over, and its x-request-id in every other line, whoever writes that.

The line says what was asked and what became of it, in numbers. Prompts and answers are in it only where the deployment says so.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.types import Scope

    from server.generate import Job
    from server.record import RequestRecord

_log = logging.getLogger("server.requests")

_PROBED = re.compile(r"/(health|ready|metrics|web/.*)?")  # asked every few seconds, or with the page: no news while they work

Texts = Callable[[], Mapping[str, object]]


@dataclass
class RequestLine:
    """What the line about one HTTP request will say. Filled in by whoever knows."""

    request_id: str
    status: int | None = None  # None: nothing was ever sent
    code: str | None = None  # of the error that it was answered with, or that ended its stream
    has_failed: bool = False
    answered: Mapping[str, object] = field(default_factory=dict)
    texts: Texts | None = None

    def write(self, scope: Scope) -> None:
        """The request is over."""
        level = self._level(scope["path"])
        if not _log.isEnabledFor(level):
            return
        client = scope.get("client")
        fields = {
            "method": scope["method"],
            "path": scope["path"],
            "status": self.status,
            "code": self.code,
            "client": client[0] if client else None,
            **self.answered,
            **self._read_texts(),
            "total_ms": _milliseconds(time.monotonic() - scope["arrived_at"]),
        }
        _log.log(level, "request", extra={"fields": fields})

    def _read_texts(self) -> Mapping[str, object]:
        """Nothing where they cannot be had: the answer is finished, and its client must not pay for that."""
        try:
            return self.texts() if self.texts is not None else {}
        except Exception:  # noqa: BLE001  # whatever it is, it is logged
            _log.exception("The texts of a request cannot be logged")
            return {}

    def _level(self, path: str) -> int:
        status = self.status or 0
        if _PROBED.fullmatch(path) and (status < 400 or status == 503):  # /ready is often 503, and says so by a metric
            return logging.DEBUG
        return logging.WARNING if status >= 500 or self.has_failed else logging.INFO


_current: ContextVar[RequestLine | None] = ContextVar("cascade_request", default=None)  # set once for each request, before all else


class AboutRequests(logging.Filter):
    """Gives each record the `request_id` of the request which is being answered. For handlers, so that lines of libraries have it, too."""

    def filter(self, record: logging.LogRecord) -> bool:
        line = _current.get()
        record.request_id = line.request_id if line is not None else ""
        return True


def begin(request_id: str) -> RequestLine:
    """A request has come; whatever is logged or noted in this context from now on is about it."""
    line = RequestLine(request_id)
    _current.set(line)
    return line


def note_error(code: str) -> None:
    """The request which is being answered has failed, or was refused."""
    if (line := _current.get()) is not None:
        line.code = code


def note_answer(model: str, job: Job, record: RequestRecord, reasons: Sequence[str], texts: Texts | None) -> None:
    """The engine is done with the request; `reasons` says how, for each answer. `texts`, asked if the line is written, are
    prompts and answers."""
    line = _current.get()
    if line is None:  # nobody asks over HTTP
        return
    line.has_failed = bool({"error", "timeout"} & set(reasons))
    line.answered = {"id": job.id, "model": model, "preset": job.preset, "stream": job.is_stream, **_numbers_of(record, reasons)}
    line.texts = texts


def _numbers_of(record: RequestRecord, reasons: Sequence[str]) -> dict[str, object]:
    choices = record.choices
    num_drafted, num_accepted = (sum(getattr(choice, name) for choice in choices) for name in ("num_draft_tokens", "num_accepted_tokens"))
    return {
        "rule": record.rule,
        "alpha": record.alpha if math.isfinite(record.alpha) else None,
        "prompt_tokens": record.num_prompt_tokens,
        "cached_tokens": record.num_cached_tokens,
        "completion_tokens": record.num_completion_tokens,
        "finish_reason": "+".join(sorted(set(reasons))),
        "queue_ms": next((_milliseconds(c.queue_seconds) for c in choices if c.first_at is not None), None),
        "ttft_ms": _milliseconds(record.first_at - record.arrived_at) if record.first_at is not None else None,
        "drafted": num_drafted,
        "accepted": num_accepted,
        "acceptance_rate": round(num_accepted / num_drafted, 4) if num_drafted else None,
        "deferred": sum(choice.num_deferred_tokens for choice in choices),
        "lossy_kept": sum(choice.num_lossy_kept_tokens for choice in choices),
    }


def _milliseconds(seconds: float) -> float:
    return round(1000 * seconds, 1)
