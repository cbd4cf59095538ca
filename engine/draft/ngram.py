"""Drafters that know no model: none, and prompt lookup.

Their drafts have no probabilities. The Verifier then draws the token from pi and accepts the draft if it is that token, so what
is proposed changes the speed and never the text.
"""

from __future__ import annotations

from engine.draft.lookup import SuffixIndex
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
        self._indexes: dict[Sequence, SuffixIndex] = {}

    def propose(self, plan: StepPlan, budget: int) -> DraftBatch:
        return batch_of(plan, [self._draft(chunk) for chunk in plan.completing])

    def forget(self, seq: Sequence) -> None:
        self._indexes.pop(seq, None)

    def _draft(self, chunk: Chunk) -> list[int]:
        if not chunk.max_draft:
            return []
        tokens, drafts = chunk.seq.tokens, list[int]()
        index = self._indexes.setdefault(chunk.seq, SuffixIndex(self._lengths))
        index.extend(tokens)
        if (start := index.follower(tokens)) is not None:
            # a continuation that reaches the end goes on into what it has drafted, so a period repeats
            for position in range(start, start + chunk.max_draft):
                drafts.append(tokens[position] if position < len(tokens) else drafts[position - len(tokens)])
        return drafts


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
