"""The numbers of one request while it runs: tokens, times, and what became of the drafts. Plain data; shows them to nobody."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from engine.request import Round, TokenDelta

TokenRole = Literal["accepted", "recovered", "bonus", "plain"]
UNDRAFTED = Round(num_draft=0, num_accepted=0)
MIN_TOKENS_OF_A_SHARE = 32  # shorter answers repeat little, whatever is wrong with them


@dataclass(frozen=True)
class Objectives:
    """What a deployment promises of every answer: seconds to the first token, and per further token."""

    first_token: float
    per_token: float

    @property
    def seconds(self) -> Mapping[str, float]:
        return {"first_token": self.first_token, "per_token": self.per_token}

    def met(self, record: ChoiceRecord, has_failed: bool, arrived_at: float) -> Mapping[str, bool]:
        """Which of them an answer met, and whether all. Nothing of one that its client left before it began."""
        if has_failed:
            return dict.fromkeys((*self.seconds, "all"), False)
        if record.first_at is None:
            return {}
        per_token = record.seconds_per_token
        first = record.first_at - arrived_at <= self.first_token
        further = per_token is None or per_token <= self.per_token
        return {"first_token": first, "per_token": further, "all": first and further}


class ChoiceRecord:
    """One answer. Counts the tokens that the client received, and the rounds that these came from."""

    def __init__(self, num_spec_tokens: int) -> None:
        self.num_tokens = 0
        self.num_reasoning_tokens = 0
        self.finish_reason: str | None = None
        self.acceptance_histogram = [0] * (num_spec_tokens + 1)  # rounds by how many of their drafts were accepted
        self.num_draft_tokens = 0
        self.num_verified_tokens = 0  # drafts up to and including the first that was rejected
        self.num_deferred_tokens = 0
        self.num_lossy_kept_tokens = 0
        self.num_accepted_prediction_tokens = 0
        self.num_rejected_prediction_tokens = 0
        self.num_target_calls = 0
        self.num_drafter_calls = 0
        self.num_saved_calls = 0  # of the target: a pass brought several tokens
        self.distinct_ids: set[int] = set()
        self.num_cached_tokens = 0
        self.queue_seconds = 0.0
        self.num_deliveries = 0
        self.num_delivered_tokens = 0
        self.first_at: float | None = None
        self.last_at: float | None = None

    def delivered(self, now: float) -> tuple[int, float | None]:
        """Note a delivery to the client. Returns the number of its tokens, and the seconds since the delivery before."""
        num_tokens, self.num_delivered_tokens = self.num_tokens - self.num_delivered_tokens, self.num_tokens
        gap = now - self.last_at if self.last_at is not None else None
        self.num_deliveries += 1
        self.first_at = now if self.first_at is None else self.first_at
        self.last_at = now
        return num_tokens, gap

    def count(self, delta: TokenDelta, num_kept: int) -> Round | None:
        """Count the first `num_kept` tokens of a delta. Returns the round as far as the client received it."""
        self.num_tokens += num_kept
        self.num_saved_calls += max(0, num_kept - 1)
        self.distinct_ids.update(delta.token_ids[:num_kept])
        self.num_target_calls = delta.num_target_calls
        self.num_drafter_calls = delta.num_drafter_calls
        self.num_cached_tokens = delta.num_cached_tokens
        self.queue_seconds = delta.queue_seconds
        drafts = received_part(delta, num_kept)
        if drafts is not None:
            self._count_round(drafts)
        return drafts

    @property
    def num_spec_steps(self) -> int:
        """Rounds in which something was drafted."""
        return sum(self.acceptance_histogram)

    @property
    def num_accepted_tokens(self) -> int:
        """Drafts that stand in the answer."""
        return sum(i * count for i, count in enumerate(self.acceptance_histogram))

    @property
    def seconds_per_token(self) -> float | None:
        """Mean time of the tokens behind the first; None where there are none."""
        if self.first_at is None or self.last_at is None or self.num_tokens < 2:
            return None
        return (self.last_at - self.first_at) / (self.num_tokens - 1)

    @property
    def distinct_share(self) -> float | None:
        """Different tokens per tokens; None for an answer that is too short to tell."""
        return len(self.distinct_ids) / self.num_tokens if self.num_tokens >= MIN_TOKENS_OF_A_SHARE else None

    def _count_round(self, drafts: Round) -> None:
        missing = drafts.num_accepted + 1 - len(self.acceptance_histogram)
        self.acceptance_histogram += [0] * missing  # an engine that drafts more than it announced loses no round
        self.acceptance_histogram[drafts.num_accepted] += 1
        self.num_draft_tokens += drafts.num_draft
        self.num_verified_tokens += num_verified(drafts)
        self.num_deferred_tokens += drafts.deferred_mask.bit_count()
        self.num_lossy_kept_tokens += drafts.lossy_mask.bit_count()
        self.num_accepted_prediction_tokens += (drafts.predicted_mask & ((1 << drafts.num_accepted) - 1)).bit_count()
        if drafts.num_draft > drafts.num_accepted:  # what was drafted behind the first refusal was never judged
            self.num_rejected_prediction_tokens += drafts.predicted_mask >> drafts.num_accepted & 1


@dataclass
class RequestRecord:
    """Everything that one HTTP request asked for."""

    rule: str
    alpha: float
    num_spec_tokens: int  # at most so many drafts a round
    num_prompt_tokens: int
    num_choices: int  # answers to each prompt
    has_prediction: bool
    choices: list[ChoiceRecord]  # those of the first prompt, then those of the second, ...
    marks_reasoning: bool = False  # the model says what of its answers is thinking
    arrived_at: float = field(default_factory=time.monotonic)

    @property
    def num_completion_tokens(self) -> int:
        return sum(choice.num_tokens for choice in self.choices)

    @property
    def num_reasoning_tokens(self) -> int:
        return sum(choice.num_reasoning_tokens for choice in self.choices)

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that were not computed for this request. Siblings reuse each other's, so the one that computed most counts."""
        prompts = range(0, len(self.choices), self.num_choices)
        return sum(min(choice.num_cached_tokens for choice in self.choices[i : i + self.num_choices]) for i in prompts)

    @property
    def first_at(self) -> float | None:
        return min((c.first_at for c in self.choices if c.first_at is not None), default=None)

    @property
    def last_at(self) -> float | None:
        return max((c.last_at for c in self.choices if c.last_at is not None), default=None)


def received_part(delta: TokenDelta, num_kept: int) -> Round | None:
    """The round of a delta, cut as though no more had been drafted than the client received; None if there is nothing of it."""
    drafts = delta.round
    if drafts is None or not drafts.num_draft or not num_kept:
        return None
    if num_kept == len(delta.token_ids):
        return drafts
    mask = (1 << num_kept) - 1
    return Round(
        num_draft=min(drafts.num_draft, num_kept),
        num_accepted=min(drafts.num_accepted, num_kept),
        deferred_mask=drafts.deferred_mask & mask,
        lossy_mask=drafts.lossy_mask & mask,
        predicted_mask=drafts.predicted_mask & mask,
    )


def num_verified(drafts: Round) -> int:
    """Drafts that were judged: the accepted ones, and the first that was rejected."""
    return min(drafts.num_draft, drafts.num_accepted + 1)


def role_of(drafts: Round, i: int) -> TokenRole:
    """Of the i-th token of a round: drafts that stand come first, and one that was drawn ends it."""
    if i < drafts.num_accepted:
        return "accepted"
    if not drafts.num_draft:
        return "plain"
    return "bonus" if drafts.num_accepted == drafts.num_draft else "recovered"
