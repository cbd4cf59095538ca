"""Block verification: accepts drafts together instead of one by one. The same law, and never fewer tokens in expectation.

A draft that is less likely under pi than under q may still stand when those in front of it were more likely. All coins are looked at,
the longest prefix that passes stands, and what follows is drawn from what its drafts did not use up. It needs every row of pi where
token verification needs one a sequence, and how a position is decided depends on where it stands in its window: so the text of a seed is
not the same at every draft length, only its law is.

Numbers are each round's own. That a draft did not stand says something of all coins behind it, and of the drafts: used again at the same
positions they would no longer be uniform, and the next round would follow another law.

Source: Sun, Mendlovic, Leviathan, Aharoni, Ro, Beirami and Suresh, "Block Verification Accelerates Speculative Decoding" (2025),
https://arxiv.org/abs/2403.10444, with pi_i = T(q_i, p_i) of a cascade in place of p_i: pi depends on the prefix alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.sampling.draws import Purpose, draw
from engine.verify.mixture import Mixture
from engine.verify.verifier import Verifier
from engine.verify.window import Window


class BlockVerifier(Verifier):
    """Verifies each window as a whole. i counts drafts that stand, b_i is what is left of their weight, h_i the chance that i pass."""

    numbers_are_by_round = True

    def _decide(self, window: Window, pi: Mixture) -> tuple[Tensor, Tensor, Tensor]:
        pi_rows = pi.full(window.everywhere)
        num_accepted, rest = self._passing(window, pi_rows)
        last = window.starts + num_accepted
        is_bonus = num_accepted == window.lengths
        weights = torch.where((is_bonus | (rest[last].sum(-1) <= 0)).unsqueeze(-1), pi_rows[last], rest[last])
        token = draw(weights, window.uniforms(Purpose.RECOVER, last))
        return num_accepted, token, torch.zeros_like(is_bonus)

    def _falls(self, window: Window, pi: Mixture) -> Tensor:
        """As the Verifier's: here the same coins, looked at together with p for pi."""
        if not pi.cascading:
            return torch.zeros_like(window.is_draft)
        num_exact, _ = self._passing(window, window.p.probs)
        return (window.offsets >= num_exact[window.owner]) & ~window.is_given

    def _passing(self, window: Window, pi_rows: Tensor) -> tuple[Tensor, Tensor]:
        """[B] how many drafts stand; and [R, V] what is left for the token behind i drafts, max(0, b_i * pi - q)."""
        weight = self._weights(window, pi_rows)  # [R] b_i at the row behind i drafts
        rest = (weight.unsqueeze(-1) * pi_rows - window.q_rows(window.everywhere)).clamp(min=0)
        return self._longest(window, weight, rest.sum(-1)), rest

    def _weights(self, window: Window, pi_rows: Tensor) -> Tensor:
        """b_0 = 1, b_{i+1} = min(1, b_i * pi(x_i) / q(x_i))."""
        ratios = window.padded(pi_rows[window.everywhere, window.drafted] / window.q_at(window.everywhere, window.drafted))  # [B, K + 1]
        weights = [torch.ones_like(ratios[:, 0])]
        for ratio in ratios[:, :-1].unbind(-1):
            weights.append((weights[-1] * ratio).clamp(max=1))
        return torch.stack(weights, -1)[window.owner, window.offsets]

    def _longest(self, window: Window, weight: Tensor, rest: Tensor) -> Tensor:
        """[B] the largest i whose coin, that of its last draft, is below h_i = r_i / (r_i + 1 - b_i), or b_i at the window's end."""
        chance = torch.nan_to_num(rest / (rest + 1 - weight), nan=1.0)  # 0 / 0 where pi is q and nothing was lost
        chance = torch.where(window.is_draft, chance, weight)
        coins = window.uniforms(Purpose.ACCEPT, (window.everywhere - 1).clamp(min=0))
        passes = (window.offsets == 0) | (coins < chance)
        return torch.where(window.padded(passes), torch.arange(window.padded(passes).shape[-1], device=window.device), 0).amax(-1)
