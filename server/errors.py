"""What went wrong, as OpenAI says it: one table from class to status, type and code, and the handlers that read it.

The class decides whether client or server is at fault; no route catches anything. 422 is never sent.

    engine.errors.ClientError
    ├── UnknownModel       a model id that is not served
    ├── BodyTooLarge       a body of more bytes than the deployment takes
    ├── BodyTooComplex     a body that is nested too deeply or has too many keys or values
    ├── BodyTimeout        a body that took too long to come
    ├── InvalidKey         no API key, or a wrong one
    └── TooManyOfKey       as many requests of one API key are open as the deployment allows
    engine.errors.ServerError
    ├── RequestTimeout     an answer that took longer than the deployment allows
    ├── NotLoaded          the model is still being loaded
    ├── NotChecked         nobody could look at a grammar
    └── ShuttingDown       the server was told to end
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import (
    ClientError,
    ContextLengthExceeded,
    CrashingRequest,
    EngineDead,
    EngineRestarting,
    InvalidRequest,
    MemoryExhausted,
    QueueFull,
    ServerError,
)


class UnknownModel(ClientError):
    """A model id that is not served."""

    def __init__(self, model: str, served: tuple[str, ...]):
        super().__init__(f"The model {_short(model)!r} does not exist. This server has {', '.join(served)}.")


class BodyTooLarge(ClientError):
    """A body of more bytes than the deployment takes."""

    def __init__(self, limit: int):
        super().__init__(f"The request body is too large: this server takes {limit} bytes at most (server.max_body_bytes).")


class BodyTooComplex(ClientError):
    """A body that would take too long to parse, or that nothing could walk over."""


class BodyTimeout(ClientError):
    """A body that took too long to come."""

    def __init__(self, seconds: float):
        super().__init__(f"The request body did not come within {seconds:g} s (server.body_timeout_seconds).")


class InvalidKey(ClientError):
    """No API key, or a wrong one."""

    def __init__(self) -> None:
        super().__init__("Missing or incorrect API key. Send one as 'Authorization: Bearer KEY'.")


class TooManyOfKey(ClientError):
    """As many requests of one API key are open as the deployment allows. The server itself may have room."""

    retry_after = 1  # nobody knows when one of them ends; most clients wait longer each time

    def __init__(self, limit: int):
        super().__init__(
            f"As many requests of this API key are open as may be: {limit} (server.max_requests_per_key). Try again when one is answered."
        )


class RequestTimeout(ServerError):
    """An answer that took longer than the deployment allows; what was written of it is lost."""

    def __init__(self, seconds: float):
        super().__init__(f"The answer was not complete within {seconds:g} s, which this server allows (server.request_timeout_seconds).")


class NotLoaded(ServerError):
    """The model is still being loaded."""

    retry_after = 5

    def __init__(self) -> None:
        super().__init__("The model is being loaded.")


class ShuttingDown(ServerError):
    """The server was told to end; it takes nothing new and has ended what took too long."""

    retry_after = 5

    def __init__(self) -> None:
        super().__init__("The server is shutting down.")


class NotChecked(ServerError):
    """Nobody could look at a grammar: this machine is to blame, and it may be right in a moment."""

    retry_after = 1

    def __init__(self) -> None:
        super().__init__("Grammars cannot be checked just now.")


class ClientGone(Exception):
    """The client left before its answer was complete. Nobody reads the response, and nobody was refused."""


@dataclass(frozen=True)
class Entry:
    """How a class of errors looks to a client."""

    status: int
    type: str
    code: str | None = None
    param: str | None = None


TABLE: Mapping[type[BaseException], Entry] = {
    UnknownModel: Entry(404, "invalid_request_error", "model_not_found", "model"),
    BodyTooLarge: Entry(413, "invalid_request_error", "request_too_large"),
    BodyTooComplex: Entry(400, "invalid_request_error", "request_too_complex"),
    BodyTimeout: Entry(408, "invalid_request_error", "body_timeout"),
    InvalidKey: Entry(401, "invalid_request_error", "invalid_api_key"),
    TooManyOfKey: Entry(429, "requests", "rate_limit_exceeded"),  # the type is what there are too many of, as at OpenAI
    ContextLengthExceeded: Entry(400, "invalid_request_error", "context_length_exceeded"),
    InvalidRequest: Entry(400, "invalid_request_error"),  # and the param that the error names
    CrashingRequest: Entry(400, "invalid_request_error", "request_crashes_engine"),
    ClientError: Entry(400, "invalid_request_error"),
    QueueFull: Entry(503, "server_error", "queue_full"),
    RequestTimeout: Entry(408, "server_error", "request_timeout"),
    NotLoaded: Entry(503, "server_error", "model_loading"),
    NotChecked: Entry(503, "server_error", "overloaded"),
    ShuttingDown: Entry(503, "server_error", "shutting_down"),
    MemoryExhausted: Entry(503, "server_error", "out_of_memory"),
    EngineRestarting: Entry(503, "server_error", "engine_restarting"),
    EngineDead: Entry(500, "server_error", "engine_dead"),
    Exception: Entry(500, "server_error", "internal_error"),
}


def entry_of(error: BaseException) -> Entry:
    """The table's entry for the nearest class of an error."""
    return next(TABLE[kind] for kind in type(error).__mro__ if kind in TABLE)


def body_of(error: BaseException) -> dict[str, Any]:
    """OpenAI's error object. An error that nobody foresaw is not described to the client."""
    entry = entry_of(error)
    message = "The server had an internal error." if entry.code == "internal_error" else str(error)
    message = message if isinstance(error, ClientError) else without_paths(message)
    return _body(message, entry.type, getattr(error, "param", entry.param), entry.code)


def without_paths(text: str) -> str:
    """What is said to anybody: why an engine was lost may name files of this machine."""
    return _PATH.sub("(a file)", text)


_PATH = re.compile(r"""(?<![\w/:.)])(?:/(?!v1/)|[A-Za-z]:\\)[^\s'"/\\]+[/\\][^\s'",;]*""")


def response_of(error: BaseException) -> JSONResponse:
    """The response for an error that came before the first byte of an answer."""
    entry = entry_of(error)
    headers = {}
    if (retry_after := getattr(error, "retry_after", None)) is not None:
        headers["Retry-After"] = str(retry_after)
    if entry.status in (408, 500):
        headers["x-should-retry"] = "false"  # the SDK would send what broke the server, or took all its time, twice more
    if isinstance(error, BodyTimeout):
        headers["Connection"] = "close"  # else the rest of the body would keep the connection busy
    if entry.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body_of(error), entry.status, headers)


Refused = Callable[[int, str], None]  # is told status and code of every refusal


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's error object."""

    error: ErrorDetail


DOCUMENTED: dict[int | str, dict[str, Any]] = {  # what /openapi.json says of every route; a full queue is a 503 and never a 429
    status: {"model": ErrorBody, "description": description}
    for status, description in {
        400: "The request cannot be served; `param` names the field.",
        401: "No API key, or a wrong one.",
        404: "No such route or model.",
        405: "The route has another method.",
        408: "The body did not come, or the answer was not complete, in time.",
        413: "The body is too large.",
        429: "The API key has too many open requests.",
        500: "The server failed.",
        503: "Not now: the queue is full, memory is exhausted, the engine is being restarted, the server is loading or shutting down.",
    }.items()
}


def refuse(error: BaseException, refused: Refused) -> JSONResponse:
    """The response to an error, which `refused` is told of."""
    entry = entry_of(error)
    refused(entry.status, entry.code or "invalid_request")
    return response_of(error)


def install(app: FastAPI, refused: Refused) -> None:
    """Answer every error of this app that anybody foresaw in OpenAI's shape; Unforeseen answers the others."""

    async def ours(_: Request, error: Exception) -> JSONResponse:
        return refuse(error, refused)

    async def invalid(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        refused(400, "invalid_request")
        message, param = _explain(error)
        return JSONResponse(_body(message, "invalid_request_error", param, None), 400)

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        refused(error.status_code, "invalid_request")
        body = _body(_http_message(request, error), "invalid_request_error", None, None)
        return JSONResponse(body, error.status_code, error.headers)

    async def gone(_: Request, error: Exception) -> Response:
        return Response(status_code=499)  # as nginx logs it

    app.add_exception_handler(ClientGone, gone)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    for kind in (ClientError, ServerError):
        app.add_exception_handler(kind, ours)


class Unforeseen:
    """Middleware: an error that nobody foresaw is a 500 in OpenAI's shape, and is raised on for the server's log.

    Stands inside of the middleware that adds headers; the framework's own handler for any error stands outside of it.
    """

    def __init__(self, app: ASGIApp, refused: Refused):
        self._app = app
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_begun = scope["type"] != "http"

        async def noting_send(message: Message) -> None:
            nonlocal is_begun
            is_begun = True
            await send(message)

        try:
            await self._app(scope, receive, noting_send)
        except Exception as error:
            if not is_begun:
                await refuse(error, self._refused)(scope, receive, send)
            raise


def _body(message: str, kind: str, param: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


_PLAIN = {  # where pydantic's words are about Python
    "extra_forbidden": "unknown field.",
    "missing": "required.",
    "string_too_short": "must not be empty.",
    "too_short": "must not be empty.",
    "too_long": "must have at most {max_length} items.",
}


def _explain(error: RequestValidationError) -> tuple[str, str | None]:
    """Message and param of the first thing that is wrong with a body. Says nothing of what the client sent: it may be anything."""
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"][1:])
    if first["type"] == "json_invalid":
        return f"The request body is not valid JSON: {first['ctx']['error']} at position {param}.", None
    if not param:
        return "The request body must be a JSON object, sent with 'Content-Type: application/json'.", None
    param = _short(param.encode("utf-8", "replace").decode())  # a key of the client may hold half a surrogate pair
    plain = _PLAIN.get(first["type"])
    what = plain.format_map(first.get("ctx", {})) if plain else first["msg"].removeprefix("Value error, ")
    return f"{param}: {what}", param


def _http_message(request: Request, error: HTTPException) -> str:
    if error.status_code in (404, 405):
        return f"Invalid URL ({request.method} {request.url.path}): {error.detail}"
    return str(error.detail)


def _short(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."
