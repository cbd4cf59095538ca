"""One HTTP request on its way through the engine: requests in, text deltas and numbers out.

A Generation is a context: leaving it, however that comes about, aborts what has not finished. Knows neither HTTP nor OpenAI's shapes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from types import TracebackType

from engine.client import Stream
from engine.errors import ClientError, EngineDead, InvalidRequest, MemoryExhausted, ServerError
from engine.request import FinishReason, Request, Round, TokenDelta, TokenLogprobs
from server import logs
from server.deps import Serving
from server.detokenize import StopScanner, StopStrings
from server.errors import RequestTimeout
from server.reading import CallPiece, Reading
from server.record import UNDRAFTED, ChoiceRecord, RequestRecord, TokenRole, role_of
from server.text import TextTokenizer

TOOL_CALLS = "tool_calls"  # an answer's finish reason where it ended so that its calls are carried out; no engine knows of it


@dataclass(frozen=True)
class Echo:
    """A prompt as it stands in front of its answers."""

    text: str
    lengths: tuple[int, ...] = ()  # characters that each of its tokens has in there, if it is to be known how likely they were


@dataclass(frozen=True)
class Job:
    """What a client asked for, parsed and tokenised."""

    id: str
    requests: tuple[Request, ...]  # one a prompt; they differ in their ids, their seeds and what depends on a prompt's length
    stops: tuple[str, ...]
    model_id: str  # as the client wrote it
    preset: str  # "" for the model itself
    is_stream: bool
    has_usage_chunk: bool
    ignored: tuple[str, ...]  # fields that changed nothing
    num_shown: int  # of each prompt's answers: all, or the likeliest ones
    held_by: tuple[str, ...] = ()  # the fields that hold the answers to a grammar
    wants_provenance: bool = False
    shows_logprobs: bool = False
    echoes: tuple[Echo, ...] = ()  # what stands in front of the answers to each prompt; empty for nothing
    shows_stop: bool = False  # what ended an answer, if it has a text, is part of the answer
    reading: Reading | None = None  # how to find thinking and calls in the answers; None: all is content
    arrived_at: float = field(default_factory=time.monotonic)

    @property
    def knows_logprobs(self) -> bool:
        return self.requests[0].sampling.num_logprobs is not None

    @property
    def scores_prompts(self) -> bool:
        return self.requests[0].sampling.num_prompt_logprobs is not None

    def prompt_of(self, index: int) -> int:
        """The number of the prompt of answer `index`, counted over all prompts."""
        return index // len(self.requests[0].choices)


@dataclass(frozen=True, slots=True)
class EmittedToken:
    """One token of an answer: where it comes from, and how likely it was."""

    token_id: int
    text: str  # what it adds to the text; nothing in the middle of a character, and for an end token
    is_drafted: bool  # the drafter's word stands; else target or rule drew it
    is_lossy: bool  # it stands, and exact verification would have rejected it
    role: TokenRole  # in its round
    num_draft: int | None  # drafts of the round that it ends; None if it ends none
    is_hidden: bool  # it ended the answer and is no part of it
    logprobs: TokenLogprobs | None  # if the job wants them


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What one delivery adds to one choice."""

    index: int
    text: str  # of the content
    finish_reason: str | None
    tokens: tuple[EmittedToken, ...] = ()  # if the job wants to know of them
    reasoning: str = ""
    calls: tuple[CallPiece, ...] = ()


class Generation:
    """A job that the engine works at.

        async with Generation(job, serving) as generation:
            async for deltas in generation: ...

    Entering raises what `submit` raises. Iterating gives, for each choice with news, all that was waiting as one TextDelta; it raises
    EngineDead if the engine fails, RequestTimeout if that takes longer than the deployment allows since `arrived_at` (monotonic; by
    default the job's), and ShuttingDown if the server cuts the job.
    """

    def __init__(self, job: Job, serving: Serving, arrived_at: float | None = None):
        first = job.requests[0]
        limit, speculation = serving.info.max_draft, first.speculation
        num_spec_tokens = min(limit, speculation.max_draft if speculation.max_draft is not None else limit) if speculation.enabled else 0
        self.prompt_logprobs: tuple[list[TokenLogprobs], ...] = tuple([] for _ in job.requests)  # of all tokens but the first, if wanted
        self._job = job
        self._serving = serving
        self._num_choices = len(first.choices)
        self._answers: list[_Answer] = []  # made when the engine has taken the job
        self._exits = AsyncExitStack()
        self._streams: list[Stream] = []
        self._begun: set[int] = set()  # prompts of which something was delivered
        self._error: Exception | None = None
        self._is_logged = serving.deployment.server.log_prompts
        self._arrived_at = job.arrived_at if arrived_at is None else arrived_at
        self.record = RequestRecord(
            rule=speculation.rule,
            alpha=speculation.alpha,
            num_spec_tokens=num_spec_tokens,
            num_prompt_tokens=sum(len(request.prompt_ids) for request in job.requests),
            num_choices=self._num_choices,
            has_prediction=bool(first.prediction_ids),
            marks_reasoning=job.reading is not None and job.reading.reasoning is not None,
            choices=[ChoiceRecord(num_spec_tokens) for request in job.requests for _ in request.choices],
            arrived_at=job.arrived_at,
        )

    async def __aenter__(self) -> Generation:
        self._serving.draining.add(self)
        try:
            self._start_clock()
            for request in self._job.requests:
                self._streams.append(await self._exits.enter_async_context(self._serving.engine.submit(request)))
        except BaseException:
            self._serving.draining.discard(self)
            await self._exits.aclose()
            raise
        self._serving.metrics.opened()
        self._trace = self._serving.traces.current()
        self._metrics = self._serving.metrics.request(self._job.preset, self.record.rule)  # not before: what is refused has no series
        stops = StopStrings(self._job.stops, self._job.shows_stop)
        self._answers = [_Answer(self._serving.tokenizer, stops, record, self._job, self._is_logged) for record in self.record.choices]
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._serving.draining.discard(self)
        self._serving.metrics.closed()
        await self._exits.aclose()
        early = _early_end(self._error)
        reasons = [answer.record.finish_reason or early for answer in self._answers]
        for answer, reason in zip(self._answers, reasons, strict=True):
            self._metrics.answer_done(answer.record, reason, self.record.arrived_at, self.record.alpha)
        self._metrics.request_done(self.record.num_prompt_tokens, time.monotonic() - self.record.arrived_at)
        self._trace.note(self._job, self.record, reasons)
        logs.note_answer(self._serving.metrics.model, self._job, self.record, reasons, self._texts if self._is_logged else None)

    async def __aiter__(self) -> AsyncGenerator[list[TextDelta], None]:
        try:
            async with aclosing(_merge(self._streams)) as batches:
                async for prompt, deltas in batches:
                    yield self._take(prompt, deltas)
            if any(answer.record.finish_reason is None for answer in self._answers):
                raise self._error or EngineDead("The engine ended an answer before it was finished.")
        except Exception as error:  # of whatever kind: the numbers call the answer an error, and the caller tells the client
            self._error = error
            raise

    def cut(self, error: ServerError) -> None:
        """End now; whoever iterates gets `error`."""
        self._error = error
        for stream in self._streams:
            for choice in range(self._num_choices):
                stream.abort(choice)

    def _texts(self) -> Mapping[str, object]:
        """Prompts, as the model was given them, and answers, as it wrote them, for a log that is to have them."""
        prompts = [self._serving.tokenizer.text_of(request.prompt_ids) for request in self._job.requests]
        return {"prompts": prompts, "answers": ["".join(answer.texts or ()) for answer in self._answers]}

    def _start_clock(self) -> None:
        """Cut the job when its time is up. Raises RequestTimeout where it already is."""
        seconds = self._serving.deployment.server.request_timeout_seconds
        if seconds is None:
            return
        left = self._arrived_at + seconds - time.monotonic()
        if left <= 0:
            raise RequestTimeout(seconds)
        self._exits.callback(asyncio.get_running_loop().call_later(left, self.cut, RequestTimeout(seconds)).cancel)

    def _take(self, prompt: int, deltas: Sequence[TokenDelta]) -> list[TextDelta]:
        """What a batch of deltas for one prompt says to the client."""
        told: dict[int, None] = {}  # answers, in the order of their first news
        for delta in deltas:
            if delta.prompt_logprobs:  # all of them come before any answer begins
                self.prompt_logprobs[prompt].extend(delta.prompt_logprobs)
                continue
            index = prompt * self._num_choices + delta.choice
            answer = self._answers[index]
            if answer.record.finish_reason is not None:  # it met a stop string; the engine had not heard of it
                continue
            drafts = answer.push(delta)
            told[index] = None
            if drafts is not None:
                self._metrics.round(drafts)
            if answer.is_cut:
                self._streams[prompt].abort(delta.choice)
        self._note_delivery(prompt, list(told))
        return [self._answers[index].as_delta(index) for index in told]

    def _note_delivery(self, prompt: int, indices: list[int]) -> None:
        now = time.monotonic()
        for index in indices:
            record = self._answers[index].record
            if self.record.first_at is None:
                self._metrics.first_delivery(record.queue_seconds, now - self.record.arrived_at)
            if prompt not in self._begun:
                self._begun.add(prompt)
                self._metrics.prompt_done(len(self._job.requests[prompt].prompt_ids), record.num_cached_tokens)
            self._metrics.delivered(*record.delivered(now))


class _Answer:
    """One choice: its text so far, and its numbers."""

    def __init__(self, tokenizer: TextTokenizer, stops: StopStrings, record: ChoiceRecord, job: Job, is_kept: bool):
        self._detokenizer = tokenizer.detokenizer(job.reading.literals) if job.reading else tokenizer.detokenizer()
        self._reader = job.reading.reader() if job.reading else None
        self._scanner = StopScanner(stops)
        self._num_unstopped = job.requests[0].sampling.min_tokens  # so many tokens are not searched for stop strings
        self._shows_stop = job.shows_stop
        self._held_by = job.held_by
        self._keeps_tokens = job.wants_provenance or job.knows_logprobs
        self._text = ""  # since the last delivery, where there is no reader
        self._tokens: list[EmittedToken] = []  # since the last delivery
        self.texts: list[str] | None = [] if is_kept else None  # all that was said, thinking and calls included
        self.record = record

    @property
    def is_cut(self) -> bool:
        """A stop string was found."""
        return self._scanner.is_stopped

    def push(self, delta: TokenDelta) -> Round | None:
        """Take tokens in. Returns the round as far as the client received it; tokens behind a stop string count nowhere."""
        has_hidden_end = delta.finish_reason is FinishReason.STOP and not self._shows_stop
        with_text = delta.token_ids[:-1] if has_hidden_end else delta.token_ids
        text, pieces = "", list[str]()
        while len(pieces) < len(with_text) and not self.is_cut:
            pieces.append(self._detokenizer.push(with_text[len(pieces)]))
            is_searched = self.record.num_tokens + len(pieces) > self._num_unstopped
            text += self._scanner.push(pieces[-1], may_stop=is_searched)
        if delta.finish_reason is not None and not self.is_cut:
            text += self._finish(delta.finish_reason)
            pieces += [""] * (len(delta.token_ids) - len(pieces))
        if self.is_cut:
            self.record.finish_reason = FinishReason.STOP.value
        if self._keeps_tokens:
            self._tokens += _tokens(delta, pieces, has_hidden_end)
        if self.texts is not None:
            self.texts.append(text)
        self._take_in(text, pieces)
        return self.record.count(delta, len(pieces))

    def as_delta(self, index: int) -> TextDelta:
        """What is delivered now."""
        tokens, self._tokens = tuple(self._tokens), []
        text, self._text = self._text, ""
        if self._reader is None:
            return TextDelta(index, text, self.record.finish_reason, tokens)
        pieces, reason = self._reader.take(), self.record.finish_reason
        if reason == FinishReason.STOP.value and self._reader.ends_for_calls:
            reason = TOOL_CALLS
        return TextDelta(index, pieces.content, reason, tokens, pieces.reasoning, tuple(pieces.calls))

    def _take_in(self, text: str, pieces: Sequence[str]) -> None:
        if self._reader is None:
            self._text += text
            return
        self._reader.push(text, pieces)
        if self.record.finish_reason is not None:
            self._reader.flush(is_cut=self.record.finish_reason == FinishReason.LENGTH.value)
        self.record.num_reasoning_tokens = self._reader.num_reasoning_tokens

    def _finish(self, reason: FinishReason) -> str:
        if reason is FinishReason.ABORT:
            raise EngineDead("The engine gave an answer up.")
        if reason is FinishReason.MEMORY:
            raise MemoryExhausted
        if reason is FinishReason.ERROR:
            if not self._held_by:
                raise EngineDead("The engine could not go on with an answer.")
            asked = " and ".join(self._held_by)
            raise InvalidRequest(f"What {asked} asked of the answer became too complex to follow; simplify it.", self._held_by[0])
        self.record.finish_reason = reason.value
        return self._scanner.push(self._detokenizer.flush()) + self._scanner.flush()


def _early_end(error: Exception | None) -> str:
    """How an answer ended that was not finished."""
    if error is None:
        return "abort"
    if isinstance(error, RequestTimeout):
        return "timeout"
    return "refused" if isinstance(error, ClientError) else "error"  # refused: what was asked cannot be done, which showed in the middle


def _tokens(delta: TokenDelta, pieces: Sequence[str], has_hidden_end: bool) -> list[EmittedToken]:
    """Those that are kept, one for each piece of text."""
    drafts = delta.round or UNDRAFTED
    last = len(delta.token_ids) - 1
    return [
        EmittedToken(
            token_id=token_id,
            text=piece,
            is_drafted=bool(delta.drafted_mask >> i & 1),
            is_lossy=bool(drafts.lossy_mask >> i & 1),
            role=role_of(drafts, i),
            num_draft=drafts.num_draft if i >= drafts.num_accepted else None,
            is_hidden=has_hidden_end and i == last,
            logprobs=delta.logprobs[i] if delta.logprobs else None,
        )
        for i, (token_id, piece) in enumerate(zip(delta.token_ids, pieces, strict=False))
    ]


async def _merge(streams: Sequence[Stream]) -> AsyncGenerator[tuple[int, list[TokenDelta]], None]:
    """Whatever any of the streams has, as it comes, with the stream's number."""
    if len(streams) == 1:  # a task a batch is a cost that only several streams need
        async for deltas in streams[0]:
            yield 0, deltas
        return
    waiting = {asyncio.ensure_future(anext(stream)): i for i, stream in enumerate(streams)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number = waiting.pop(task)
                try:
                    deltas = task.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(streams[number]))] = number
                yield number, deltas
    finally:
        for task in waiting:
            if not task.cancel() and not task.cancelled():
                task.exception()  # a dead engine ends all streams at once; one of them told the client, the others are heard here
