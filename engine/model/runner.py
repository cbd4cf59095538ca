"""A plan and its drafts become one ragged pass of the target. Everything that runs on the target's device starts here."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from engine.model.attention import Segment
from engine.model.paged import PagedModel
from engine.plan import Chunk, DraftBatch, RowBatch, RowsWanted, StepPlan
from engine.transfer import to_device


@dataclass(slots=True)
class _Packing:
    """The packed row while it is put together, and what is wanted of it."""

    segments: list[Segment] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)  # 0 where a draft goes
    draft_slots: list[int] = field(default_factory=list)  # where in the row drafts go ...
    draft_from: list[tuple[int, int]] = field(default_factory=list)  # ... and which of draft_ids they are
    wanted: list[int] = field(default_factory=list)  # tokens in the row whose logits are wanted
    owners: list[tuple[Chunk, int, int]] = field(default_factory=list)  # of each wanted row: chunk, offset, row of draft_ids

    def add(self, chunk: Chunk, num_draft: int, draft_row: int) -> None:
        """Append a chunk's pending tokens and its drafts."""
        seq, base = chunk.seq, len(self.ids)
        num_tokens = chunk.num_tokens + num_draft
        if not num_tokens:
            return
        self.segments.append(Segment(seq.block_table, seq.num_computed, num_tokens))
        self.ids += seq.tokens[seq.num_computed : seq.num_computed + chunk.num_tokens]
        self.draft_slots += range(len(self.ids), len(self.ids) + num_draft)
        self.draft_from += [(draft_row, j) for j in range(num_draft)]
        self.ids += [0] * num_draft
        window = chunk.num_tokens - chunk.completes
        first = 0 if chunk.rows_wanted is RowsWanted.ALL else window
        self.wanted += range(base + first, base + num_tokens)
        # offset 0 is the row that chooses the token behind all committed ones
        behind = seq.num_computed + 1 - len(seq.tokens)
        self.owners += [(chunk, behind + i, draft_row) for i in range(first, num_tokens)]


class Passed(NamedTuple):
    """What a pass of the target gave, for R wanted rows. The states are good until the next pass."""

    logits: Tensor  # [R, V]
    rows: RowBatch
    states: Tensor  # [R, hidden], the last ones, normed: what the head read


class ModelRunner:
    """Runs the target: prompt chunks and verify windows together."""

    def __init__(self, target: PagedModel):
        self._target = target

    def forward(self, plan: StepPlan, drafts: DraftBatch) -> Passed:
        """Logits [R, V] of the wanted rows, which position each is of, and the states behind them.

        For a chunk that completes these are the rows of its verify window: behind the last pending token, and behind each draft
        (K drafts give K + 1 rows). A chunk that wants all rows has those of its other tokens in front, with offsets below 0.
        """
        device = self._target.stack.device
        packing, completing = _Packing(), 0
        for chunk in plan.chunks:
            packing.add(chunk, drafts.lengths[completing] if chunk.completes else 0, completing)
            completing += chunk.completes
        draft_ids = to_device(drafts.ids, device, torch.long)
        draft_ids = draft_ids.reshape(completing, draft_ids.shape[-1] if draft_ids.numel() else 0)
        input_ids = to_device(packing.ids, device, torch.long)
        if packing.draft_slots:
            slots, rows, columns = to_device([packing.draft_slots, *zip(*packing.draft_from, strict=True)], device)
            input_ids[slots] = draft_ids[rows, columns]
        states = self._target.states(packing.segments, input_ids, packing.wanted)
        rows = RowBatch(
            seqs=tuple(chunk.seq for chunk, _, _ in packing.owners),
            offsets=tuple(offset for _, offset, _ in packing.owners),
            draft_index=tuple(row for _, _, row in packing.owners),
            draft_ids=draft_ids,
        )
        return Passed(self._target.logits(states), rows, states)
