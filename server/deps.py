"""What a route may ask for: the state of its app, and who may ask at all. State hangs on the app, never on a module."""

from __future__ import annotations

import hashlib
import hmac
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.client import EngineClient
from engine.stats import EngineInfo
from server.drain import Draining
from server.errors import InvalidKey, NotLoaded, Refused, ShuttingDown, entry_of, response_of
from server.metrics import Metrics
from server.settings import Deployment
from server.text import TextTokenizer


@dataclass(frozen=True)
class Serving:
    """Everything that answering takes. Made when the model is loaded, unchanged from then on."""

    engine: EngineClient
    info: EngineInfo
    tokenizer: TextTokenizer
    deployment: Deployment
    metrics: Metrics
    draining: Draining
    fingerprint: str
    started_at: int  # Unix time


async def get_serving(request: Request) -> Serving:
    """The state of the app. Raises NotLoaded or ShuttingDown: whoever depends on it takes part in neither.

    A coroutine, since FastAPI would call a plain function in a thread.
    """
    serving: Serving | None = request.app.state.serving
    if serving is None:
        raise NotLoaded
    if serving.draining.is_draining:
        raise ShuttingDown
    return serving


Served = Annotated[Serving, Depends(get_serving)]


class BearerAuth:
    """Middleware: everything under /v1 wants one of the keys. Without keys everybody is served. A body is not read before."""

    def __init__(self, app: ASGIApp, keys: tuple[str, ...], refused: Refused):
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._digests and _is_guarded(scope["path"]) and not self._is_known(Headers(scope=scope)):
            entry = entry_of(InvalidKey())
            self._refused(entry.status, str(entry.code))
            await response_of(InvalidKey())(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_known(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = _digest(key.strip().encode("latin-1"))
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them: the time must not say which
        return scheme.lower() == "bearer" and any(matches)


def _is_guarded(path: str) -> bool:
    return path == "/v1" or path.startswith("/v1/")


def _digest(key: bytes) -> bytes:
    """Of one length, so that comparing takes the same time for every key."""
    return hashlib.sha256(key).digest()
