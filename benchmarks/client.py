"""Asks an OpenAI-compatible server, and says what came when. The client's own cost counts: it may share the cores with the server.

So there is no SDK here: lines are split by hand, and of each chunk only what is measured is decoded.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httpx2
import msgspec

from benchmarks.body import BodyMaker
from benchmarks.errors import BenchmarkError, RequestFailed
from benchmarks.load import Answer, Drafting
from benchmarks.prompts import Prompt

PATHS = {"chat": "chat/completions", "completions": "completions"}
DONE = b"[DONE]"


# ---------------------------------------------------------------------- what is read of a chunk
class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None  # what vLLM and SGLang stream while a model thinks
    reasoning: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None

    @property
    def added(self) -> str:
        if self.delta is None:
            return self.text or ""
        return self.delta.content or self.delta.reasoning_content or self.delta.reasoning or ""


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    prompt_tokens_details: _PromptDetails | None = None


class _Speculative(msgspec.Struct):
    num_draft_tokens: int
    num_accepted_draft_tokens: int
    num_spec_steps: int


class _Cascade(msgspec.Struct):
    target_calls: int | None = None


class _Metrics(msgspec.Struct):
    speculative_decoding: _Speculative | None = None
    cascade: _Cascade | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    metrics: _Metrics | None = None
    error: msgspec.Raw = msgspec.Raw()  # of any shape
    system_fingerprint: str | None = None


class _Model(msgspec.Struct):
    id: str


class _Models(msgspec.Struct):
    data: list[_Model]


_decode_chunk = msgspec.json.Decoder(_Chunk).decode


# ---------------------------------------------------------------------- a stream
class EventLines:
    """The data of server-sent events, from pieces that may end anywhere. Fields other than `data` are not kept."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """What the lines that are complete now say."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line[5:].strip()


@dataclass
class StreamReader:
    """One stream as it comes in: feed it pieces, then ask for the answer."""

    sent_at: float
    _lines: EventLines = field(default_factory=EventLines)
    _delivered_at: list[float] = field(default_factory=list)
    _texts: list[str] = field(default_factory=list)
    _ended_at: float | None = None
    _finish_reason: str = ""
    _usage: _Usage | None = None
    _metrics: _Metrics | None = None
    _fingerprint: str | None = None

    def feed(self, piece: bytes, now: float) -> None:
        """Take what the network gave at `now`. Raises RequestFailed."""
        num_texts = len(self._texts)
        for data in self._lines.feed(piece):
            if data != DONE:
                self._take(_chunk(data), now)
        if len(self._texts) > num_texts:
            self._delivered_at.append(now)

    def answer(self) -> Answer:
        """The complete answer. Raises RequestFailed for a stream that broke off or does not count its tokens."""
        if self._ended_at is None:
            raise RequestFailed("malformed stream", "it ended without a finish reason")
        if self._usage is None:
            raise RequestFailed("no usage", "the server ignored stream_options.include_usage, so nobody knows how many tokens there are")
        details, metrics = self._usage.prompt_tokens_details, self._metrics or _Metrics()
        drafts = metrics.speculative_decoding
        return Answer(
            sent_at=self.sent_at,
            delivered_at=tuple(self._delivered_at),
            ended_at=self._ended_at,
            num_prompt_tokens=self._usage.prompt_tokens,
            num_cached_tokens=(details.cached_tokens or 0) if details else 0,
            num_output_tokens=self._usage.completion_tokens,
            finish_reason=self._finish_reason,
            drafting=None if drafts is None else Drafting(drafts.num_draft_tokens, drafts.num_accepted_draft_tokens, drafts.num_spec_steps),
            num_target_calls=metrics.cascade.target_calls if metrics.cascade else None,
            fingerprint=self._fingerprint,
            text="".join(self._texts),
        )

    def _take(self, chunk: _Chunk, now: float) -> None:
        if bytes(chunk.error) not in (b"", b"null"):
            raise RequestFailed("error in stream", _error_text(bytes(chunk.error)))
        self._usage = chunk.usage or self._usage
        self._metrics = chunk.metrics or self._metrics
        self._fingerprint = chunk.system_fingerprint or self._fingerprint
        for choice in chunk.choices:
            if text := choice.added:
                self._texts.append(text)
            if choice.finish_reason is not None:
                self._finish_reason, self._ended_at = choice.finish_reason, now


def _chunk(data: bytes) -> _Chunk:
    try:
        return _decode_chunk(data)
    except msgspec.DecodeError as error:
        raise RequestFailed("malformed stream", f"{error}: {_short(data)}") from error


# ---------------------------------------------------------------------- a server
@dataclass(frozen=True)
class HttpTarget:
    """One endpoint of one server."""

    client: httpx2.AsyncClient
    url: str
    maker: BodyMaker

    async def ask(self, prompt: Prompt, number: int) -> Answer:
        body = msgspec.json.encode(self.maker.body(prompt, number))
        reader = StreamReader(time.perf_counter())
        try:
            async with self.client.stream("POST", self.url, content=body) as response:
                await _require_stream(response)
                async for piece in response.aiter_raw():
                    reader.feed(piece, time.perf_counter())
        except httpx2.HTTPError as error:
            raise RequestFailed(*_transport_failure(error, self.url)) from error
        return reader.answer()


async def served_models(client: httpx2.AsyncClient, base_url: str) -> list[str]:
    """The model ids that a server lists. Raises RequestFailed."""
    url = f"{base_url}/models"
    try:
        response = await client.get(url)
    except httpx2.HTTPError as error:
        raise RequestFailed(*_transport_failure(error, url)) from error
    if response.status_code != 200:
        raise RequestFailed(f"HTTP {response.status_code}", f"{url} answered: {_error_text(response.content)}")
    try:
        return [model.id for model in msgspec.json.decode(response.content, type=_Models).data]
    except msgspec.DecodeError as error:
        raise RequestFailed("malformed response", f"{url} lists no models: {_short(response.content)}") from error


@asynccontextmanager
async def open_client(api_key: str | None, timeout: float) -> AsyncIterator[httpx2.AsyncClient]:
    """Connections as many as there are requests: what waits is to wait in the server, where it is measured. Proxies are not asked."""
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx2.AsyncClient(headers=headers, timeout=timeout, limits=limits, trust_env=False) as client:
        yield client


def base_url_of(url: str) -> str:
    """As an SDK takes it; a bare host gets /v1. Raises BenchmarkError."""
    if not url.startswith(("http://", "https://")):
        raise BenchmarkError(f"{url}: an address begins with http:// or https://.")
    return url.rstrip("/") if urlsplit(url).path.strip("/") else f"{url.rstrip('/')}/v1"


async def _require_stream(response: httpx2.Response) -> None:
    if response.status_code != 200:
        await response.aread()
        raise RequestFailed(f"HTTP {response.status_code}", _error_text(response.content))
    kind = response.headers.get("content-type", "")
    if not kind.startswith("text/event-stream"):
        raise RequestFailed("malformed stream", f"its content type is {kind or 'not given'}, not text/event-stream")


def _transport_failure(error: httpx2.HTTPError, url: str) -> tuple[str, str]:
    if isinstance(error, httpx2.TimeoutException):
        return "timeout", f"{url} said nothing in time ({type(error).__name__}); --timeout waits longer"
    if isinstance(error, httpx2.ConnectError):
        return "no connection", f"{url} cannot be reached ({error}). Is the server running?"
    return "broken connection", f"{url}: {str(error) or type(error).__name__}"


def _error_text(content: bytes) -> str:
    """The message of an error body, whatever its shape; peers differ."""
    try:
        found = msgspec.json.decode(content)
    except msgspec.DecodeError:
        return _short(content)
    found = found.get("error", found) if isinstance(found, dict) else found
    message = found.get("message", found.get("detail")) if isinstance(found, dict) else found
    return _short(str(message if message is not None else found).encode())


def _short(data: bytes) -> str:
    text = " ".join(data.decode("utf-8", "replace").split())
    return (text if len(text) <= 300 else f"{text[:300]}...") or "(nothing)"
