"""The draft length that brings most tokens a second: what drafts are likely to stand, against what they cost here and now.

Every step the lengths of all sequences are chosen together. A draft at position j of sequence b is worth its survival, the product of the
acceptance rates up to j; drafts are taken in the order of their survival as long as

    (sequences + sum of survivals) / (seconds of the target over all rows + seconds of the drafter's calls)

can still grow, so length zero is a choice like any other. Sources: Liu et al., "Optimizing Speculative Decoding for Serving Large Language
Models Using Goodput" (2024); Wu et al., "TETRIS: Optimal Draft Token Selection for Batch Speculative Decoding" (2025), whose order this
is: survivals fall along a sequence, so the greedy choice is the best one of its size.

For drafts that are looked up this is how many are made. What a model drafts stands in runs: a name or a phrase that it knows, then a word
that it does not. So who drafts at all may draft up to the maximum, and behind every call of the drafter all are asked together who goes on:
those, the likeliest first, whose further drafts raise expected tokens a second, given how likely the drafts so far are to stand by their
confidences (calibration.py). One alone that goes on pays for a whole call. The idea of asking is that of Huang et al., "SpecDec++" (2024);
here costs set the threshold, and nobody has to.

The choice sees lengths, counts, times and rows, never a drafted token: the law of the text does not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul

from engine.draft.calibration import Calibration
from engine.draft.costs import PassCosts
from engine.draft.length import FixedLength, share_budget
from engine.plan import CERTAIN, Drafting, StepTiming
from engine.sequence import Sequence

_PRIOR_RATE = 0.7  # of a draft in front of which all stood, before anything is known
_PRIOR_WEIGHT = 4.0  # in drafts: what all sequences say, against a sequence's own
_MEMORY = 0.98  # of a sequence's counts at its next round
_SHARED_MEMORY = 0.995  # of the counts of all
_PROBES = (8, 256)  # rounds without drafts until one is tried again: at first, and at most; doubled each time that the try was in vain
_MAX_BATCH_BUCKET = 6  # 64 sequences and more


@dataclass(slots=True)
class _Rates:
    """How often a draft stood in front of which all did, by position."""

    verified: list[float]
    accepted: list[float]

    @classmethod
    def nothing(cls, num: int) -> _Rates:
        return cls([0.0] * num, [0.0] * num)

    def observe(self, num_draft: int, num_accepted: int, memory: float) -> None:
        for position in range(min(num_draft, num_accepted + 1)):
            self.verified[position] = memory * self.verified[position] + 1
            self.accepted[position] = memory * self.accepted[position] + (position < num_accepted)

    def fade(self, memory: float) -> None:
        """Forget a little, as a round does."""
        self.verified = [memory * count for count in self.verified]
        self.accepted = [memory * count for count in self.accepted]

    def mixed_with(self, prior: ListLike[float]) -> list[float]:
        """Rates that begin as the prior and become what was seen."""
        seen = zip(prior, self.accepted, self.verified, strict=True)
        return [(_PRIOR_WEIGHT * rate + accepted) / (_PRIOR_WEIGHT + verified) for rate, accepted, verified in seen]


@dataclass(slots=True)
class _History:
    """What is known of one sequence."""

    rates: _Rates
    idle_rounds: int = 0  # without drafts, since the last one
    patience: int = field(default=_PROBES[0])  # idle rounds until a draft is tried again


@dataclass(slots=True)
class _Round:
    """How far the drafts of a step have come."""

    tokens: float = 0.0  # expected to be emitted, drafts so far included
    num_rows: int = 0  # of the target
    drafter_seconds: float = 0.0  # spent
    stand: dict[Sequence, float] = field(default_factory=dict)  # of each sequence's drafts so far, how many are expected to


@dataclass(frozen=True, slots=True)
class _Chance:
    """What drafting on may bring for one sequence."""

    next: float  # that its next draft stands
    mean: float  # that any further one does, in front of which all stood
    room: int  # drafts that it may still make
    place: int  # among those that were asked about


class AdaptiveLength(FixedLength):
    """Chooses lengths by expected tokens a second."""

    def __init__(self, max_length: int, max_step_tokens: int, target: PassCosts, drafter: PassCosts | None):
        """`drafter` is None where drafts cost nothing: they are looked up."""
        super().__init__(max_length)
        self._max_step_tokens = max_step_tokens
        self._target = target
        self._drafter = drafter
        self._shared: dict[int, _Rates] = {}  # by batch size, in powers of two: who drafts at 1 and at 64 are not the same rounds
        self._bucket = 0  # of the step that is being planned
        self._round = _Round()
        self._priors = [_PRIOR_RATE] * max_length  # acceptance rates by position in that step, of a sequence of which nothing is known
        self._calibrations: dict[tuple[bool, str], Calibration] = {}  # by whether a request is greedy, and by its rule
        self.reads_confidence = drafter is not None
        self._histories: dict[Sequence, _History] = {}

    def lengths(self, seqs: ListLike[Sequence], limits: ListLike[int], budget: int) -> list[int]:
        self._bucket = min(_MAX_BATCH_BUCKET, len(seqs).bit_length())
        self._priors = self._of_all().mixed_with([_PRIOR_RATE] * self.max_length)
        survivals = [self._survivals(seq)[:limit] for seq, limit in zip(seqs, limits, strict=True)]
        slots = sorted(((-s, j, b) for b, row in enumerate(survivals) for j, s in enumerate(row)))[: max(0, budget)]
        num_rows = self._max_step_tokens - budget
        row_seconds = self._call(len(seqs)) if any(seq.needs_q for seq in seqs) else 0.0  # of rows that are due without any draft
        num_taken = self._best(slots, len(seqs), num_rows, row_seconds)
        self._round = _Round(len(seqs), num_rows, row_seconds)
        lengths = [0] * len(seqs)
        for _, _, b in slots[:num_taken]:
            lengths[b] += 1
        probing = self._probing(seqs, lengths, limits)
        if self.reads_confidence:  # who drafts at all may follow a run to its end
            most = [min(self.max_length, limit) if length else 0 for length, limit in zip(lengths, limits, strict=True)]
            lengths = share_budget(most, budget)
        for b in probing[: max(0, budget - sum(lengths))]:
            lengths[b] = 1
        return lengths

    def who_goes_on(self, drafting: ListLike[Drafting]) -> list[bool]:
        """Those whose further drafts would raise expected tokens a second."""
        now = self._round
        now.drafter_seconds += self._call(len(drafting))
        now.num_rows += len(drafting)
        chances = list[_Chance]()
        for i, draft in enumerate(drafting):
            calibration = self._calibration(draft.seq)
            survivals = list(accumulate(map(calibration.rate, draft.confidences), mul))
            now.tokens += sum(survivals) - now.stand.get(draft.seq, 0.0)
            now.stand[draft.seq] = sum(survivals)
            if draft.room:
                chances.append(_Chance(survivals[-1] * calibration.mean_rate, calibration.mean_rate, draft.room, i))
        chances.sort(key=lambda chance: -chance.next)
        going = {chance.place for chance in chances[: self._num_to_go_on(chances)]}
        return [i in going for i in range(len(drafting))]

    def _num_to_go_on(self, chances: ListLike[_Chance]) -> int:
        """How many of these, in their order, are to draft on."""
        now, best = self._round, 0
        best_rate = now.tokens / (self._target.at(now.num_rows) + now.drafter_seconds)
        most = max((chance.room for chance in chances), default=0)
        gained, num_drafts = [0.0] * most, [0] * most  # of the next, the second next ... drafts of the first `num` sequences
        for num, chance in enumerate(chances, 1):
            call = self._call(num)
            for depth in range(chance.room):
                gained[depth] += chance.next * chance.mean**depth
                num_drafts[depth] += 1
            for length, (tokens, rows) in enumerate(zip(accumulate(gained), accumulate(num_drafts), strict=True), 1):
                rate = (now.tokens + tokens) / (self._target.at(now.num_rows + rows) + now.drafter_seconds + length * call)
                if rate > best_rate:
                    best, best_rate = num, rate
        return best

    def observe(self, seq: Sequence, num_draft: int, num_accepted: int, confidences: ListLike[float] = ()) -> None:
        if num_draft:
            self._calibration(seq).observe(confidences[:num_draft], num_accepted)
            history = self._history(seq)
            history.patience = _PROBES[0] if num_accepted else min(_PROBES[1], 2 * history.patience)
            if CERTAIN in confidences:  # how often a client's prediction stands says nothing of the drafter
                return
            history.rates.observe(num_draft, num_accepted, _MEMORY)
            self._of_all().observe(num_draft, num_accepted, _SHARED_MEMORY)

    def observe_step(self, timing: StepTiming) -> None:
        self._target.observe(timing.num_target_rows, timing.target_seconds)
        if self._drafter is not None and timing.num_drafter_calls:
            rows = max(1, timing.num_drafter_rows // timing.num_drafter_calls)
            self._drafter.observe(rows, timing.drafter_seconds / timing.num_drafter_calls)

    def forget(self, seq: Sequence) -> None:
        self._histories.pop(seq, None)
        self._round.stand.pop(seq, None)

    def _best(self, slots: list[tuple[float, int, int]], num_seqs: int, num_rows: int, drafter_seconds: float) -> int:
        """How many of the slots to take. `num_rows` of the target and `drafter_seconds` are spent in any case."""
        tokens = float(num_seqs)
        best, best_rate = 0, tokens / (self._target.at(num_rows) + drafter_seconds) if num_seqs else 0.0
        by_depth: dict[int, int] = {}
        for num, (negative, depth, _) in enumerate(slots, 1):
            tokens -= negative
            before = self._call(by_depth[depth]) if depth in by_depth else 0.0
            by_depth[depth] = by_depth.get(depth, 0) + 1
            drafter_seconds += self._call(by_depth[depth]) - before
            rate = tokens / (self._target.at(num_rows + num) + drafter_seconds)
            if rate > best_rate:
                best, best_rate = num, rate
        return best

    def _call(self, rows: int) -> float:
        return 0.0 if self._drafter is None else self._drafter.at(rows)

    def _survivals(self, seq: Sequence) -> list[float]:
        return list(accumulate(self._history(seq).rates.mixed_with(self._priors), mul))

    def _calibration(self, seq: Sequence) -> Calibration:
        key = seq.request.sampling.is_greedy, seq.request.speculation.rule
        return self._calibrations.setdefault(key, Calibration())

    def _probing(self, seqs: ListLike[Sequence], lengths: list[int], limits: ListLike[int]) -> list[int]:
        """Sequences that try one draft again after a while without: what they are about may have changed."""
        due = []
        for b, seq in enumerate(seqs):
            history = self._history(seq)
            history.idle_rounds = 0 if lengths[b] else history.idle_rounds + 1
            if history.idle_rounds:
                history.rates.fade(_MEMORY)  # else a sequence would stay idle for what it was like long ago
            if limits[b] and history.idle_rounds > history.patience:
                history.idle_rounds = 0
                due.append(b)
        return due

    def _history(self, seq: Sequence) -> _History:
        return self._histories.setdefault(seq, _History(_Rates.nothing(self.max_length)))

    def _of_all(self) -> _Rates:
        return self._shared.setdefault(self._bucket, _Rates.nothing(self.max_length))
