"""The rules: which drafted tokens may stand. Each is a keep-set A per row; pi = q on A + eta * p follows from it in the Verifier."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.plan import RawRows, Rule


class Exact:
    """Keeps nothing, so pi = p: the text has the target's own law.

    Source: Leviathan, Kalman and Matias, "Fast Inference from Transformers via Speculative Decoding" (2023), algorithm 1.
    It has no dial; `alpha` is not read.
    """

    needs_q = False
    is_lossless = True

    def keep(self, raw: RawRows, alpha: Tensor) -> Tensor:
        return torch.zeros_like(alpha, dtype=torch.bool)


RULES: dict[str, Rule] = {"exact": Exact()}
