"""The rows of all verify windows of a step, flat, and what rules read of them. Decides nothing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from engine.plan import DraftBatch, QKind, RowBatch, Rows
from engine.sampling.draws import Purpose, uniforms


@dataclass(frozen=True, eq=False)
class Window:
    """All rows of all verify windows, flat: R rows, row `starts[b] + j` being position j of sequence b."""

    drafts: DraftBatch
    p: Rows
    rows: RowBatch

    @property
    def device(self) -> torch.device:
        return self.p.probs.device

    @cached_property
    def index(self) -> list[tuple[int, int]]:
        """(b, j) of every row."""
        return [(b, j) for b, length in enumerate(self.drafts.lengths) for j in range(length + 1)]

    @cached_property
    def kinds(self) -> list[QKind]:
        return [QKind(self.drafts.kinds[b][j]) for b, j in self.index]

    @cached_property
    def is_dense(self) -> Tensor:  # [R]
        return torch.tensor([kind is QKind.DENSE for kind in self.kinds], device=self.device)

    @cached_property
    def is_draft(self) -> Tensor:  # [R] False at bonus positions
        return torch.tensor([j < self.drafts.lengths[b] for b, j in self.index], device=self.device)

    @cached_property
    def is_given(self) -> Tensor:  # [R]
        return torch.tensor([kind is QKind.GIVEN for kind in self.kinds], device=self.device)

    @cached_property
    def has_dense_bonus(self) -> bool:
        return any(self.kinds[row] is QKind.DENSE and j == self.drafts.lengths[b] for row, (b, j) in enumerate(self.index))

    @cached_property
    def owner(self) -> Tensor:  # [R] b
        return torch.tensor([b for b, _ in self.index], device=self.device)

    @cached_property
    def offsets(self) -> Tensor:  # [R] j
        return torch.tensor([j for _, j in self.index], device=self.device)

    @cached_property
    def lengths(self) -> Tensor:  # [B]
        return torch.tensor(self.drafts.lengths, device=self.device)

    @cached_property
    def starts(self) -> Tensor:  # [B]
        return self.lengths.cumsum(0) - self.lengths + torch.arange(len(self.drafts.lengths), device=self.device)

    @cached_property
    def drafted(self) -> Tensor:
        """[R] the draft of every row; 0 at bonus positions."""
        padded = torch.nn.functional.pad(self.rows.draft_ids, (0, 1))
        return padded[self.owner, self.offsets]

    @cached_property
    def alpha(self) -> Tensor:  # [R, 1]
        alphas = [[seq.request.speculation.alpha] for seq in self.rows.seqs]
        return torch.tensor(alphas, dtype=self.p.probs.dtype, device=self.device)

    @cached_property
    def _keys(self) -> Tensor:  # [R]
        return torch.tensor([seq.key for seq in self.rows.seqs], dtype=torch.long, device=self.device)

    @cached_property
    def _positions(self) -> Tensor:  # [R]
        positions = [len(seq.tokens) + offset for seq, offset in zip(self.rows.seqs, self.rows.offsets, strict=True)]
        return torch.tensor(positions, dtype=torch.long, device=self.device)

    def draft_rows(self, is_dense: bool) -> list[int]:
        """Rows of drafts that were drawn from a row q, or of those that were not."""
        return [row for row, (b, j) in enumerate(self.index) if (self.kinds[row] is QKind.DENSE) == is_dense and j < self.drafts.lengths[b]]

    def uniforms(self, purpose: Purpose, rows: list[int] | Tensor) -> Tensor:
        return uniforms(self._keys[rows], self._positions[rows], purpose)

    def padded(self, flags: Tensor) -> Tensor:
        """[R] to [B, K + 1], False behind the end of a window."""
        table = torch.zeros(len(self.drafts.lengths), max(self.drafts.lengths) + 1, dtype=flags.dtype, device=self.device)
        table[self.owner, self.offsets] = flags
        return table

    def p_at(self, rows: list[int] | Tensor, x: Tensor) -> Tensor:
        return self.p.probs[rows, x]

    def q_at(self, rows: list[int] | Tensor, x: Tensor) -> Tensor:
        """[N] q(x); rows that are not dense are one-hot at their draft."""
        one = (self.drafted[rows] == x).to(self.p.probs.dtype)
        if self.drafts.rows is None:
            return one
        dense = self.drafts.rows.probs[self.owner[rows], self.offsets[rows], x]
        return torch.where(self.is_dense[rows], dense, one)

    def q_rows(self, rows: list[int] | Tensor) -> Tensor:
        """[N, V] rows q; those that are not dense are one-hot at their draft."""
        one = None
        if self.drafts.rows is None or not {QKind.ONE_HOT, QKind.GIVEN}.isdisjoint(self.kinds):
            one = one_hot(self.drafted[rows], self.p.probs.shape[-1]).to(self.p.probs.dtype)
        if self.drafts.rows is None:
            assert one is not None
            return one
        dense = self.drafts.rows.probs[self.owner[rows], self.offsets[rows]]
        return dense if one is None else torch.where(self.is_dense[rows].unsqueeze(-1), dense, one)


class Raw:
    """RawRows of some rows of a window, computed when a rule asks."""

    def __init__(self, window: Window, rows: list[int]):
        self._window = window
        self._rows = rows

    @cached_property
    def q(self) -> Tensor:
        rows = self._window.drafts.rows
        assert rows is not None, "a rule that needs q was given rows without it"
        assert rows.logits is not None, "the drafter was not told that this rule reads q"
        return rows.logits[self._window.owner[self._rows], self._window.offsets[self._rows]].softmax(-1)

    @cached_property
    def p(self) -> Tensor:
        logits = self._window.p.logits
        assert logits is not None
        return logits[self._rows].softmax(-1)

    @cached_property
    def total_variation(self) -> Tensor:
        return (self._window.q_rows(self._rows) - self._window.p.probs[self._rows]).clamp(min=0).sum(-1, keepdim=True).clamp(max=1)

    @cached_property
    def is_greedy(self) -> Tensor:
        flags = [[self._window.rows.seqs[row].request.sampling.is_greedy] for row in self._rows]
        return torch.tensor(flags, device=self._window.device)
