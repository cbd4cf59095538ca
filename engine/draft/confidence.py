"""Drafting stops where the drafter becomes unsure, at a threshold that learns from what became of the drafts.

Confidence is the largest probability of the row that a draft is drawn from. A draft from an unsure row is still verified; only those
behind it are not made. Whether a position is verified therefore depends on rows, never on the token that was drawn, and the law of the
text does not change.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as ListLike
from math import prod

from engine.draft.length import FixedLength
from engine.plan import Drafting
from engine.sequence import Sequence

_MIN_SAMPLES = 20
_MEMORY = 1000  # newest drafts that the threshold is chosen by
_EVERY = 16  # rounds between two choices
_MISSED = 3.0  # what stopping too early costs, a draft that would have stood being lost, in needless drafts


class ConfidenceLength(FixedLength):
    """Up to `max_length` drafts, fewer where confidence falls below a threshold.

    `is_cumulative` compares the product of all confidences of the round (Huang et al., "SpecDec++", 2024: stop when the chance that
    something is rejected is above 1 - threshold), otherwise the newest one (Mamou et al., "Dynamic Speculation Lookahead", 2024). The
    threshold minimises false positive rate + 3 x false negative rate over the newest drafts, as transformers' assisted generation does.
    """

    reads_confidence = True

    def __init__(self, max_length: int, threshold: float, is_cumulative: bool):
        super().__init__(max_length)
        self.threshold = threshold
        self._is_cumulative = is_cumulative
        self._samples: deque[tuple[float, bool]] = deque(maxlen=_MEMORY)
        self._num_rounds = 0

    def who_goes_on(self, drafting: ListLike[Drafting]) -> list[bool]:
        return [self._score(draft.confidences) >= self.threshold for draft in drafting]

    def observe(self, seq: Sequence, num_draft: int, num_accepted: int, confidences: ListLike[float] = ()) -> None:
        for i in range(min(num_draft, num_accepted + 1, len(confidences))):
            if confidences[i] > 1:  # it was foreseen
                continue
            self._samples.append((self._score(confidences[: i + 1]), i < num_accepted))
        self._num_rounds += 1
        if self._num_rounds % _EVERY == 0 and len(self._samples) >= _MIN_SAMPLES:
            self.threshold = best_threshold(self._samples, self.threshold)

    def _score(self, confidences: ListLike[float]) -> float:
        return prod(min(1.0, confidence) for confidence in confidences) if self._is_cumulative else confidences[-1]


def best_threshold(samples: ListLike[tuple[float, bool]], otherwise: float) -> float:
    """The score from which on a draft is worth making: the least false positive rate + 3 x false negative rate; (score, stood) samples.

    `otherwise` where all stood or none did.
    """
    num_good = sum(stood for _, stood in samples)
    num_bad = len(samples) - num_good
    if not num_good or not num_bad:
        return otherwise
    best, least = otherwise, float("inf")
    missed, needless = 0, num_bad
    ordered = sorted(samples)
    for i, (score, stood) in enumerate(ordered):
        if i == 0 or score > ordered[i - 1][0]:  # a threshold stands in front of all equal scores
            cost = needless / num_bad + _MISSED * missed / num_good
            if cost < least:
                best, least = score, cost
        missed += stood
        needless -= not stood
    return best
