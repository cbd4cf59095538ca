"""Asks a server for `cascade chat`: what can be set there, and answers token by token. Prints nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx2
import msgspec

from engine.errors import EngineError

T = TypeVar("T")

CONNECT_SECONDS = 10.0


class ChatError(EngineError):
    """The server cannot be reached, is another one, or refused; the message says which."""


class Origin(msgspec.Struct):
    """One token as the server describes it."""

    text: str
    by: str
    lossy: bool
    role: str


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta
    provenance: list[Origin] = []
    finish_reason: str | None = None


class _Speculative(msgspec.Struct):
    draft_acceptance_rate: float


class _Cascade(msgspec.Struct):
    target_calls: int


class _Latency(msgspec.Struct):
    time_to_first_token_ms: float | None
    tokens_per_second: float | None


class Metrics(msgspec.Struct):
    """How an answer was made."""

    speculative_decoding: _Speculative | None
    cascade: _Cascade
    latency: _Latency


class Usage(msgspec.Struct):
    completion_tokens: int


class _Error(msgspec.Struct):
    message: str


class Chunk(msgspec.Struct):
    """One event of a stream."""

    choices: list[_Choice] = []
    usage: Usage | None = None
    metrics: Metrics | None = None
    error: _Error | None = None

    @property
    def content(self) -> str:
        return "".join(choice.delta.content or "" for choice in self.choices)

    @property
    def tokens(self) -> list[Origin]:
        return [token for choice in self.choices for token in choice.provenance]


class AlphaRange(msgspec.Struct):
    low: float | None
    high: float | None
    default: float


class Rule(msgspec.Struct):
    name: str
    keeps: str
    allowed: bool
    alpha: AlphaRange | None


class Variant(msgspec.Struct):
    id: str
    preset: str | None
    enabled: bool
    rule: str
    alpha: float | None


class Controls(msgspec.Struct):
    """GET /v1/cascade."""

    model: str
    target: str
    drafter: str
    max_draft: int
    models: list[Variant]
    rules: list[Rule]


class Client:
    """One server. Proxies are not asked."""

    def __init__(self, url: str, api_key: str | None):
        if not url.startswith(("http://", "https://")):
            raise ChatError(f"--url: {url} - must begin with http:// or https://")
        if api_key is not None and not api_key.isascii():
            raise ChatError("The API key has characters that no header can carry; name another with --api-key-env")
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        timeout = httpx2.Timeout(CONNECT_SECONDS, read=None)  # an answer may wait in the queue; the server's comments keep it open
        self._http = httpx2.Client(base_url=f"{self.url}/v1/", headers=headers, timeout=timeout, trust_env=False)

    def close(self) -> None:
        self._http.close()

    def controls(self) -> Controls:
        """What can be set. Raises ChatError."""
        with self._reaching():
            response = self._http.get("cascade", timeout=CONNECT_SECONDS)
        if response.status_code != 200:
            raise ChatError(_refusal(response.status_code, response.content))
        return _decoded(response.content, Controls, self.url)

    def stream(self, body: Mapping[str, Any]) -> Iterator[Chunk]:
        """The chunks of one answer; whoever stops reading must close the iterator. Raises ChatError."""
        with self._reaching(), self._http.stream("POST", "chat/completions", json=body) as response:
            if response.status_code != 200:
                raise ChatError(_refusal(response.status_code, response.read()))
            for data in _events(response.iter_raw()):
                if data == b"[DONE]":
                    return
                chunk = _decoded(data, Chunk, self.url)
                if chunk.error is not None:
                    raise ChatError(chunk.error.message)
                yield chunk
        raise ChatError("The connection broke before the answer was complete.")

    @contextmanager
    def _reaching(self) -> Iterator[None]:
        try:
            yield
        except httpx2.ConnectError as error:
            raise ChatError(f"{self.url} cannot be reached ({error}). Is the server running? --url names another one.") from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise ChatError(f"{self.url}: {str(error) or type(error).__name__}") from error


def _events(pieces: Iterator[bytes]) -> Iterator[bytes]:
    """The data of server-sent events, from pieces that may end anywhere."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        yield from (line[5:].strip() for line in lines if line.startswith(b"data:"))


def _decoded(data: bytes, kind: type[T], url: str) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise ChatError(f"{url} does not answer as Cascade Serve does: {error}.") from error


def _refusal(status: int, content: bytes) -> str:
    try:
        error = msgspec.json.decode(content, type=Chunk).error
    except msgspec.DecodeError:
        error = None
    if status == 404 and error is not None and "Invalid URL" in error.message:
        return "This server has no /v1/cascade: it is another one, or an older version."
    hint = " --api-key-env names the variable that holds it." if status == 401 else ""
    return f"{error.message if error else f'The server answered with status {status}.'}{hint}"
