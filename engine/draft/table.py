"""What a model's drafter fills in within one proposal: how far each chunk has come, and the rows that drafts are drawn from."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.plan import Chunk, QKind, Rows
from engine.sampling.draws import draw
from engine.sequence import Sequence
from engine.transfer import to_device


@dataclass(eq=False, slots=True)
class Draft:
    """How far one chunk has come within a proposal."""

    chunk: Chunk
    computed: int  # the drafter's watermark, drafts included
    row: int = -1  # its row in the batch; -1 for a chunk that does not complete
    kinds: list[QKind] = field(default_factory=list)  # of the drafts
    ids: list[int] = field(default_factory=list)  # the drafts, where something goes by them: foresight, or copying
    has_row: bool = False  # the row that the next draft is drawn from is there
    is_foretold: bool = False  # what comes behind the drafts is foreseen, so that nobody needs a row for it
    is_lagging: bool = False
    is_unsure: bool = False  # nothing more is to be drafted
    num_calls: int = 0
    num_late: int = 0  # tokens that were caught up with
    predicted_mask: int = 0  # bit i: draft i comes from the request's prediction
    confidences: list[float] = field(default_factory=list)  # of its rows, if the policy reads them

    @property
    def seq(self) -> Sequence:
        return self.chunk.seq

    @property
    def num_drafted(self) -> int:
        return len(self.kinds)

    @property
    def position(self) -> int:
        """Of what comes next: so many tokens, drafts included, are in front of it."""
        return len(self.seq.tokens) + self.num_drafted

    @property
    def has_room(self) -> bool:
        return self.num_drafted < self.chunk.max_draft and not self.is_unsure

    def wants_draft(self) -> bool:
        return self.has_row and self.has_room

    def wants_row(self) -> bool:
        """Whether there is to be a row behind the drafts: for the next one, or because every position that is not foreseen needs one."""
        return not self.is_foretold and (self.has_room or self.seq.needs_q)

    def take_back(self) -> None:
        """Leave the last draft, which was foreseen, to the target."""
        self.kinds.pop()
        self.ids.pop()
        self.confidences.pop()
        self.predicted_mask &= (1 << self.num_drafted) - 1
        self.is_foretold = True


@dataclass(frozen=True, slots=True)
class _Due:
    """Rows that the next drafts are drawn from."""

    drafts: list[Draft]
    places: Tensor  # [N] in the table
    probs: Tensor  # [N, V]
    only: Tensor | None = None  # [N] the one token of each, where all are one-hot


@dataclass(slots=True)
class Table:
    """The batch that is being filled: ids and the numbers that they are drawn with [B, K + 1], rows [B, K + 1, V]."""

    drafts: list[Draft]  # those that emit
    numbers: Tensor
    ids: Tensor
    probs: Tensor
    logits: Tensor | None  # what a rule reads; None where none of the batch does
    due: _Due | None = None  # what was stored last

    @property
    def width(self) -> int:
        return self.ids.shape[1]

    def places(self, at: ListLike[tuple[int, int]]) -> Tensor:
        """Rows and columns as one index of the flattened table."""
        return to_device([row * self.width + column for row, column in at], self.ids.device, torch.long)

    def write(self, draft: Draft, start: int) -> None:
        """Enter the drafts of a row from `start` on, which are known here."""
        if draft.num_drafted > start:
            self.ids[draft.row, start : draft.num_drafted] = to_device(draft.ids[start:], self.ids.device)

    def store(self, drafts: list[Draft], rows: Rows) -> None:
        """Enter the next row of each of N drafts."""
        self.due = _Due(drafts, self.places([(d.row, d.num_drafted) for d in drafts]), rows.probs, rows.only)
        self.probs.flatten(0, 1).index_copy_(0, self.due.places, rows.probs)
        if self.logits is not None and rows.logits is not None:
            self.logits.flatten(0, 1).index_copy_(0, self.due.places, rows.logits)
        for draft in drafts:
            draft.has_row = True

    def draw(self, drafts: list[Draft]) -> Tensor:
        """Draw the next draft of each of N, [N]."""
        due = self.due
        if due is None or due.drafts != drafts:
            places = self.places([(d.row, d.num_drafted) for d in drafts])
            due = _Due(drafts, places, self.probs.flatten(0, 1).index_select(0, places))
        drawn = draw(due.probs, self.numbers.flatten().index_select(0, due.places)) if due.only is None else due.only
        self.ids.view(-1).index_copy_(0, due.places, drawn)
        return drawn
