"""What is refused before it is queued, and why. Knows the limits of the engine, not its state."""

from __future__ import annotations

import math
from collections.abc import Iterable

from engine.dials import DIALS
from engine.errors import ContextLengthExceeded, InvalidRequest, QueueFull
from engine.request import Request, SamplingParams, SpeculationParams
from engine.stats import EngineInfo

MAX_PRIORITY = 2**31 - 1
MAX_LOGPROBS = 20  # of a position's likeliest tokens, as in OpenAI's chat


class Admission:
    """Checks a request against what is served. A request that passes can always be run to its end."""

    RETRY_AFTER = 1  # seconds that a refused client is asked to wait

    def __init__(self, info: EngineInfo, max_queued: int):
        self._info = info
        self._max_queued = max_queued

    def check(self, request: Request, num_open: int) -> None:
        """Raise ClientError if the request can never be served, QueueFull if not now. `num_open` answers are in the engine."""
        self._check_servable(request)
        num_waiting = num_open - self._info.max_sequences
        if num_open + len(request.choices) > self._info.max_sequences + self._max_queued:
            raise QueueFull(max(0, num_waiting), self.RETRY_AFTER)

    def _check_servable(self, request: Request) -> None:
        info, sampling = self._info, request.sampling
        if not request.prompt_ids:
            raise InvalidRequest("The prompt has no tokens; at least one is needed.", "prompt")
        self._check_sampling(sampling)
        if request.grammar is not None:
            self._check_grammar(sampling)
        self._check_ids(request.prediction_ids, "prediction")
        if len(request.prediction_ids) > info.max_model_len:
            raise InvalidRequest(
                f"The prediction has {len(request.prediction_ids)} tokens; no answer of this model has more than {info.max_model_len}.",
                "prediction",
            )
        if any(token < 0 for token in sampling.stop_token_ids):
            raise InvalidRequest("A token id is at least 0.", "stop_token_ids")
        if sampling.min_tokens and len({token for token in sampling.stop_token_ids if token < info.vocab_size}) == info.vocab_size:
            raise InvalidRequest("min_tokens forbids stop tokens at first, and every token is one.", "min_tokens")
        if not -MAX_PRIORITY - 1 <= request.priority <= MAX_PRIORITY:
            raise InvalidRequest(f"priority is {request.priority} and must have 32 bits.", "priority")
        if len(request.prompt_ids) + sampling.max_tokens > info.max_model_len:
            raise ContextLengthExceeded(len(request.prompt_ids), sampling.max_tokens, info.max_model_len)
        self._check_ids(request.prompt_ids, "prompt")
        self._check_ids(sampling.logit_bias, "logit_bias")
        if not request.choices or len({choice.index for choice in request.choices}) < len(request.choices):
            raise InvalidRequest("A request needs at least one choice, and every choice an index of its own.", "choices")
        if any(len(choice.output_ids) >= max(1, sampling.max_tokens) for choice in request.choices):
            raise InvalidRequest("A choice has already emitted max_tokens tokens; nothing is left to do.", "choices")
        self._check_speculation(request.speculation)
        if len(request.choices) > info.max_sequences + self._max_queued:
            raise InvalidRequest(
                f"n is {len(request.choices)} and must be at most {info.max_sequences + self._max_queued}, what this server can hold.", "n"
            )

    def _check_grammar(self, sampling: SamplingParams) -> None:
        """A grammar decides where an answer ends, so nothing else may."""
        if not self._info.has_grammars:
            raise InvalidRequest("This model's answers cannot be held to a grammar: it has no tokenizer.json or no end token.", "grammar")
        if sampling.min_tokens:
            raise InvalidRequest("min_tokens cannot be had with a grammar, which decides where an answer may end.", "min_tokens")
        if missing := set(self._info.end_token_ids) - set(sampling.stop_token_ids):
            raise InvalidRequest(
                f"A grammar's answer ends with an end token of the model, so stop_token_ids must hold {sorted(missing)}.", "ignore_eos"
            )

    def _check_ids(self, ids: Iterable[int], param: str) -> None:
        size = self._info.vocab_size
        if (wrong := next((t for t in ids if not 0 <= t < size), None)) is not None:
            raise InvalidRequest(f"Token id {wrong} is outside the vocabulary of {size} tokens.", param)

    def _check_speculation(self, speculation: SpeculationParams) -> None:
        rule, have = speculation.rule, f"this deployment has {', '.join(self._info.rules)}."
        if rule not in self._info.rules:
            if rule in DIALS:
                message = f"The rule {rule} reads the drafter's probabilities, and this drafter has none; {have}"
                raise InvalidRequest(message, "speculation.rule")
            raise InvalidRequest(f"Unknown rule {rule!r}; {have}", "speculation.rule")
        if rule in DIALS and (mistake := DIALS[rule].mistake(speculation.alpha)):
            raise InvalidRequest(f"alpha is {speculation.alpha:g} and {mistake} for the rule {rule}.", "speculation.alpha")

    @staticmethod
    def _check_sampling(sampling: SamplingParams) -> None:
        nums = {name: getattr(sampling, name) for name in ("num_logprobs", "num_prompt_logprobs")}
        bounds = (
            ("max_tokens", sampling.max_tokens >= 0, "at least 0"),
            ("temperature", 0 <= sampling.temperature < math.inf, "finite and at least 0"),
            ("top_p", 0 < sampling.top_p <= 1, "above 0 and at most 1"),
            ("top_k", sampling.top_k >= 0, "at least 0"),
            ("min_p", 0 <= sampling.min_p <= 1, "between 0 and 1"),
            ("min_tokens", 0 <= sampling.min_tokens <= sampling.max_tokens, f"between 0 and max_tokens, {sampling.max_tokens}"),
            *((name, num is None or 0 <= num <= MAX_LOGPROBS, f"between 0 and {MAX_LOGPROBS}") for name, num in nums.items()),
            ("repetition_penalty", 0.01 <= sampling.repetition_penalty <= 100, "between 0.01 and 100"),
            ("frequency_penalty", math.isfinite(sampling.frequency_penalty), "finite"),
            ("presence_penalty", math.isfinite(sampling.presence_penalty), "finite"),
            ("logit_bias", all(map(math.isfinite, sampling.logit_bias.values())), "finite"),
        )
        for name, holds, bound in bounds:
            if not holds:
                raise InvalidRequest(f"{name} is {getattr(sampling, name)} and must be {bound}.", name)
