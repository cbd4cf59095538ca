"""OpenAI's requests to the engine's: fields are checked against each other, defaults filled in, texts tokenised.

Defaults are OpenAI's (temperature 1, top_p 1), whatever the model's generation_config.json recommends: a request must mean the same
for every model behind a name. Everything that is refused is a ClientError whose `param` names the field.
"""

from __future__ import annotations

import asyncio
import secrets
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf
from typing import TypeVar
from urllib.parse import quote

from engine.config import RuleName, SpeculationConfig
from engine.dials import DIALS
from engine.errors import ContextLengthExceeded, InvalidRequest
from engine.request import Choice, Request, SamplingParams, SpeculationParams
from server.deps import Serving
from server.detokenize import beginnings
from server.errors import UnknownModel
from server.generate import Echo, Job
from server.openai.conversation import Conversation, check_arguments, conversation_of, reading_of
from server.openai.held import Held, held_of, held_to_structure
from server.openai.schema import ChatBody, CompletionBody, GenerationBody, Speculation
from server.openai.shape import structure_of
from server.openai.unused import ignored_in
from server.text import LONG_TEXT, size_of

T = TypeVar("T")
MAX_SCORED = 2_000_000  # log-probabilities of prompts in one response; each takes a hundred bytes of it, and more until it is written


async def chat_job(body: ChatBody, serving: Serving) -> Job:
    """The job of a chat: one prompt, rendered by the model's template."""
    arrived_at = time.monotonic()
    ignored = ignored_in(body, serving)
    conversation = await _conversation(body, serving)
    prompt = await _rendered(conversation, serving)
    reading = reading_of(conversation, serving, prompt, is_eager=bool(body.stream))
    held = await held_of(structure_of(body), conversation, reading, serving)
    job = _job(body, serving, _Asked([prompt], held, await _predicted(body, serving)), ignored, arrived_at)
    return replace(job, reading=reading)


async def chat_prompt(body: ChatBody, serving: Serving) -> list[int]:
    """The prompt of a chat, for whoever wants no answer to it."""
    ignored_in(body, serving)  # what would change the prompt and cannot is refused
    return await _rendered(await _conversation(body, serving), serving)


async def text_prompt(text: str, serving: Serving, adds_special: bool) -> list[int]:
    """The prompt of a completion, for whoever wants no answer to it."""
    return await tokenised(lambda: serving.tokenizer.encode(text, serving.info.max_model_len, adds_special), len(text))


async def _conversation(body: ChatBody, serving: Serving) -> Conversation:
    _check(body, serving, num_prompts=1)
    await check_arguments(body.messages)
    return conversation_of(body, serving.dialect)


async def _rendered(conversation: Conversation, serving: Serving) -> list[int]:
    messages, turn = conversation.messages, conversation.turn
    length = sum(map(size_of, conversation.parts))
    return await tokenised(lambda: serving.tokenizer.encode_chat(messages, serving.info.max_model_len, turn), length)


async def completion_job(body: CompletionBody, serving: Serving) -> Job:
    """The job of a completion: texts and token ids as they are."""
    arrived_at = time.monotonic()
    ignored = ignored_in(body, serving)
    _check(body, serving, num_prompts=len(body.prompt))
    length = sum(len(prompt) for prompt in body.prompt)
    encode, limit = serving.tokenizer.encode, serving.info.max_model_len
    prompts = await tokenised(lambda: [encode(prompt, limit) if isinstance(prompt, str) else prompt for prompt in body.prompt], length)
    _check_scored(body, prompts)
    held = await held_to_structure(structure_of(body), serving)
    job = _job(body, serving, _Asked(prompts, held), ignored, arrived_at)
    if not body.echo:
        return job
    # ids beyond the limit are refused soon, and need no text
    echoes = [_Echoed(prompt, ids[:limit]) for prompt, ids in zip(body.prompt, prompts, strict=True)]
    work = length * (8 if job.scores_prompts else 1)  # to find tokens in their text takes longer than to read it
    return replace(job, echoes=await tokenised(lambda: tuple(echoed.echo(serving, job.scores_prompts) for echoed in echoes), work))


def _check_scored(body: CompletionBody, prompts: Sequence[Sequence[int]]) -> None:
    """Each answer is shown with the scores of its prompt. Raises InvalidRequest."""
    if not body.echo or body.logprobs is None:
        return
    num = sum(map(len, prompts)) * (body.n or 1) * (body.logprobs + 1)
    if num > MAX_SCORED:
        what = f"{num} log-probabilities of prompts were asked for (tokens of all prompts times n times logprobs + 1)"
        raise InvalidRequest(f"{what}; a response has {MAX_SCORED} at most. Ask for fewer at a time.", "logprobs")


@dataclass(frozen=True)
class _Echoed:
    """A prompt that is to stand in front of its answers."""

    prompt: str | list[int]  # as the client wrote it
    ids: list[int]

    def echo(self, serving: Serving, is_scored: bool) -> Echo:
        tokenizer = serving.tokenizer
        text = self.prompt if isinstance(self.prompt, str) else tokenizer.text_of(self.ids)
        if not is_scored or max(self.ids, default=0) >= serving.info.vocab_size:  # which is refused soon
            return Echo(text)
        begins = beginnings(text, [tokenizer.token_text(token_id)[0] for token_id in self.ids])
        return Echo(text, tuple(end - begin for begin, end in pairwise([*begins, len(text)])))


def header_safe(names: Sequence[str], limit: int = 1024) -> str:
    """Field names as one header value: whatever a client wrote, percent-encoded where need be, and cut at `limit` characters."""
    value = ",".join(quote(name, safe="._-[]", errors="replace") for name in names)
    return value if len(value) <= limit else value[: value.rindex(",", 0, limit) if "," in value[:limit] else limit] + ",..."


async def tokenised(work: Callable[[], T], length: int) -> T:
    """Tokenise here if it is quicker than a thread would take it over, in a thread if it would hold up the streams of others."""
    return await asyncio.to_thread(work) if length > LONG_TEXT else work()


def _check(body: GenerationBody, serving: Serving, num_prompts: int) -> None:
    """What is wrong whatever the texts are."""
    if body.model not in serving.deployment.model_ids:
        raise UnknownModel(body.model, tuple(serving.deployment.model_ids))
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options is only allowed when stream is true.", "stream_options")
    limit = serving.info.max_sequences + serving.deployment.server.max_queued_requests
    num_answers = num_prompts * _num_choices(body)
    if num_answers > limit:
        param = "prompt" if num_prompts > 1 else "n" if _num_choices(body) == body.n else "best_of"
        raise InvalidRequest(f"{num_answers} answers were asked for (prompts times n or best_of); this server holds {limit}.", param)
    if isinstance(body, CompletionBody):
        _check_completion(body)


def _check_completion(body: CompletionBody) -> None:
    """What excludes what. Raises InvalidRequest."""
    num = body.n or 1
    if body.best_of is not None and body.best_of < num:
        raise InvalidRequest(f"best_of is {body.best_of} and must be at least n, {num}.", "best_of")
    if body.stream and (body.best_of or num) > num:
        raise InvalidRequest("Which answers are best is known at the end: best_of above n cannot be streamed.", "best_of")


def _num_choices(body: GenerationBody) -> int:
    """Answers that are written to each prompt."""
    return (body.best_of if isinstance(body, CompletionBody) else None) or body.n or 1


@dataclass(frozen=True)
class _Asked:
    """What came of a body's texts."""

    prompts: Sequence[list[int]]
    held: Held | None = None
    predicted: tuple[int, ...] = ()


async def _predicted(body: ChatBody, serving: Serving) -> tuple[int, ...]:
    """The tokens of a prediction, as the answer would have them."""
    if body.prediction is None or not body.prediction.content:
        return ()
    text, limit = body.prediction.content, serving.info.max_model_len
    ids = await tokenised(lambda: serving.tokenizer.encode_text(text, limit), len(text))
    if len(ids) > limit:
        raise InvalidRequest(f"The prediction has {len(ids)} tokens; no answer of this model has more than {limit}.", "prediction")
    return tuple(ids)


def _job(body: GenerationBody, serving: Serving, asked: _Asked, ignored: tuple[str, ...], arrived_at: float) -> Job:
    """A client's seed is the seed of every prompt, so equal prompts get equal answers; otherwise each prompt has its own."""
    job_id = uuid.uuid4().hex
    speculation = _speculation(body, serving)
    requests = tuple(
        Request(
            id=f"{job_id}-{i}",
            prompt_ids=tuple(prompt),
            sampling=_sampling(body, serving, len(prompt)),
            speculation=speculation,
            grammar=asked.held.grammar if asked.held else None,
            prediction_ids=asked.predicted,
            choices=tuple(Choice(index) for index in range(_num_choices(body))),
            cache_salt=body.cache_salt or "",
            priority=body.priority or 0,
        )
        for i, prompt in enumerate(asked.prompts)
    )
    return Job(
        id=job_id,
        requests=requests,
        stops=tuple(body.stop or ()),
        model_id=body.model,
        preset=body.model.partition(":")[2],
        is_stream=bool(body.stream),
        has_usage_chunk=bool(body.stream_options and body.stream_options.include_usage),
        ignored=ignored,
        held_by=asked.held.params if asked.held else (),
        wants_provenance=bool(body.speculation and body.speculation.provenance),
        shows_stop=bool(body.include_stop_str_in_output),
        shows_logprobs=_num_logprobs(body) is not None,
        num_shown=body.n or 1,
        arrived_at=arrived_at,
    )


def _sampling(body: GenerationBody, serving: Serving, num_prompt_tokens: int) -> SamplingParams:
    num_logprobs = _num_logprobs(body)
    num_prompt_logprobs = num_logprobs if isinstance(body, CompletionBody) and body.echo else None
    if num_logprobs is None and _num_choices(body) > (body.n or 1):
        num_logprobs = 0  # best_of goes by them
    max_tokens = body.max_completion_tokens or body.max_tokens
    if max_tokens is None:
        max_tokens = serving.info.max_model_len - num_prompt_tokens
        if max_tokens < 1:
            raise ContextLengthExceeded(num_prompt_tokens, 1, serving.info.max_model_len)
    top_k = body.top_k or 0
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=top_k if 0 < top_k < serving.info.vocab_size else 0,
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        seed=secrets.randbits(64) if body.seed is None else body.seed,
        is_seeded=body.seed is not None,
        min_tokens=body.min_tokens or 0,
        logit_bias={int(token_id): bias for token_id, bias in (body.logit_bias or {}).items()},
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
        stop_token_ids=tuple(dict.fromkeys([*([] if body.ignore_eos else serving.info.end_token_ids), *(body.stop_token_ids or [])])),
    )


def _num_logprobs(body: GenerationBody) -> int | None:
    """How many of a position's likeliest tokens to report; None where nothing is asked for."""
    if isinstance(body, CompletionBody):
        return body.logprobs
    assert isinstance(body, ChatBody)
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest("top_logprobs is only allowed when logprobs is true.", "top_logprobs")
    return (body.top_logprobs or 0) if body.logprobs else None


def _speculation(body: GenerationBody, serving: Serving) -> SpeculationParams:
    """The deployment's settings, the preset's over them, the request's over both, within the deployment's bounds."""
    deployment = serving.deployment.speculation
    preset, own = serving.deployment.model_ids[body.model], body.speculation
    enabled, max_draft = (True, None) if preset is None else (preset.enabled, preset.max_draft)
    rule, alpha = deployment.judged_by(preset)
    if own is not None:
        enabled = enabled if own.enabled is None else own.enabled
        max_draft = max_draft if own.max_draft is None else own.max_draft
        rule, alpha = _judged_by(own, rule, alpha, deployment)
    writes = (body.max_completion_tokens or body.max_tokens) != 0  # else a drafter would follow the prompt for nothing
    return SpeculationParams(enabled=enabled and writes, rule=rule, alpha=alpha, max_draft=max_draft)


def _judged_by(own: Speculation, rule: RuleName, alpha: float, deployment: SpeculationConfig) -> tuple[RuleName, float]:
    """Rule and alpha of a request that may name its own. Raises InvalidRequest for what the deployment does not allow."""
    if own.rule is not None and own.rule != rule:
        allowed = deployment.allow_rules
        if allowed is not None and own.rule not in allowed:
            raise InvalidRequest(
                f"The rule {own.rule} is not allowed here; a request may ask for {', '.join(allowed) or 'none'}.", "speculation.rule"
            )
        rule = own.rule
        alpha = min(DIALS[rule].default, deployment.max_alpha.get(rule, inf))
    if own.alpha is not None:
        if mistake := DIALS[rule].mistake(own.alpha, deployment.max_alpha.get(rule)):
            raise InvalidRequest(f"alpha is {own.alpha:g} and {mistake} for the rule {rule}.", "speculation.alpha")
        alpha = own.alpha
    return rule, alpha
