"""A plan and its drafts become one ragged pass of the target. Everything that runs on the target's device starts here."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.model.attention import Segment
from engine.model.paged import PagedModel
from engine.plan import DraftBatch, RowBatch, RowsWanted, StepPlan


class ModelRunner:
    """Runs the target: prompt chunks and verify windows together."""

    def __init__(self, target: PagedModel):
        self._target = target

    def forward(self, plan: StepPlan, drafts: DraftBatch) -> tuple[Tensor, RowBatch]:
        """Logits [R, V] of the wanted rows, and which position each is of.

        For a chunk that completes these are the rows of its verify window: behind the last pending token, and behind each draft
        (K drafts give K + 1 rows). A chunk that wants all rows has those of its other tokens in front, with offsets below 0.
        """
        device = self._target.stack.device
        draft_ids = torch.as_tensor(drafts.ids, dtype=torch.long, device=device).reshape(len(drafts.lengths), -1)
        segments: list[Segment] = []
        ids: list[int] = []
        wanted: list[int] = []
        draft_slots: list[int] = []  # where in the packed row drafts go ...
        draft_from: list[tuple[int, int]] = []  # ... and which they are
        layout: list[tuple[int, int, int]] = []  # chunk, offset, row of draft_ids
        completing = 0
        for index, chunk in enumerate(plan.chunks):
            num_draft = drafts.lengths[completing] if chunk.completes else 0
            start, base = chunk.seq.num_computed, len(ids)
            num_tokens = chunk.num_tokens + num_draft
            if num_tokens:
                segments.append(Segment(chunk.seq.block_table, start, num_tokens))
            ids.extend(chunk.seq.tokens[start : start + chunk.num_tokens])
            draft_slots.extend(range(len(ids), len(ids) + num_draft))
            draft_from.extend((completing, j) for j in range(num_draft))
            ids.extend([0] * num_draft)
            window = chunk.num_tokens - 1 if chunk.completes else chunk.num_tokens
            first = 0 if chunk.rows_wanted is RowsWanted.ALL else window
            wanted.extend(range(base + first, base + num_tokens))
            # offset 0 is the row that chooses the token behind all committed ones
            behind = start + 1 - len(chunk.seq.tokens)
            layout.extend((index, behind + i, completing) for i in range(first, num_tokens))
            completing += chunk.completes
        input_ids = torch.tensor(ids, dtype=torch.long, device=device)
        if draft_slots:
            rows, columns = zip(*draft_from, strict=True)
            input_ids[draft_slots] = draft_ids[list(rows), list(columns)]
        logits = self._target.forward(segments, input_ids, wanted)
        return logits, RowBatch(
            seqs=tuple(plan.chunks[chunk].seq for chunk, _, _ in layout),
            offsets=tuple(offset for _, offset, _ in layout),
            draft_index=tuple(row for _, _, row in layout),
            draft_ids=draft_ids,
        )
