"""Decides, draft by draft, whether the drafter's word stands, and draws the token that follows the accepted ones.

Words: *accepted* are the leading drafts that stand; the token behind them is *recovered* after a rejection, or the *bonus* where
all stood. The bonus is one more draft: drawn from the row q behind the last draft, then accepted or recovered like any other. So
every position of a request is made in the same way, however the steps happen to be aligned.

A position's token has the law pi = q on A + eta * p, eta = max(0, 1 - q(A)), where A is the rule's keep-set:

    DENSE           the draft x stands if u_accept * q(x) < pi(x); else y is drawn from max(0, pi - q), with the recover number
    others          x is drawn from pi with the recover number; a draft stands if it is x

Both have the law pi, and acceptance min(1, pi / q). Only pi(x), and one residual row a sequence, are ever computed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from engine.plan import DraftBatch, RowBatch, Rows, Rule, Verdict
from engine.sampling.draws import Purpose, draw
from engine.transfer import to_device
from engine.verify.mixture import Mixture
from engine.verify.window import Window


class Verifier:
    """Verifies the windows of all completing chunks together, each row by its own request's rule and numbers."""

    numbers_are_by_round = False  # a drafter must draw with the same

    def __init__(self, rules: Mapping[str, Rule]):
        self._rules = rules

    @torch.inference_mode()
    def verify(self, drafts: DraftBatch, p: Rows, rows: RowBatch) -> Verdict:
        """`p` and `rows` are of the verify windows, R = sum of (K_b + 1), in the order of `drafts`."""
        if not drafts.lengths:
            return Verdict((), (), (), (), ())
        window = Window(drafts, p, rows, self.numbers_are_by_round)
        pi = Mixture(window, self._rules)
        num_accepted, token, is_drafted = self._decide(window, pi)
        deferred, lossy = self._judge(window, pi, num_accepted)
        return _to_host(window, num_accepted, token, is_drafted, deferred, lossy)

    def _decide(self, window: Window, pi: Mixture) -> tuple[Tensor, Tensor, Tensor]:
        """[B] how many drafts stand, the token behind them, and whether that is the drafter's."""
        accepted = self._accept(window, pi)
        num_accepted = window.padded(accepted).long().cumprod(-1).sum(-1)
        return num_accepted, *self._next_token(window, pi, num_accepted)

    def _accept(self, window: Window, pi: Mixture) -> Tensor:
        """[R] whether the draft of each row stands; False at bonus positions."""
        accepted = torch.zeros(len(window.kinds), dtype=torch.bool, device=window.device)
        if rows := window.draft_rows(is_dense=True):
            dense = to_device(rows, window.device)
            x = window.drafted[dense]
            accepted[dense] = window.uniforms(Purpose.ACCEPT, dense) * window.q_at(dense, x) < pi.at(dense, x)
        if rows := window.draft_rows(is_dense=False):
            blind = to_device(rows, window.device)
            accepted[blind] = draw(pi.full(blind), window.uniforms(Purpose.RECOVER, blind)) == window.drafted[blind]
        return accepted

    def _next_token(self, window: Window, pi: Mixture, num_accepted: Tensor) -> tuple[Tensor, Tensor]:
        """[B] the token at the first position whose draft did not stand, or at the bonus position; and whether the drafter wrote it."""
        last = window.starts + num_accepted  # [B] rows
        weights, is_dense = pi.full(last), window.is_dense[last]
        if window.drafts.rows is not None:
            weights = torch.where(is_dense.unsqueeze(-1), pi.residual(last), weights)
        token, is_drafted = draw(weights, window.uniforms(Purpose.RECOVER, last)), torch.zeros_like(is_dense)
        if window.has_dense_bonus:
            x = draw(window.q_rows(last), window.uniforms(Purpose.DRAFT, last))
            stands = window.uniforms(Purpose.ACCEPT, last) * window.q_at(last, x) < pi.at(last, x)
            is_drafted = stands & is_dense & (num_accepted == window.lengths)
            token = torch.where(is_drafted, x, token)
        return token, is_drafted

    def _judge(self, window: Window, pi: Mixture, num_accepted: Tensor) -> tuple[Tensor, Tensor]:
        """[R] deferred (verified, the drafter's own, not in A) and lossy-kept (stands, where the same coin rejects it under exact)."""
        stands = window.offsets < num_accepted[window.owner]
        is_verified = window.is_draft & (window.offsets <= num_accepted[window.owner])
        kept = pi.keep_at(window.everywhere, window.drafted)
        return is_verified & ~kept & ~window.is_given, stands & self._falls(window, pi)

    def _falls(self, window: Window, pi: Mixture) -> Tensor:
        """[R] whether the same coin rejects a draft under exact; False where no cascade judges it."""
        falls = torch.zeros_like(window.is_draft)
        if rows := [r for r in window.draft_rows(is_dense=True) if r in pi.cascading]:
            dense = to_device(rows, window.device)
            x = window.drafted[dense]
            falls[dense] = window.uniforms(Purpose.ACCEPT, dense) * window.q_at(dense, x) >= window.p_at(dense, x)
        if rows := [r for r in window.draft_rows(is_dense=False) if r in pi.cascading]:
            blind = to_device(rows, window.device)
            falls[blind] = draw(window.p.probs[blind], window.uniforms(Purpose.RECOVER, blind)) != window.drafted[blind]
        return falls


def _to_host(window: Window, num_accepted: Tensor, token: Tensor, is_drafted: Tensor, deferred: Tensor, lossy: Tensor) -> Verdict:
    """Everything the scheduler needs, in one transfer."""
    bits = 1 << torch.arange(max(window.drafts.lengths) + 1, device=window.device)
    masks = [(window.padded(flags) * bits).sum(-1) for flags in (deferred, lossy)]
    packed = torch.column_stack([num_accepted, token, is_drafted, *masks, window.rows.draft_ids]).tolist()
    return Verdict(
        token_ids=tuple((*ids[:num], next_token) for num, next_token, _, _, _, *ids in packed),
        num_accepted=tuple(num for num, *_ in packed),
        deferred_masks=tuple(mask for _, _, _, mask, *_ in packed),
        lossy_masks=tuple(mask for _, _, _, _, mask, *_ in packed),
        bonus_is_drafted=tuple(bool(flag) for _, _, flag, *_ in packed),
    )
