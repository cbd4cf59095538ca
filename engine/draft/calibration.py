"""How often drafts of a given confidence stand, learnt from what became of them.

Confidence is the largest raw probability of the row that a draft was drawn from. What it is worth differs between pairs, and between
greedy and sampled requests, so it is learnt for either, in bins.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike

_NUM_BINS = 10
_PRIOR_WEIGHT = 4.0  # in drafts: a bin begins as what its confidence says
_MEMORY = 0.999  # of a bin's counts at its next draft


class Calibration:
    """From confidence to the chance of standing, in front of which all drafts stood."""

    def __init__(self) -> None:
        self._verified = [_PRIOR_WEIGHT] * _NUM_BINS
        self._accepted = [_PRIOR_WEIGHT * (i + 0.5) / _NUM_BINS for i in range(_NUM_BINS)]

    def rate(self, confidence: float) -> float:
        """Chance that a draft of that confidence stands, if the drafter made it."""
        i = _bin(confidence)
        return self._accepted[i] / self._verified[i]

    @property
    def mean_rate(self) -> float:
        """Of drafts whose confidence is not known yet."""
        return sum(self._accepted) / sum(self._verified)

    def observe(self, confidences: ListLike[float], num_accepted: int) -> None:
        """What became of the drafts of a round, those behind the first that did not stand not being known."""
        for j, confidence in enumerate(confidences[: num_accepted + 1]):
            if confidence > 1:  # it was foreseen
                continue
            i = _bin(confidence)
            self._verified[i] = _MEMORY * self._verified[i] + 1
            self._accepted[i] = _MEMORY * self._accepted[i] + (j < num_accepted)


def _bin(confidence: float) -> int:
    return min(_NUM_BINS - 1, int(confidence * _NUM_BINS))
