"""What a route may ask for: the state of its app; who may ask at all, and how much. State hangs on the app, never on a module."""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request, Response
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.client import EngineClient
from engine.dials import DIALS
from engine.errors import ClientError
from engine.stats import EngineInfo
from server.drain import Draining
from server.errors import BodyTooLarge, InvalidKey, NotLoaded, Refused, ShuttingDown, entry_of, response_of
from server.metrics import Metrics
from server.settings import Deployment
from server.text import TextTokenizer
from server.traces import NoTraces, Traces


@dataclass(frozen=True)
class Serving:
    """Everything that answering takes. Made when the model is loaded; what a restart may change is asked for."""

    engine: EngineClient
    version: str
    tokenizer: TextTokenizer
    deployment: Deployment
    metrics: Metrics
    draining: Draining
    started_at: int  # Unix time
    traces: Traces = field(default_factory=NoTraces)
    unused_fields: set[str] = field(default_factory=set)  # names that were logged

    @property
    def info(self) -> EngineInfo:
        """What the engine says of itself. Raises EngineDead."""
        return self.engine.info

    @property
    def fingerprint(self) -> str:
        """What an answer depends on apart from the request: version, pair, dtype, device; readable, and fit for a header."""
        info, model = self.info, self.deployment.model
        pair = "+".join(_last_part(name) + _held(part) for name, part in ((info.target, model.target), (info.drafter, model.drafter)))
        return re.sub(r"[^\w.+:-]", "_", f"cascade-{self.version}-{pair}-{info.dtype}-{info.device}", flags=re.ASCII)


def config_labels(deployment: Deployment, info: EngineInfo) -> dict[str, object]:
    """What a deployment serves, as an operator compares it with another one."""
    speculation = deployment.speculation
    return {
        "target": info.target,
        "drafter": info.drafter,
        "rule": speculation.rule,
        "alpha": format(DIALS[speculation.rule].default if speculation.alpha is None else speculation.alpha, "g"),
        "draft_policy": speculation.draft_length.policy,
        "max_draft": info.max_draft,
        "verification": speculation.verification,
        "device": info.device,
        "dtype": info.dtype,
        "quantization": deployment.model.target.quantization,
    }


def _held(part: object) -> str:
    """How weights are held, where that is another way than their dtype says, and whether a drafter copies."""
    quantization, copying = getattr(part, "quantization", "none"), getattr(part, "copying", None)
    return ("" if quantization == "none" else f"-{quantization}") + (f"-copying{copying.doubt:g}" if copying else "")


def _last_part(source: str) -> str:
    """Of a path, a hub id or a package's file."""
    return re.split(r"[/\\]", source)[-1]


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
    """Middleware: everything under /v1 wants one of the keys, and so does its description, /openapi.json.

    Without keys everybody is served. A body is not read before.
    """

    def __init__(self, app: ASGIApp, keys: tuple[str, ...], refused: Refused):
        self._app = app
        self._digests = [_digest(key.encode()) for key in keys]
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self._digests and _is_guarded(scope["path"]) and not self._is_known(Headers(scope=scope)):
            await _refuse(InvalidKey(), self._refused)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_known(self, headers: Headers) -> bool:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = _digest(key.strip().encode("latin-1"))
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them: the time must not say which
        return scheme.lower() == "bearer" and any(matches)


class BodyLimit:
    """Middleware: nobody makes this process hold a body of more than `limit` bytes.

    Content-Length is believed when it says too much, and nothing of the body is read then. A body is read before the application runs,
    since an error that `receive` raises in there would be taken for one of parsing.
    """

    def __init__(self, app: ASGIApp, limit: int, refused: Refused):
        self._app = app
        self._limit = limit
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = None if self._says_too_much(Headers(scope=scope)) else await self._read(receive)
        if body is None:
            await _refuse(BodyTooLarge(self._limit), self._refused)(scope, receive, send)
            return
        unread = [body]

        async def receive_again() -> Message:
            return unread.pop() if unread else await receive()

        await self._app(scope, receive_again, send)

    def _says_too_much(self, headers: Headers) -> bool:
        length = headers.get("content-length", "")
        if not (length.isascii() and length.isdigit()):  # the server refuses what is no number
            return False
        return len(length) > 20 or int(length) > self._limit  # Python reads no number of thousands of digits

    async def _read(self, receive: Receive) -> Message | None:
        """The whole body as one message, or the news that the client left; None when it is too large."""
        body = bytearray()  # not a list of messages: a body may come a byte at a time
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if len(body) > self._limit:
                return None
            if not message.get("more_body", False):
                return {"type": "http.request", "body": bytes(body), "more_body": False}
        return message


def _refuse(error: ClientError, refused: Refused) -> Response:
    """The response to an error that comes before any route."""
    entry = entry_of(error)
    refused(entry.status, str(entry.code))
    return response_of(error)


def _is_guarded(path: str) -> bool:
    return path in ("/v1", "/openapi.json") or path.startswith("/v1/")


def _digest(key: bytes) -> bytes:
    """Of one length, so that comparing takes the same time for every key."""
    return hashlib.sha256(key).digest()
