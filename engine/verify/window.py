"""The rows of all verify windows of a step, flat, and what rules read of them. Decides nothing."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from engine.plan import DraftBatch, QKind, RowBatch, Rows
from engine.request import SamplingParams
from engine.sampling.draws import Purpose, keys_of_round, uniforms
from engine.transfer import to_device


@dataclass(frozen=True, eq=False)
class Window:
    """All rows of all verify windows, flat: R rows, row `starts[b] + j` being position j of sequence b."""

    drafts: DraftBatch
    p: Rows
    rows: RowBatch
    is_by_round: bool = False  # whether numbers are the round's own

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
    def _known(self) -> Tensor:
        """[6, R] what the host knows of every row, in one transfer: owner, offset, kind, whether it has a draft, key, position."""
        owners, offsets = zip(*self.index, strict=True)
        seqs = self.rows.seqs
        positions = [len(seq.tokens) + offset for seq, offset in zip(seqs, self.rows.offsets, strict=True)]
        has_draft = [j < self.drafts.lengths[b] for b, j in self.index]
        known = [owners, offsets, self.kinds, has_draft, [seq.key for seq in seqs], positions]
        return to_device(known, self.device, torch.long)

    @property
    def owner(self) -> Tensor:  # [R] b
        return self._known[0]

    @property
    def offsets(self) -> Tensor:  # [R] j
        return self._known[1]

    @cached_property
    def is_dense(self) -> Tensor:  # [R]
        return self._known[2] == QKind.DENSE

    @cached_property
    def is_given(self) -> Tensor:  # [R]
        return self._known[2] == QKind.GIVEN

    @cached_property
    def is_draft(self) -> Tensor:  # [R] False at bonus positions
        return self._known[3] > 0

    @cached_property
    def everywhere(self) -> Tensor:  # [R] 0, 1, 2 ...
        return torch.arange(len(self.kinds), device=self.device)

    @cached_property
    def has_dense_bonus(self) -> bool:
        return any(self.kinds[row] is QKind.DENSE and j == self.drafts.lengths[b] for row, (b, j) in enumerate(self.index))

    @cached_property
    def lengths(self) -> Tensor:  # [B]
        return to_device(self.drafts.lengths, self.device)

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
        return to_device(alphas, self.device, self.p.probs.dtype)

    def draft_rows(self, is_dense: bool) -> list[int]:
        """Rows of drafts that were drawn from a row q, or of those that were not."""
        return [row for row, (b, j) in enumerate(self.index) if (self.kinds[row] is QKind.DENSE) == is_dense and j < self.drafts.lengths[b]]

    def uniforms(self, purpose: Purpose, rows: Tensor) -> Tensor:
        keys, positions = self._known[4][rows], self._known[5][rows]
        return uniforms(keys_of_round(keys, positions - self.offsets[rows]) if self.is_by_round else keys, positions, purpose)

    def padded(self, flags: Tensor) -> Tensor:
        """[R] to [B, K + 1], False behind the end of a window."""
        table = torch.zeros(len(self.drafts.lengths), max(self.drafts.lengths) + 1, dtype=flags.dtype, device=self.device)
        table[self.owner, self.offsets] = flags
        return table

    def p_at(self, rows: Tensor, x: Tensor) -> Tensor:
        return self.p.probs[rows, x]

    def q_at(self, rows: Tensor, x: Tensor) -> Tensor:
        """[N] q(x); rows that are not dense are one-hot at their draft."""
        one = (self.drafted[rows] == x).to(self.p.probs.dtype)
        if self.drafts.rows is None:
            return one
        dense = self.drafts.rows.probs[self.owner[rows], self.offsets[rows], x]
        return torch.where(self.is_dense[rows], dense, one)

    def q_rows(self, rows: Tensor) -> Tensor:
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

    def __init__(self, window: Window, rows: Tensor, params: ListLike[SamplingParams]):
        """`params` are those of the `rows` [N], whose indices live on the device."""
        self._window = window
        self._rows = rows
        self._params = params

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
        return to_device([[sampling.is_greedy] for sampling in self._params], self._window.device)
