"""Drafters that know no model: none, and prompt lookup.

Their drafts have no probabilities. The Verifier then draws the token from pi and accepts the draft if it is that token, so what
is proposed changes the speed and never the text.
"""

from __future__ import annotations

from engine.plan import Chunk, DraftBatch, QKind, StepPlan, Verdict
from engine.sequence import Sequence


class NoDrafter:
    """Proposes nothing: every step emits one token a sequence."""

    def propose(self, plan: StepPlan, budget: int) -> DraftBatch:
        return batch_of(plan, [[] for _ in plan.completing])

    def observe(self, plan: StepPlan, verdict: Verdict) -> None:
        """Nothing is learnt."""

    def forget(self, seq: Sequence) -> None:
        """Nothing is remembered."""


class NGramDrafter(NoDrafter):
    """Prompt lookup: the continuation of the last n tokens where they last occurred, n from `max_n` down to `min_n`.

    Source: Saxena, "Prompt Lookup Decoding" (2023); recency first instead of first match. The index of a sequence grows by
    max_n entries a token, so a proposal costs the same at any length.
    """

    def __init__(self, max_n: int = 3, min_n: int = 1):
        self._lengths = range(max_n, min_n - 1, -1)
        self._indexes: dict[Sequence, _Index] = {}

    def propose(self, plan: StepPlan, budget: int) -> DraftBatch:
        return batch_of(plan, [self._draft(chunk) for chunk in plan.completing])

    def forget(self, seq: Sequence) -> None:
        self._indexes.pop(seq, None)

    def _draft(self, chunk: Chunk) -> list[int]:
        if not chunk.max_draft:
            return []
        index = self._indexes.setdefault(chunk.seq, _Index(self._lengths))
        index.extend(chunk.seq.tokens)
        return index.continuation(chunk.seq.tokens, chunk.max_draft)


class _Index:
    """Where each run of n tokens was last followed by another token."""

    def __init__(self, lengths: range):
        self._lengths = lengths
        self._num_indexed = 0  # positions whose token has been entered as a continuation
        self._next: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: list[int]) -> None:
        for position in range(max(1, self._num_indexed), len(tokens)):
            for n in self._lengths:
                if n <= position:
                    self._next[tuple(tokens[position - n : position])] = position
        self._num_indexed = len(tokens)

    def continuation(self, tokens: list[int], num: int) -> list[int]:
        """Up to `num` tokens. A continuation that reaches the end goes on into what it has drafted, so a period repeats."""
        for n in self._lengths:
            start = self._next.get(tuple(tokens[-n:])) if n <= len(tokens) else None
            if start is not None:
                drafts: list[int] = []
                for position in range(start, start + num):
                    drafts.append(tokens[position] if position < len(tokens) else drafts[position - len(tokens)])
                return drafts
        return []


def batch_of(plan: StepPlan, drafts: list[list[int]]) -> DraftBatch:
    """Drafts without probabilities as a DraftBatch; one list for each completing chunk."""
    longest = max(map(len, drafts), default=0)
    return DraftBatch(
        lengths=tuple(map(len, drafts)),
        ids=[[*ids, *[0] * (longest - len(ids))] for ids in drafts],
        kinds=[[*[QKind.ONE_HOT] * len(ids), *[QKind.NONE] * (longest + 1 - len(ids))] for ids in drafts],
        rows=None,
        drafter_computed=tuple(0 for _ in plan.chunks),
        lagging=tuple(False for _ in plan.chunks),
        num_calls=tuple(0 for _ in plan.chunks),
    )
