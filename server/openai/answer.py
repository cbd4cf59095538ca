"""A Generation as OpenAI's response: one JSON object, or a stream of chunks. What chat and completions differ in is a Shape."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import Request, Response

from engine.request import TokenLogprobs
from server.deps import Serving
from server.generate import EmittedToken, Generation, Job, TextDelta
from server.openai import response_schema as schema
from server.openai.convert import header_safe
from server.record import ChoiceRecord, RequestRecord
from server.stream import EventStream, unless_disconnected

_MANY_SCORED = 1000  # tokens of prompts: a response that says more of them is written in a thread, in which streams of others go on


class Shape(Protocol):
    """What an endpoint's responses look like."""

    prefix: str  # of the response's id
    object: str
    chunk_object: str

    def choice(self, answer: TextDelta) -> schema.Choice:
        """A finished choice."""

    def opening(self, index: int) -> schema.Choice | None:
        """What the stream of a choice begins with."""

    def deltas(self, delta: TextDelta) -> list[schema.Choice]:
        """A piece of a choice, or some that must come after each other; only the last one may be its end."""

    def note_logprobs(self, choice: schema.Choice, tokens: Sequence[Likelihood], offset: int) -> None:
        """Say how likely the tokens of a choice, or of a piece that begins at `offset` in its text, were."""


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely the target found a token, and which ones it found likeliest."""

    text: str
    raw: bytes
    logprob: float | None  # None for the first token of a prompt
    top: tuple[Likelihood, ...] = ()
    length: int = 0  # characters that the token adds to the answer, or has in the echo of its prompt


async def answer(job: Job, serving: Serving, shape: Shape, request: Request) -> Response:
    """Run a job and respond. Whatever is refused is raised before the first byte."""
    headers = {"x-cascade-ignored": header_safe(job.ignored)} if job.ignored else {}
    generation = Generation(job, serving, request.scope["arrived_at"])
    envelope = _Envelope(job, serving, shape, generation.prompt_logprobs)
    if job.is_stream:
        await generation.__aenter__()  # here, so that a refusal has a status; the response leaves it
        events = _events(generation, envelope)
        return EventStream(events, generation, headers, serving.deployment.server.keep_alive_seconds)
    body = await unless_disconnected(request, _collect(generation, envelope))
    return Response(body, headers=headers, media_type="application/json")


class _Envelope:
    """Makes the responses and chunks of one job, all with the same head."""

    def __init__(self, job: Job, serving: Serving, shape: Shape, prompt_logprobs: Sequence[Sequence[TokenLogprobs]]):
        """`prompt_logprobs` of each prompt are complete when an answer to it begins."""
        self.job = job
        self.shape = shape
        self._prompt_logprobs = prompt_logprobs
        self._prompts: dict[int, list[Likelihood]] = {}
        self._drafter = serving.info.drafter
        self._opened: set[int] = set()
        self._token_text = serving.tokenizer.token_text
        self._offsets: dict[int, int] = defaultdict(int)  # of what comes next in each choice's text
        self._head: dict[str, Any] = {
            "id": shape.prefix + job.id,
            "created": int(time.time()),
            "model": job.model_id,
            "system_fingerprint": serving.fingerprint,
        }

    def completion(self, choices: list[schema.Choice], record: RequestRecord) -> schema.Completion:
        usage, metrics = usage_of(record), metrics_of(record, self._drafter)
        return schema.Completion(**self._head, object=self.shape.object, choices=choices, usage=usage, metrics=metrics)

    def chunks(self, delta: TextDelta) -> list[schema.Chunk]:
        """The chunks of one delivery: none as long as all of its text is held back."""
        choices = []
        if delta.index not in self._opened:
            self._opened.add(delta.index)
            choices = [opening] if (opening := self.shape.opening(delta.index)) is not None else []
            choices += self._echoed(delta.index)
        if delta.text or delta.finish_reason or delta.tokens or delta.reasoning or delta.calls:
            *first, last = self.shape.deltas(delta)
            choices += [*first, self.detailed(last, delta.index, delta.tokens, is_piece=True)]
        kind = schema.ChunkWithUsage if self.job.has_usage_chunk else schema.Chunk
        return [kind(**self._head, object=self.shape.chunk_object, choices=[choice]) for choice in choices]

    def detailed(self, choice: schema.Choice, index: int, tokens: Sequence[EmittedToken], is_piece: bool = False) -> schema.Choice:
        """With who wrote its tokens and how likely they were, as far as that was asked for."""
        if self.job.wants_provenance:
            choice.provenance = [_origin(token) for token in tokens]
        if self.job.shows_logprobs:
            # who has a prompt scored counts tokens from the end of the list: the last one is there whether or not it has a text
            shown = [token for token in tokens if self.job.scores_prompts or not token.is_hidden]
            likelihoods = [self._likelihood(token.token_id, token.logprobs, len(token.text)) for token in shown]
            if likelihoods or not is_piece:
                self._note(choice, index, [*([] if is_piece else self._of_prompt(index)), *likelihoods])
        return choice

    def _echoed(self, index: int) -> list[schema.Choice]:
        """The prompt, in front of a stream's answer."""
        echo = self.echo_of(index)
        if not echo and not self.job.scores_prompts:
            return []
        choices = self.shape.deltas(TextDelta(index, echo, None))
        if self.job.scores_prompts:
            self._note(choices[-1], index, self._of_prompt(index))
        return choices

    def echo_of(self, index: int) -> str:
        """What stands in front of an answer."""
        return self.job.echoes[self.job.prompt_of(index)].text if self.job.echoes else ""

    def _of_prompt(self, index: int) -> list[Likelihood]:
        """How likely the tokens of an answer's prompt were, if that was asked for."""
        if not self.job.scores_prompts:
            return []
        prompt = self.job.prompt_of(index)
        if prompt not in self._prompts:  # once for all answers to it
            ids, lengths = self.job.requests[prompt].prompt_ids, self.job.echoes[prompt].lengths
            tokens = zip(ids, (None, *self._prompt_logprobs[prompt]), lengths, strict=True)
            self._prompts[prompt] = [self._likelihood(*token) for token in tokens]
        return self._prompts[prompt]

    def _note(self, choice: schema.Choice, index: int, tokens: Sequence[Likelihood]) -> None:
        self.shape.note_logprobs(choice, tokens, self._offsets[index])
        self._offsets[index] += sum(token.length for token in tokens)

    def _likelihood(self, token_id: int, logprobs: TokenLogprobs | None, length: int) -> Likelihood:
        """`logprobs` is None for the first token of a prompt, in front of which nothing is."""
        if logprobs is None:
            return Likelihood(*self._token_text(token_id), None, length=length)
        top = tuple(Likelihood(*self._token_text(other), logprob) for other, logprob in logprobs.top)
        return Likelihood(*self._token_text(token_id), logprobs.logprob, top, length)

    def usage_chunk(self, record: RequestRecord) -> schema.UsageChunk:
        usage, metrics = usage_of(record), metrics_of(record, self._drafter)
        return schema.UsageChunk(**self._head, object=self.shape.chunk_object, choices=[], usage=usage, metrics=metrics)


def _origin(token: EmittedToken) -> schema.TokenOrigin:
    return schema.TokenOrigin(
        token_id=token.token_id,
        text=token.text,
        by="drafter" if token.is_drafted else "target",
        lossy=token.is_lossy,
        role=token.role,
        drafted=token.num_draft,
    )


async def _collect(generation: Generation, envelope: _Envelope) -> bytes:
    parts: list[list[TextDelta]] = [[] for _ in generation.record.choices]
    async with generation:
        async for deltas in generation:
            for delta in deltas:
                parts[delta.index].append(delta)
    num_scored = len(parts) * max(map(len, generation.prompt_logprobs))
    if num_scored > _MANY_SCORED:
        return await asyncio.to_thread(_body, parts, generation.record, envelope)
    return _body(parts, generation.record, envelope)


def _body(parts: Sequence[Sequence[TextDelta]], record: RequestRecord, envelope: _Envelope) -> bytes:
    shape, job = envelope.shape, envelope.job
    tokens = [[token for part in answer for token in part.tokens] for answer in parts]
    choices = [
        envelope.detailed(shape.choice(_whole(place, envelope.echo_of(i), parts[i])), i, tokens[i])
        for place, i in enumerate(_shown(job, tokens))
    ]
    said = envelope.completion(choices, record).model_dump()
    return json.dumps(said, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _whole(index: int, echo: str, parts: Sequence[TextDelta]) -> TextDelta:
    """All that was delivered of an answer as one piece, under its number among those that are shown."""
    return TextDelta(
        index,
        echo + "".join(part.text for part in parts),
        parts[-1].finish_reason,
        reasoning="".join(part.reasoning for part in parts),
        calls=tuple(call for part in parts for call in part.calls),
    )


def _shown(job: Job, tokens: Sequence[Sequence[EmittedToken]]) -> list[int]:
    """Which answers are shown, in their order: all, or of each prompt's the likeliest."""
    num = len(job.requests[0].choices)
    if job.num_shown == num:
        return list(range(len(tokens)))
    by_prompt = [range(begin, begin + num) for begin in range(0, len(tokens), num)]
    return [i for answers in by_prompt for i in sorted(answers, key=lambda i: -_mean_logprob(tokens[i]))[: job.num_shown]]


def _mean_logprob(tokens: Sequence[EmittedToken]) -> float:
    """Of the answer's tokens, the one that ended it included."""
    return sum(token.logprobs.logprob for token in tokens if token.logprobs is not None) / len(tokens) if tokens else -math.inf


async def _events(generation: Generation, envelope: _Envelope) -> AsyncGenerator[str, None]:
    async with aclosing(aiter(generation)) as batches:
        async for deltas in batches:
            for chunk in itertools.chain.from_iterable(map(envelope.chunks, deltas)):
                yield chunk.model_dump_json()
    if envelope.job.has_usage_chunk:
        yield envelope.usage_chunk(generation.record).model_dump_json()


# ---------------------------------------------------------------------- numbers
def usage_of(record: RequestRecord) -> schema.Usage:
    """OpenAI's usage: every prompt counts once, whatever n is; an end token counts as a token of the completion."""
    return schema.Usage(
        prompt_tokens=record.num_prompt_tokens,
        completion_tokens=record.num_completion_tokens,
        total_tokens=record.num_prompt_tokens + record.num_completion_tokens,
        prompt_tokens_details=schema.PromptTokensDetails(cached_tokens=record.num_cached_tokens),
        completion_tokens_details=_completion_details(record),
    )


def _completion_details(record: RequestRecord) -> schema.CompletionTokensDetails | None:
    """None where there is nothing to tell apart."""
    if not record.marks_reasoning and not record.has_prediction:
        return None
    details = schema.CompletionTokensDetails(reasoning_tokens=record.num_reasoning_tokens if record.marks_reasoning else None)
    if record.has_prediction:
        details.accepted_prediction_tokens = sum(choice.num_accepted_prediction_tokens for choice in record.choices)
        details.rejected_prediction_tokens = sum(choice.num_rejected_prediction_tokens for choice in record.choices)
    return details


def metrics_of(record: RequestRecord, drafter: str) -> schema.ResponseMetrics:
    """What the response says about how it was made."""
    choices = record.choices
    cascade = schema.Cascade(
        rule=record.rule,
        alpha=record.alpha if math.isfinite(record.alpha) else None,
        drafter=drafter,
        deferred_tokens=sum(choice.num_deferred_tokens for choice in choices),
        lossy_kept_tokens=sum(choice.num_lossy_kept_tokens for choice in choices),
        target_calls=sum(choice.num_target_calls for choice in choices),
        drafter_calls=sum(choice.num_drafter_calls for choice in choices),
    )
    speculative = _speculative(choices[0], record.num_spec_tokens) if len(choices) == 1 else None
    return schema.ResponseMetrics(speculative_decoding=speculative, cascade=cascade, latency=_latency(record))


def _speculative(choice: ChoiceRecord, num_spec_tokens: int) -> schema.SpeculativeDecoding | None:
    if not choice.num_draft_tokens:
        return None
    accepted = choice.num_accepted_tokens
    return schema.SpeculativeDecoding(
        mean_acceptance_length=1 + accepted / choice.num_spec_steps,
        draft_acceptance_rate=accepted / choice.num_draft_tokens,
        acceptance_histogram=choice.acceptance_histogram,
        num_spec_steps=choice.num_spec_steps,
        num_draft_tokens=choice.num_draft_tokens,
        num_accepted_draft_tokens=accepted,
        num_spec_tokens=num_spec_tokens,
    )


def _latency(record: RequestRecord) -> schema.Latency:
    first, last = record.first_at, record.last_at
    queue_ms = 1000 * max(choice.queue_seconds for choice in record.choices)
    if first is None or last is None:
        return schema.Latency(queue_ms=queue_ms, time_to_first_token_ms=None, generation_ms=None, mean_itl_ms=None, tokens_per_second=None)
    num_gaps = sum(max(0, choice.num_deliveries - 1) for choice in record.choices)
    gaps = sum(choice.last_at - choice.first_at for choice in record.choices if choice.first_at is not None and choice.last_at is not None)
    return schema.Latency(
        queue_ms=queue_ms,
        time_to_first_token_ms=1000 * (first - record.arrived_at),
        generation_ms=1000 * (last - first),
        mean_itl_ms=1000 * gaps / num_gaps if num_gaps else None,
        tokens_per_second=record.num_completion_tokens / (last - record.arrived_at) if last > record.arrived_at else None,
    )
