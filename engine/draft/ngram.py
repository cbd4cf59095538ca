"""Drafters that know no model: none, and prompt lookup.

Their drafts have no probabilities. The Verifier then draws the token from pi and accepts the draft if it is that token, so what
is proposed changes the speed and never the text.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.draft.foresight import NoForesight
from engine.draft.lookup import SuffixIndex
from engine.plan import Chunk, DraftBatch, Foreseen, Foresight, QKind, StepPlan, Verdict
from engine.sequence import Sequence

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class Window:
    """Drafts without probabilities for one chunk."""

    ids: list[int] = field(default_factory=list)
    kinds: list[QKind] = field(default_factory=list)
    confidences: list[float] = field(default_factory=list)
    predicted_mask: int = 0  # bit i: draft i comes from the request's prediction

    def add(self, token_id: int) -> None:
        """The drafter's own word."""
        self.ids.append(token_id)
        self.kinds.append(QKind.ONE_HOT)
        self.confidences.append(1.0)

    def add_foreseen(self, foreseen: Foreseen) -> None:
        """What the text foretells."""
        self.predicted_mask |= foreseen.is_predicted << len(self.ids)
        self.ids.append(foreseen.token_id)
        self.kinds.append(QKind.GIVEN)
        self.confidences.append(foreseen.confidence)


class NoDrafter:
    """Proposes nothing: every step emits one token a sequence."""

    reads_states = False

    def propose(self, plan: StepPlan, budget: int) -> DraftBatch:
        return batch_of(plan, [Window() for _ in plan.completing])

    def observe(self, plan: StepPlan, verdict: Verdict, states: Tensor | None) -> None:
        """Nothing is learnt."""

    def forget(self, seq: Sequence) -> None:
        """Nothing is remembered."""


class NGramDrafter(NoDrafter):
    """Prompt lookup: the continuation of the last n tokens where they last occurred, n from `max_n` down to `min_n`.

    Source: Saxena, "Prompt Lookup Decoding" (2023); recency first instead of first match. The index of a sequence grows by
    max_n entries a token, so a proposal costs the same at any length.
    """

    def __init__(self, max_n: int = 3, min_n: int = 1, foresight: Foresight | None = None):
        self._lengths = range(max_n, min_n - 1, -1)
        self._indexes: dict[Sequence, SuffixIndex] = {}
        self._foresight = foresight or NoForesight()

    def propose(self, plan: StepPlan, budget: int) -> DraftBatch:
        return batch_of(plan, [self._draft(chunk) for chunk in plan.completing])

    def forget(self, seq: Sequence) -> None:
        self._indexes.pop(seq, None)
        self._foresight.forget(seq)

    def _draft(self, chunk: Chunk) -> Window:
        window = Window()
        if not chunk.max_draft:
            return window
        tokens, place = chunk.seq.tokens, None
        index = self._indexes.setdefault(chunk.seq, SuffixIndex(self._lengths))
        index.extend(tokens)
        while len(window.ids) < chunk.max_draft:
            if (foreseen := self._foresight.next(chunk.seq, window.ids)) is not None:
                window.add_foreseen(foreseen)
                place = None
                continue
            # a continuation that reaches the end goes on into what it has drafted, so a period repeats
            place = index.follower(tokens, window.ids) if place is None else place + 1
            if place is None:
                break
            window.add(tokens[place] if place < len(tokens) else window.ids[place - len(tokens)])
        return window


def batch_of(plan: StepPlan, windows: list[Window]) -> DraftBatch:
    """Drafts without probabilities as a DraftBatch; one window for each completing chunk."""
    longest = max((len(window.ids) for window in windows), default=0)
    return DraftBatch(
        lengths=tuple(len(window.ids) for window in windows),
        ids=[[*window.ids, *[0] * (longest - len(window.ids))] for window in windows],
        kinds=[[*window.kinds, *[QKind.NONE] * (longest + 1 - len(window.kinds))] for window in windows],
        rows=None,
        drafter_computed=tuple(0 for _ in plan.chunks),
        lagging=tuple(False for _ in plan.chunks),
        num_calls=tuple(0 for _ in plan.chunks),
        confidences=tuple(tuple(window.confidences) for window in windows),
        predicted_masks=tuple(window.predicted_mask for window in windows),
    )
