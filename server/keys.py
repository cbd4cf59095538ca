"""API keys: who may ask at all, and how much at once. Keeps digests and no keys; gives nobody more than another.

A key stands in the deployment's `api_keys`, in CASCADE_API_KEYS or in `api_keys_file`, as it is or as `sha256:` and its digest.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterator
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from engine.errors import ConfigError
from server.errors import InvalidKey, Refused, TooManyOfKey, refuse
from server.fit import DIGEST, fit_key
from server.settings import ServerSettings

OPEN_PATHS = frozenset({"/health", "/ready", "/"})  # what probes ask, and the page, in which a key can be given
OPEN_FOLDER = "/web/"  # what the page loads


def digests_of(settings: ServerSettings) -> tuple[bytes, ...]:
    """Of every key that is accepted; none where everybody is served. Raises ConfigError for a file of keys that cannot be used."""
    in_file = _keys_in(settings.api_keys_file) if settings.api_keys_file is not None else ()
    return tuple(dict.fromkeys(digest_of(key) for key in (*settings.api_keys, *in_file)))


def digest_of(key: str) -> bytes:
    """SHA-256, of one length, so that comparing takes the same time for every key. Keys are random: a slow hash would add nothing."""
    if key.startswith(DIGEST):
        return bytes.fromhex(key.removeprefix(DIGEST))
    return _sha256(key.encode())


def _sha256(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _keys_in(path: Path) -> Iterator[str]:
    """One key a line; empty lines and those that begin with # are left out. An empty file would open the server: it is refused."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"server.api_keys_file: {path} - cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"server.api_keys_file: {path} - is not UTF-8 text.") from error
    keys = [(number, line.strip()) for number, line in enumerate(lines, 1) if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise ConfigError(f"server.api_keys_file: {path} - holds no key; one a line.")
    for number, key in keys:
        try:
            yield fit_key(key)
        except ValueError as error:
            raise ConfigError(f"server.api_keys_file: {path}, line {number} - {error}.") from error


class BearerAuth:
    """Middleware: whoever asks for anything but OPEN_PATHS must send one of the keys. A body is not read before.

    Unknown paths are no exception: what exists is nobody's business without a key. Without keys everybody is served.
    Of POST requests, which are those that take work, a key may have `max_open` at once; None: any number.
    """

    def __init__(self, app: ASGIApp, digests: tuple[bytes, ...], refused: Refused, max_open: int | None = None):
        self._app = app
        self._digests = digests
        self._refused = refused
        self._max_open = max_open
        self._num_open = [0] * len(digests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._digests or _is_open(scope["path"]):
            await self._app(scope, receive, send)
            return
        place = self._place_of_key(Headers(scope=scope))
        if place is None:
            await refuse(InvalidKey(), self._refused)(scope, receive, send)
        elif self._max_open is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
        elif self._num_open[place] >= self._max_open:
            await refuse(TooManyOfKey(self._max_open), self._refused)(scope, receive, send)
        else:
            await self._counted(place, scope, receive, send)

    async def _counted(self, place: int, scope: Scope, receive: Receive, send: Send) -> None:
        self._num_open[place] += 1
        try:
            await self._app(scope, receive, send)  # until all of a stream is sent
        finally:
            self._num_open[place] -= 1

    def _place_of_key(self, headers: Headers) -> int | None:
        """Which of the keys was sent; None for none of them."""
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = _sha256(key.strip().encode("latin-1"))
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them: the time must not say which
        return matches.index(True) if scheme.lower() == "bearer" and any(matches) else None


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)
