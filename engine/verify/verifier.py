"""Decides, draft by draft, whether the drafter's word stands, and draws the token that follows the accepted ones.

Words: *accepted* are the leading drafts that stand; the token behind them is *recovered* after a rejection, or the *bonus* where
all stood. The bonus is one more draft: drawn from the row q behind the last draft, then accepted or recovered like any other. So
every position of a request is made in the same way, however the steps happen to be aligned.

A position's token has the law pi = q on A + eta * p, eta = max(0, 1 - q(A)), where A is the rule's keep-set:

    DENSE           the draft x stands if u_accept * q(x) < pi(x); else y is drawn from max(0, pi - q), with the recover number
    ONE_HOT, NONE   x is drawn from pi with the recover number; a draft stands if it is x

Both have the law pi, and acceptance min(1, pi / q). Only pi(x), and one residual row a sequence, are ever computed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from engine.plan import DraftBatch, QKind, RowBatch, Rows, Rule, Verdict
from engine.sampling.draws import Purpose, draw, uniforms


class Verifier:
    """Verifies the windows of all completing chunks together, each row by its own request's rule and numbers."""

    def __init__(self, rules: Mapping[str, Rule]):
        self._rules = rules

    @torch.inference_mode()
    def verify(self, drafts: DraftBatch, p: Rows, rows: RowBatch) -> Verdict:
        """`p` and `rows` are of the verify windows, R = sum of (K_b + 1), in the order of `drafts`."""
        if not drafts.lengths:
            return Verdict((), (), (), ())
        window = _Window(drafts, p, rows)
        pi = _Mixture(window, self._keep_sets(window), keeps_any=bool(self._cascading(window)))
        accepted = self._accept(window, pi)
        num_accepted = window.padded(accepted).long().cumprod(-1).sum(-1)  # [B]
        token = self._next_token(window, pi, num_accepted)
        deferred, lossy = self._judge(window, pi, accepted, num_accepted)
        return _to_host(window, num_accepted, token, deferred, lossy)

    def _keep_sets(self, window: _Window) -> Tensor:
        """A as booleans, [R, V], or [R, 1] where every rule of the batch keeps all or nothing."""
        groups: dict[str, list[int]] = defaultdict(list)
        for row, seq in enumerate(window.rows.seqs):
            name = seq.request.speculation.rule
            kind = window.kinds[row]
            # without a row q a rule that reads it cannot judge, and without a draft there is nothing to judge: then A is empty
            if kind is QKind.DENSE or (kind is QKind.ONE_HOT and not self._rules[name].needs_q):
                groups[name].append(row)
        found = [(members, self._rules[name].keep(_Raw(window, members), window.alpha[members])) for name, members in groups.items()]
        if window.p.allowed is not None:
            found = [(members, keep & window.p.allowed[members]) for members, keep in found]
        width = max((keep.shape[-1] for _, keep in found), default=1)
        keeps = torch.zeros(len(window.kinds), width, dtype=torch.bool, device=window.device)
        for members, keep in found:
            keeps[members] = keep
        return keeps

    def _accept(self, window: _Window, pi: _Mixture) -> Tensor:
        """[R] whether the draft of each row stands; False at bonus positions."""
        accepted = torch.zeros(len(window.kinds), dtype=torch.bool, device=window.device)
        dense, blind = window.draft_rows(QKind.DENSE), window.draft_rows(QKind.ONE_HOT)
        if dense:
            x = window.drafted[dense]
            accepted[dense] = window.uniforms(Purpose.ACCEPT, dense) * window.q_at(dense, x) < pi.at(dense, x)
        if blind:
            accepted[blind] = draw(pi.full(blind), window.uniforms(Purpose.RECOVER, blind)) == window.drafted[blind]
        return accepted

    def _next_token(self, window: _Window, pi: _Mixture, num_accepted: Tensor) -> Tensor:
        """[B] the token at the first position whose draft did not stand, or at the bonus position."""
        last = window.starts + num_accepted  # [B] rows
        weights, is_dense = pi.full(last), window.is_dense[last]
        if window.drafts.rows is not None:
            weights = torch.where(is_dense.unsqueeze(-1), pi.residual(last), weights)
        token = draw(weights, window.uniforms(Purpose.RECOVER, last))
        if window.has_dense_bonus:
            x = draw(window.q_rows(last), window.uniforms(Purpose.DRAFT, last))
            stands = window.uniforms(Purpose.ACCEPT, last) * window.q_at(last, x) < pi.at(last, x)
            is_bonus = num_accepted == window.lengths
            token = torch.where(is_bonus & is_dense & stands, x, token)
        return token

    def _cascading(self, window: _Window) -> set[int]:
        """Rows whose rule may keep something."""
        return {r for r, seq in enumerate(window.rows.seqs) if not self._rules[seq.request.speculation.rule].is_lossless}

    def _judge(self, window: _Window, pi: _Mixture, accepted: Tensor, num_accepted: Tensor) -> tuple[Tensor, Tensor]:
        """[R] deferred (verified, and not in A) and lossy-kept (stands, and the same coin would have rejected it under exact)."""
        is_verified = window.is_draft & (window.offsets <= num_accepted[window.owner])
        everywhere = torch.arange(len(window.kinds), device=window.device)
        kept = pi.keep_at(everywhere, window.drafted)
        lossy = torch.zeros_like(accepted)
        cascading = self._cascading(window)
        dense = [r for r in window.draft_rows(QKind.DENSE) if r in cascading]
        blind = [r for r in window.draft_rows(QKind.ONE_HOT) if r in cascading]
        if dense:
            x = window.drafted[dense]
            lossy[dense] = window.uniforms(Purpose.ACCEPT, dense) * window.q_at(dense, x) >= window.p_at(dense, x)
        if blind:
            lossy[blind] = draw(window.p.probs[blind], window.uniforms(Purpose.RECOVER, blind)) != window.drafted[blind]
        stands = accepted & (window.offsets < num_accepted[window.owner])
        return is_verified & ~kept, stands & lossy


@dataclass(frozen=True, eq=False)
class _Window:
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

    def draft_rows(self, kind: QKind) -> list[int]:
        """Rows of drafts of one kind."""
        return [row for row, (b, j) in enumerate(self.index) if self.kinds[row] is kind and j < self.drafts.lengths[b]]

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
        if self.drafts.rows is None or QKind.ONE_HOT in self.kinds:
            one = one_hot(self.drafted[rows], self.p.probs.shape[-1]).to(self.p.probs.dtype)
        if self.drafts.rows is None:
            assert one is not None
            return one
        dense = self.drafts.rows.probs[self.owner[rows], self.offsets[rows]]
        return dense if one is None else torch.where(self.is_dense[rows].unsqueeze(-1), dense, one)


class _Raw:
    """RawRows of some rows of a window, computed when a rule asks."""

    def __init__(self, window: _Window, rows: list[int]):
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


class _Mixture:
    """pi = q on A + eta * p, of any row of a window, without ever holding all of them."""

    def __init__(self, window: _Window, keeps: Tensor, keeps_any: bool):
        self._window = window
        self._keeps = keeps  # [R, V] or [R, 1]
        self._keeps_any = keeps_any  # False: known without asking the device that every A is empty

    @cached_property
    def _eta(self) -> Tensor:  # [R]
        if self._keeps.shape[-1] == 1:  # all or nothing: q(A) is 1 or 0, and no row needs to be read
            return (~self._keeps[:, 0]).to(self._window.p.probs.dtype)
        everywhere = torch.arange(self._keeps.shape[0], device=self._keeps.device)
        mass = (self._window.q_rows(everywhere) * self._keeps).sum(-1)
        return (1 - mass).clamp(min=0)  # 1 - 1 can come out as -1e-16, which would reject a token that is in A

    def keep_at(self, rows: list[int] | Tensor, x: Tensor) -> Tensor:
        """[N] whether x is in A."""
        keeps = self._keeps[rows]
        return keeps[:, 0] if keeps.shape[-1] == 1 else keeps.gather(-1, x.unsqueeze(-1)).squeeze(-1)

    def at(self, rows: list[int] | Tensor, x: Tensor) -> Tensor:
        """[N] pi(x)."""
        return self._window.q_at(rows, x) * self.keep_at(rows, x) + self._eta[rows] * self._window.p_at(rows, x)

    def full(self, rows: list[int] | Tensor) -> Tensor:
        """[N, V] pi."""
        p = self._window.p.probs[rows]
        if not self._keeps_any:
            return p
        return self._eta[rows].unsqueeze(-1) * p + self._window.q_rows(rows) * self._keeps[rows]

    def residual(self, rows: Tensor) -> Tensor:
        """[N, V] max(0, pi - q), or pi where that is zero everywhere: pi equals q up to rounding."""
        new = self._eta[rows].unsqueeze(-1) * self._window.p.probs[rows]
        residual = (new - self._window.q_rows(rows) * ~self._keeps[rows]).clamp(min=0)
        return torch.where(residual.sum(-1, keepdim=True) > 0, residual, self.full(rows))


def _to_host(window: _Window, num_accepted: Tensor, token: Tensor, deferred: Tensor, lossy: Tensor) -> Verdict:
    """Everything the scheduler needs, in one transfer."""
    bits = 1 << torch.arange(max(window.drafts.lengths) + 1, device=window.device)
    masks = [(window.padded(flags) * bits).sum(-1) for flags in (deferred, lossy)]
    packed = torch.column_stack([num_accepted, token, *masks, window.rows.draft_ids]).tolist()
    return Verdict(
        token_ids=tuple((*ids[:num], next_token) for num, next_token, _, _, *ids in packed),
        num_accepted=tuple(num for num, *_ in packed),
        deferred_masks=tuple(mask for _, _, mask, *_ in packed),
        lossy_masks=tuple(mask for _, _, _, mask, *_ in packed),
    )
