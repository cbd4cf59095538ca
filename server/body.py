"""What a body may cost before anybody looks at what it says: bytes, seconds, and how JSON is built. Knows no fields.

A body is read whole and measured in front of the application. Parsing it in a thread would spare nobody much, since Python's parser holds
the interpreter lock throughout; instead a body of more values than MAX_VALUES, the part that is slow, is not parsed at all. How long
parsing keeps all others waiting, on one busy core of a small machine: texts of 30 MiB 0.06 s, and from within a thread as long; a million
token ids 0.17 s, from a thread 0.09 s; 31 MiB of a million numbers with 29 digits, the worst there is, 0.45 s, from a thread 0.41 s.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from itertools import accumulate

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.errors import ClientError
from server.errors import BodyTimeout, BodyTooComplex, BodyTooLarge, Refused, refuse

MAX_DEPTH = 64  # brackets within brackets; OpenAI's own requests need ten
MAX_KEYS = 65_536  # of all objects together
MAX_VALUES = 1 << 20  # entries of all objects and arrays together
_LONG = 1 << 18  # bytes; a longer body is measured in a thread

_STRING = re.compile(rb'"[^"]*+"?')  # a string may never end
_ALL_BUT_MARKS = bytes(set(range(256)) - set(b'[]{},:"'))
_STEPS = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


@dataclass(frozen=True)
class BodyBounds:
    """What a deployment takes."""

    num_bytes: int
    seconds: float


class BodyLimit:
    """Middleware: nobody makes this process hold a body of more bytes than the bounds say, wait for one for longer, or parse a monster.

    Content-Length is believed when it says too much, and nothing of the body is read then. A body is read before the application runs,
    since an error that `receive` raises in there would be taken for one of parsing.
    """

    def __init__(self, app: ASGIApp, bounds: BodyBounds, refused: Refused):
        self._app = app
        self._bounds = bounds
        self._refused = refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            unread = [await self._taken(Headers(scope=scope), receive)]
        except ClientError as error:
            await refuse(error, self._refused)(scope, receive, send)
            return

        async def receive_again() -> Message:
            return unread.pop() if unread else await receive()

        await self._app(scope, receive_again, send)

    async def _taken(self, headers: Headers, receive: Receive) -> Message:
        """The whole body as one message, or the news that the client left. Raises ClientError."""
        if self._says_too_much(headers):
            raise BodyTooLarge(self._bounds.num_bytes)
        try:
            async with asyncio.timeout(self._bounds.seconds):
                message = await self._read(receive)
        except TimeoutError:
            raise BodyTimeout(self._bounds.seconds) from None
        body = message.get("body", b"")
        await (asyncio.to_thread(check_shape, body) if len(body) > _LONG else _at_once(body))
        return message

    def _says_too_much(self, headers: Headers) -> bool:
        length = headers.get("content-length", "")
        if not (length.isascii() and length.isdigit()):  # the server refuses what is no number
            return False
        return len(length) > 20 or int(length) > self._bounds.num_bytes  # Python reads no number of thousands of digits

    async def _read(self, receive: Receive) -> Message:
        body = bytearray()  # not a list of messages: a body may come a byte at a time
        while (message := await receive())["type"] == "http.request":
            body += message.get("body", b"")
            if len(body) > self._bounds.num_bytes:
                raise BodyTooLarge(self._bounds.num_bytes)
            if not message.get("more_body", False):
                return {"type": "http.request", "body": bytes(body), "more_body": False}
        return message


async def _at_once(body: bytes) -> None:
    check_shape(body)


def check_shape(body: bytes) -> None:
    """Raise BodyTooComplex for a JSON text that is nested too deeply or has too many keys or values. Other mistakes are the parser's to
    find, and a text that is no JSON may count as anything.

    Looks at each byte a few times, whatever it says, and never deeper than a loop.
    """
    if b"\0" in body:  # UTF-16 or UTF-32, which JSON is not sent in, and in which the marks below would stand for something else
        raise BodyTooComplex("The request body must be JSON in UTF-8.")
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH and body.count(b":") <= MAX_KEYS and body.count(b",") <= MAX_VALUES:
        return
    marks = _marks(body)
    brackets = marks.translate(None, b",:")
    if marks.count(b":") > MAX_KEYS:
        raise BodyTooComplex(f"The request body has too many keys: this server takes {MAX_KEYS} at most.")
    if marks.count(b",") + len(brackets) // 2 > MAX_VALUES:  # an array of n entries has n - 1 commas
        raise BodyTooComplex(f"The request body has too many values: this server takes {MAX_VALUES} at most.")
    depth = max(accumulate(map(_STEPS.__getitem__, brackets)), default=0)
    if depth > MAX_DEPTH:
        raise BodyTooComplex(f"The request body is nested too deeply: this server takes {MAX_DEPTH} levels at most.")


def _marks(body: bytes) -> bytes:
    """Brackets, commas and colons outside of strings, as far as the text is JSON. Raises BodyTooComplex for too many strings."""
    unescaped = body.replace(b"\\\\", b"").replace(b'\\"', b"")
    marks = unescaped.translate(None, _ALL_BUT_MARKS).replace(b'""', b"")  # most strings are gone
    if marks.count(b'"') > 2 * (MAX_KEYS + MAX_VALUES):
        raise BodyTooComplex(f"The request body has too many values: this server takes {MAX_VALUES} at most.")
    return _STRING.sub(b"", marks)
