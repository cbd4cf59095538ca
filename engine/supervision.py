"""What is decided when an engine's process is lost: whether it is started again, when, and which requests are under suspicion.

Plain bookkeeping. It starts and kills nothing.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from engine.errors import CrashingRequest
from engine.request import Request

Clock = Callable[[], float]


@dataclass(frozen=True)
class Supervision:
    """How an engine's process is watched. Times are seconds."""

    heartbeat_seconds: float = 1.0  # an idle engine is heard this often
    hang_seconds: float = 30.0  # it hangs when nothing was heard for so long, unless its longest step says otherwise
    hang_steps: float = 10.0  # nor is it given up before so many times its longest step
    end_seconds: float = 5.0  # from the wish that it end to the kill
    backoff_seconds: float = 1.0  # before the first restart; each further one within the window waits twice as long
    max_backoff_seconds: float = 30.0
    max_restarts: int = 5  # within the window
    window_seconds: float = 600.0
    max_losses: int = 3  # a request that was being run at so many losses is refused
    suspicion_seconds: float = 3600.0  # without a further loss it is forgotten
    max_suspects: int = 1024


class RestartBudget:
    """How soon the engine may be started again, and how often."""

    def __init__(self, supervision: Supervision, clock: Clock = time.monotonic):
        self._supervision = supervision
        self._clock = clock
        self._taken: deque[float] = deque()

    def take(self) -> float | None:
        """Seconds to wait before one more restart; None when there have been enough of late."""
        rules, now = self._supervision, self._clock()
        while self._taken and now - self._taken[0] > rules.window_seconds:
            self._taken.popleft()
        if len(self._taken) >= rules.max_restarts:
            return None
        delay = min(rules.backoff_seconds * 2 ** len(self._taken), rules.max_backoff_seconds)
        self._taken.append(now)
        return float(delay)


@dataclass(frozen=True, slots=True)
class _Suspicion:
    num_losses: int
    since: float  # the last loss


class Suspects:
    """Requests that were being run when the engine was lost. Equal requests are one, whatever ids their clients' retries have."""

    def __init__(self, supervision: Supervision, clock: Clock = time.monotonic):
        self._supervision = supervision
        self._clock = clock
        self._found: dict[bytes, _Suspicion] = {}  # the longest unsuspected first

    def accuse(self, requests: Iterable[Request]) -> None:
        """The engine was lost while it may have been running these."""
        now = self._clock()
        for key in {_identity(request) for request in requests}:
            before = self._found.pop(key, None)
            is_old = before is None or now - before.since > self._supervision.suspicion_seconds
            self._found[key] = _Suspicion(1 if before is None or is_old else before.num_losses + 1, now)
        while len(self._found) > self._supervision.max_suspects:
            del self._found[next(iter(self._found))]

    def acquit(self, request: Request) -> None:
        """A request came to its end."""
        if self._found:
            self._found.pop(_identity(request), None)

    def check(self, request: Request) -> None:
        """Raise CrashingRequest for one that was there too often."""
        suspicion = self._found.get(_identity(request)) if self._found else None
        if suspicion is None or suspicion.num_losses < self._supervision.max_losses:
            return
        if self._clock() - suspicion.since <= self._supervision.suspicion_seconds:
            raise CrashingRequest(suspicion.num_losses)


def _identity(request: Request) -> bytes:
    """A digest of the request but for what every try has anew: its id, when it came and how urgent it is, and a seed that nobody gave.

    Its cache_salt is part of it: nobody learns from a refusal what requests others have sent.
    """
    sampling = request.sampling if request.sampling.is_seeded else msgspec.structs.replace(request.sampling, seed=0)
    same = msgspec.structs.replace(request, id="", arrived_at=0.0, priority=0, sampling=sampling)
    return hashlib.blake2b(msgspec.msgpack.encode(same), digest_size=16).digest()
