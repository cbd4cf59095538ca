"""A Sequence is one running answer. It belongs to the Scheduler, which alone changes it; everybody else reads."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

from engine.request import Choice, Request


@dataclass(eq=False, slots=True, weakref_slot=True)
class Sequence:
    """Committed tokens of one choice and where its KV stands. A draft is never stored here.

    Between steps of a decoding sequence `num_computed` is `len(tokens) - 1`: the newest token has been emitted, its KV not yet
    written. The drafter's watermark may lag behind and never exceeds the target's.
    """

    request: Request
    choice: Choice
    key: int = field(init=False)  # names this choice's random numbers, see sampling/draws.py
    tokens: list[int] = field(init=False)  # prompt and emitted tokens
    num_computed: int = 0  # leading tokens whose KV is valid in the target's cache
    drafter_computed: int = 0  # the same for the drafter's
    num_scored: int = field(init=False)  # leading prompt tokens whose log-probabilities were told, or are not wanted of this choice
    block_table: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)  # content keys of the leading full blocks, grown as needed
    num_published: int = 0  # leading blocks that were offered for prefix reuse
    num_drafter_marked: int = 0  # of these, blocks marked as valid for the drafter, too
    num_cached: int | None = None  # prompt tokens found in published blocks at first admission
    queue_seconds: float = 0.0
    num_target_calls: int = 0
    num_drafter_calls: int = 0

    def __post_init__(self) -> None:
        self.tokens = [*self.request.prompt_ids, *self.choice.output_ids]
        self.key = choice_key(self.request.sampling.seed, self.choice.index)
        scores = self.request.sampling.num_prompt_logprobs is not None and self.choice.index == self.request.choices[0].index
        self.num_scored = 1 if scores else len(self.request.prompt_ids)  # nothing is in front of the first token

    @property
    def is_scoring(self) -> bool:
        """Whether log-probabilities of its prompt are still to be told."""
        return self.num_scored < len(self.request.prompt_ids)

    @property
    def num_reusable(self) -> int:
        """Leading tokens whose KV may be found instead of being computed. At least one row must be computed, and so must every row that
        chooses a prompt token of which a log-probability is wanted.

        So a prompt that is to be scored runs from its beginning, whatever is cached: KV says nothing of logits, and scores that were kept
        for whoever asks again would cost memory that is better spent on KV. After a preemption it goes on where it had come to.
        """
        return (self.num_scored if self.is_scoring else len(self.tokens)) - 1

    @property
    def num_pending(self) -> int:
        """Committed tokens that the target has yet to run."""
        return len(self.tokens) - self.num_computed

    @property
    def num_remaining(self) -> int:
        """Tokens that may still be emitted."""
        return self.request.sampling.max_tokens - (len(self.tokens) - len(self.request.prompt_ids))

    @property
    def needs_q(self) -> bool:
        """Whether every position must have a drafter's row (where the drafter can give one at all).

        True for sampled requests with a seed and for every rule but exact: their text may not depend on how many drafts the load
        allowed. An exact request has the same law with and without the row, and the same text where it is greedy.
        """
        speculation, sampling = self.request.speculation, self.request.sampling
        return speculation.enabled and (speculation.rule != "exact" or (sampling.is_seeded and not sampling.is_greedy))


def choice_key(seed: int, index: int) -> int:
    """64 bits, signed, that stand for (seed, choice index) in every random number of this choice."""
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
