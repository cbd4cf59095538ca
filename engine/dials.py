"""What each rule's alpha means: its bounds, its neutral ends, its default. Plain data, for configs and servers that hold no tensors.

The rules themselves are in verify/rules.py, one entry there for each one here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf


@dataclass(frozen=True, slots=True)
class Dial:
    """alpha of one rule. Larger values trust the drafter more."""

    low: float
    high: float
    default: float
    target_at: float  # here pi is p: the target alone
    drafter_at: float  # here pi is q, inside the support of the raw p: the drafter alone
    needs_q: bool  # judges nothing where the drafter has no probabilities; pi is p there

    def mistake(self, alpha: float, highest: float | None = None) -> str | None:
        """Why `alpha` cannot be taken, naming the bound that it breaks; None if it can. `highest` is a deployment's own bound."""
        high = self.high if highest is None else min(self.high, highest)
        if self.low <= alpha <= high:
            return None
        if self.low == self.high:
            return "must be left out"
        return f"must be at least {self.low:g}" if alpha < self.low else f"must be at most {high:g}"  # nan is above everything


_PROBABILITY = {"low": -1.0, "high": 1.0, "target_at": -1.0, "drafter_at": 1.0}
_ANY = {"low": -inf, "high": inf, "target_at": -inf, "drafter_at": inf}

# Defaults are small: relaxed rules lengthen answers and repeat themselves long before they look fast.
DIALS: Mapping[str, Dial] = {
    "exact": Dial(low=0, high=0, default=0, target_at=0, drafter_at=inf, needs_q=False),
    "lossy": Dial(low=0, high=1, default=0.2, target_at=0, drafter_at=1, needs_q=True),
    "chow": Dial(**_PROBABILITY, default=0.2, needs_q=True),
    "diff": Dial(**_PROBABILITY, default=0.1, needs_q=True),
    "opt": Dial(**_ANY, default=0.1, needs_q=True),
    "token_v1": Dial(**_PROBABILITY, default=0.1, needs_q=True),
    "token_v2": Dial(**_PROBABILITY, default=0.1, needs_q=False),
    "token_v3": Dial(**_PROBABILITY, default=0.2, needs_q=False),
    "chow_log": Dial(low=-1, high=inf, default=0.5, target_at=-1, drafter_at=inf, needs_q=True),
    "diff_log": Dial(**_ANY, default=0.1, needs_q=True),
    "bild": Dial(**_PROBABILITY, default=0.2, needs_q=True),
}
