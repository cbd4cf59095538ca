"""How often drafts stand in front of which all did: counted, faded, and mixed with what was believed before."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field

from engine.plan import CERTAIN, PREDICTED

_PRIOR_WEIGHT = 8.0  # in drafts: what was believed before, against what was seen; with fewer, luck would choose who drafts


@dataclass(slots=True)
class Rate:
    """How often something stood in front of which all did."""

    verified: float = 0.0
    accepted: float = 0.0

    def observe(self, stood: bool, memory: float) -> None:
        self.verified = memory * self.verified + 1
        self.accepted = memory * self.accepted + stood

    def fade(self, memory: float) -> None:
        """Forget a little, as a round does."""
        self.verified *= memory
        self.accepted *= memory

    def mixed_with(self, prior: float) -> float:
        """A rate that begins as the prior and becomes what was seen."""
        return (_PRIOR_WEIGHT * prior + self.accepted) / (_PRIOR_WEIGHT + self.verified)


@dataclass(slots=True)
class Rates:
    """Of the drafter's own drafts, by position among these, and of what the client predicted."""

    own: list[Rate]
    predicted: Rate = field(default_factory=Rate)

    @classmethod
    def nothing(cls, num: int, predicted: Rate | None = None) -> Rates:
        return cls([Rate() for _ in range(num)], predicted or Rate())

    def observe(self, confidences: ListLike[float], num_accepted: int, memory: float) -> None:
        """What became of the drafts of a round, those behind the first that did not stand not being known."""
        own = iter(self.own)
        for j, confidence in enumerate(confidences[: num_accepted + 1]):
            if confidence != CERTAIN:
                rate = self.predicted if confidence == PREDICTED else next(own)
                rate.observe(j < num_accepted, memory)

    def fade(self, memory: float) -> None:
        for rate in self.own:
            rate.fade(memory)

    def mixed_with(self, priors: ListLike[float]) -> list[float]:
        return [rate.mixed_with(prior) for rate, prior in zip(self.own, priors, strict=True)]
