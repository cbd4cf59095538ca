"""The draft length that brings most tokens a second: what drafts are likely to stand, against what they cost here and now.

Every step the lengths of all sequences are chosen together. A draft at position j of sequence b is worth its survival, the product of the
acceptance rates up to j; drafts are taken in the order of their survival as long as

    (sequences + sum of survivals) / (seconds of the target over all rows + seconds of the drafter's calls)

can still grow, and only if it grows by some per cent at all, so length zero is a choice like any other. A pass with drafts takes longer
than its rows alone (costs.py). What the step's prompts take is left out: it passes with drafts or without, and beside a long prompt every
draft would look cheap. Sources: Liu et al., "Optimizing Speculative Decoding for Serving Large Language Models Using Goodput" (2024); Wu et
al., "TETRIS: Optimal Draft Token Selection for Batch Speculative Decoding" (2025), whose order this is: survivals fall along a sequence, so
the greedy choice is the best one of its size.

For drafts that are looked up this is how many are made. What a model drafts stands in runs: a name or a phrase that it knows, then a word
that it does not. So who drafts at all may draft up to the maximum, and behind every call of the drafter all are asked together who goes on:
those, the likeliest first, whose further drafts raise expected tokens a second, given how likely the drafts so far are to stand by their
confidences (calibration.py). One alone that goes on pays for a whole call. The idea of asking is that of Huang et al., "SpecDec++" (2024);
here costs set the threshold, and nobody has to.

A drafter that was not asked for a while has the text to read first. The rounds that are left share what that costs, up to some, since a
sequence that is drafted for once may not be the next time: their part is charged to the first draft.

What is foreseen stands in front of all that, and costs no call. So the text is asked, before lengths are chosen, how many of its next
tokens are: one that a grammar forces has a rate of 1, one that the client predicted a rate of its own, learnt apart from the drafter's, and
either takes a slot as soon as its row is worth it, however poor the drafter. The drafter's rates are those of its own first, second ...
draft. How far the text foretells follows from what was emitted, so lengths may go by it; what is foreseen behind a draft is not asked for.

The choice sees lengths, counts, times and rows, never a token that was drawn: the law of the text does not depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field
from itertools import accumulate
from operator import mul

from engine.draft.calibration import Calibration
from engine.draft.costs import CostsByBatch, PassCosts
from engine.draft.foresight import NoForesight
from engine.draft.length import FixedLength, share_budget
from engine.draft.rates import Rate, Rates
from engine.plan import CERTAIN, PREDICTED, Drafting, Foresight, StepTiming
from engine.sequence import Sequence

_PRIOR_RATE = 0.7  # of a draft in front of which all stood, before anything is known
_PREDICTED_RATE = 0.9  # of a token that the client predicted, likewise
_MEMORY = 0.98  # of a sequence's counts at its next round
_SHARED_MEMORY = 0.995  # of the counts of all
_PROBES = (8, 256)  # rounds without drafts until one is tried again: at first, and at most; doubled each time that the try was in vain
_TRYING = 0.005  # share of the time that such tries may be expected to lose
_TRYING_MEMORY = 0.999  # of what they may lose and did not, at the next step
_MARGIN = 0.05  # by which drafts of many sequences must promise more than none: the best of many promises is the one most overrated
_LEAST = 0.04  # survival behind which no row is worth looking at
_MOST_READ = 4  # tokens that the drafter caught up with, for one that it drafted: beyond them a pass says nothing of what drafts cost
_SHARING = 32  # rounds, at most, that share what reading the text costs a drafter
_MAX_BATCH_BUCKET = 7  # 64 sequences and more


@dataclass(slots=True)
class _History:
    """What is known of one sequence."""

    rates: Rates
    idle_rounds: int = 0  # without drafts of the drafter's own, since the last one
    patience: int = field(default=_PROBES[0])  # idle rounds until a draft is tried again


@dataclass(slots=True)
class _Round:
    """How far the drafts of a step have come."""

    tokens: float = 0.0  # expected to be emitted, drafts so far included
    num_rows: int = 0  # of the target, drafts so far included
    drafter_seconds: float = 0.0  # spent
    has_prompts: bool = False
    prompt_seconds: float = 0.0  # that the target's pass takes for rows of prompts
    draft_share: float = 0.0  # that the rest of the pass takes longer for having drafts at all
    stand: dict[Sequence, float] = field(default_factory=dict)  # of each sequence's drafts so far, how many are expected to

    def begin(self, seq: Sequence, survivals: ListLike[float]) -> None:
        """These are foreseen: they are there before any call of the drafter."""
        self.stand[seq] = sum(survivals)
        self.tokens += self.stand[seq]
        self.num_rows += len(survivals)


@dataclass(frozen=True, slots=True)
class _Outlook:
    """What drafts of one sequence are worth."""

    survivals: list[float]  # as far as they are worth looking at
    num_foreseen: int  # leading drafts that cost no call
    late_seconds: float  # this round's share of what it costs the drafter to catch up with the text
    limit: int  # drafts that it may make

    def calls(self, position: int) -> int:
        """Calls of the drafter that the draft at a position needs; none in front of the first."""
        return max(0, position + 1 - self.num_foreseen)


@dataclass(frozen=True, slots=True)
class _Chance:
    """What drafting on may bring for one sequence."""

    next: float  # that its next draft stands
    mean: float  # that any further one does, in front of which all stood
    room: int  # drafts that it may still make
    place: int  # among those that were asked about


class AdaptiveLength(FixedLength):
    """Chooses lengths by expected tokens a second."""

    def __init__(self, max_length: int, target: PassCosts, drafter: PassCosts | None, foresight: Foresight | None = None):
        """`drafter` is None where drafts cost nothing: they are looked up. `foresight` is the one that drafts are made by."""
        super().__init__(max_length)
        self._foresight = foresight or NoForesight()
        self._targets = CostsByBatch(target)
        self._target = target  # of batches like that of the step that is being planned
        self._drafter = drafter
        self._shared: dict[int, Rates] = {}  # by batch size, in powers of two: who drafts at 1 and at 64 are not the same rounds
        self._predictions = Rate()  # of all sequences, whoever else is there: no drafter makes them
        self._bucket = 0  # of the step that is being planned
        self._round = _Round()
        self._priors = [_PRIOR_RATE] * max_length  # acceptance rates by position in that step, of a sequence of which nothing is known
        self._calibrations: dict[tuple[bool, str], Calibration] = {}  # by whether a request is greedy, and by its rule
        self.reads_confidence = drafter is not None
        self._histories: dict[Sequence, _History] = {}
        self._allowance = 0.0  # seconds that tries may lose now

    def lengths(self, seqs: ListLike[Sequence], limits: ListLike[int], budget: int, num_rows: int) -> list[int]:
        self._bucket = _bucket(len(seqs))
        self._target = self._targets.of(self._bucket)
        self._priors = self._of_all().mixed_with([_PRIOR_RATE] * self.max_length)
        outlooks = [self._outlook(seq, min(limit, self.max_length)) for seq, limit in zip(seqs, limits, strict=True)]
        slots = sorted(((-s, j, b) for b, outlook in enumerate(outlooks) for j, s in enumerate(outlook.survivals)))[: max(0, budget)]
        num_due = sum(seq.needs_q for seq in seqs)
        row_seconds = self._call(num_due) if num_due else 0.0  # of rows that are due without any draft
        prompt_seconds = self._target.at(num_rows) - self._target.at(len(seqs))
        share = self._targets.draft_share(self._bucket)
        self._round = _Round(len(seqs), num_rows, row_seconds, num_rows > len(seqs), prompt_seconds, share)
        lengths = [0] * len(seqs)
        for _, _, b in slots[: self._best([(-s, outlooks[b].calls(j), outlooks[b].late_seconds) for s, j, b in slots])]:
            lengths[b] += 1
        probing = self._probing(seqs, outlooks, lengths)
        if self.reads_confidence:  # whose drafter drafts at all may follow a run to its end
            most = [outlook.limit if outlook.calls(length - 1) else length for outlook, length in zip(outlooks, lengths, strict=True)]
            lengths = share_budget(most, budget)
        for b in probing:
            if (num_more := outlooks[b].num_foreseen + 1 - lengths[b]) <= budget - sum(lengths):
                lengths[b] += num_more
        for seq, outlook, length in zip(seqs, outlooks, lengths, strict=True):
            self._round.begin(seq, outlook.survivals[: min(outlook.num_foreseen, length)])
        return lengths

    def who_goes_on(self, drafting: ListLike[Drafting]) -> list[bool]:
        """Those whose further drafts would raise expected tokens a second."""
        now = self._round
        now.drafter_seconds += self._call(len(drafting))
        now.num_rows += len(drafting)
        chances = list[_Chance]()
        for i, draft in enumerate(drafting):
            calibration = self._calibration(draft.seq)
            told = {CERTAIN: 1.0, PREDICTED: self._predicted_rate(draft.seq)}
            survivals = list(accumulate((told[c] if c in told else calibration.rate(c) for c in draft.confidences), mul))
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
        best_rate = now.tokens / self._seconds(now.num_rows, now.drafter_seconds, True)
        most = max((chance.room for chance in chances), default=0)
        gained, num_drafts = [0.0] * most, [0] * most  # of the next, the second next ... drafts of the first `num` sequences
        for num, chance in enumerate(chances, 1):
            call = self._call(num)
            for depth in range(chance.room):
                gained[depth] += chance.next * chance.mean**depth
                num_drafts[depth] += 1
            for length, (tokens, rows) in enumerate(zip(accumulate(gained), accumulate(num_drafts), strict=True), 1):
                rate = (now.tokens + tokens) / self._seconds(now.num_rows + rows, now.drafter_seconds + length * call, True)
                if rate > best_rate:
                    best, best_rate = num, rate
        return best

    def expects_drafts(self, num_seqs: int) -> bool:
        """Whether the first draft of sequences of which nothing is known pays, of one or of all."""
        if not num_seqs or not self.max_length:
            return False
        bucket = _bucket(num_seqs)
        target, shared = self._targets.of(bucket), self._shared.get(bucket)
        rate = shared.own[0].mixed_with(_PRIOR_RATE) if shared is not None else _PRIOR_RATE
        pace = _wanted(num_seqs) * num_seqs / target.at(num_seqs)
        longer = 1 + self._targets.draft_share(bucket)
        return any((num_seqs + num * rate) / (longer * target.at(num_seqs + num) + self._call(num)) > pace for num in (1, num_seqs))

    def observe(self, seq: Sequence, num_draft: int, num_accepted: int, confidences: ListLike[float] = ()) -> None:
        if not num_draft:
            return
        drafts = confidences[:num_draft] or [0.0] * num_draft
        history = self._history(seq)
        own = [j < num_accepted for j, confidence in enumerate(drafts[: num_accepted + 1]) if confidence <= 1]
        if own:
            history.patience = _PROBES[0] if own[0] else min(_PROBES[1], 2 * history.patience)
        if confidences:
            self._calibration(seq).observe(drafts, num_accepted)
        history.rates.observe(drafts, num_accepted, _MEMORY)
        self._of_all().observe(drafts, num_accepted, _SHARED_MEMORY)

    def observe_step(self, timing: StepTiming) -> None:
        if timing.num_target_rows:  # else nobody could run
            seen = timing.num_target_rows, timing.target_seconds
            self._targets.observe(self._bucket, *seen, has_drafts=timing.num_drafts > 0, has_prompts=self._round.has_prompts)
        self._allowance = _TRYING_MEMORY * self._allowance + _TRYING * (timing.target_seconds + timing.drafter_seconds)
        # Who drafts now and then reads what came meanwhile each time, and that is part of what drafts cost. The prompts of many are not.
        num_drafted = timing.num_drafter_rows - timing.num_late_rows
        if self._drafter is not None and timing.num_drafter_calls and timing.num_late_rows <= _MOST_READ * num_drafted:
            rows = max(1, num_drafted // timing.num_drafter_calls)
            self._drafter.observe(rows, timing.drafter_seconds / timing.num_drafter_calls)

    def forget(self, seq: Sequence) -> None:
        self._histories.pop(seq, None)
        self._round.stand.pop(seq, None)

    def _best(self, slots: ListLike[tuple[float, int, float]]) -> int:
        """How many slots to take, beside what is spent in any case, given of each its survival, the calls that it needs, and what its
        sequence's first draft costs besides."""
        tokens, num_rows, drafter_seconds = self._round.tokens, self._round.num_rows, self._round.drafter_seconds
        best, best_rate = 0, tokens / self._seconds(num_rows, drafter_seconds, False) if tokens else 0.0
        wanted = _wanted(round(tokens)) if tokens else 1.0  # nothing is drafted so far, so there is a token of each sequence
        by_depth: dict[int, int] = {}
        for num, (survival, depth, late) in enumerate(slots, 1):
            tokens += survival
            if depth:
                before = self._call(by_depth[depth]) if depth in by_depth else 0.0
                drafter_seconds += late if depth == 1 else 0.0
                by_depth[depth] = by_depth.get(depth, 0) + 1
                drafter_seconds += self._call(by_depth[depth]) - before
            rate = tokens / self._seconds(num_rows + num, drafter_seconds, True)
            if by_depth:  # what is foreseen, or looked up, is no promise of the drafter's
                rate /= wanted
            if rate > best_rate:
                best, best_rate = num, rate
        return best

    def _seconds(self, num_rows: int, drafter_seconds: float, has_drafts: bool) -> float:
        """Of a step with so many rows of the target, all of them counted, but without the time of those of prompts."""
        now = self._round
        return (self._target.at(num_rows) - now.prompt_seconds) * (1 + has_drafts * now.draft_share) + drafter_seconds

    def _call(self, rows: int) -> float:
        return 0.0 if self._drafter is None else self._drafter.at(rows)

    def _foreseen(self, seq: Sequence, limit: int) -> list[float]:
        """The rates of the tokens that the text foretells."""
        rates, drafts = list[float](), list[int]()
        if not self._foresight.applies(seq):
            return rates
        predicted = self._predicted_rate(seq)
        while len(rates) < limit and (foreseen := self._foresight.next(seq, drafts)) is not None:
            drafts.append(foreseen.token_id)
            rates.append(predicted if foreseen.is_predicted else 1.0)
        return rates

    def _predicted_rate(self, seq: Sequence) -> float:
        return self._history(seq).rates.predicted.mixed_with(self._predictions.mixed_with(_PREDICTED_RATE))

    def _outlook(self, seq: Sequence, limit: int) -> _Outlook:
        foreseen = self._foreseen(seq, limit)
        survivals = list(accumulate(foreseen, mul))
        survival = survivals[-1] if survivals else 1.0
        for rate, prior in zip(self._history(seq).rates.own, self._priors[: limit - len(foreseen)], strict=False):
            survival *= rate.mixed_with(prior)
            survivals.append(survival)
            if survival < _LEAST:
                break
        return _Outlook(survivals, len(foreseen), self._late_seconds(seq), limit)

    def _late_seconds(self, seq: Sequence) -> float:
        num_late = len(seq.tokens) - seq.drafter_computed - 1
        if num_late < 1 or seq.needs_q:  # who needs q is read in any case
            return 0.0
        return (self._call(num_late) - self._call(1)) / min(_SHARING, max(1, seq.num_remaining))

    def _calibration(self, seq: Sequence) -> Calibration:
        key = seq.request.sampling.is_greedy, seq.request.speculation.rule
        return self._calibrations.setdefault(key, Calibration())

    def _probing(self, seqs: ListLike[Sequence], outlooks: ListLike[_Outlook], lengths: ListLike[int]) -> list[int]:
        """Sequences whose drafter tries one draft again after a while without: what they are about may have changed.

        Where a row is dear, as among many sequences, tries would cost more than they ever find: so the longest idle come first, as far as
        what is set aside for tries allows.
        """
        due = []
        for b, (seq, outlook) in enumerate(zip(seqs, outlooks, strict=True)):
            history = self._history(seq)
            history.idle_rounds = 0 if outlook.calls(lengths[b] - 1) else history.idle_rounds + 1
            if history.idle_rounds:
                history.rates.fade(_MEMORY)  # else a sequence would stay idle for what it was like long ago
            if outlook.calls(outlook.limit - 1) and history.idle_rounds > history.patience:
                due.append(b)
        due.sort(key=lambda b: -self._history(seqs[b]).idle_rounds)
        trying = list[int]()
        for b in due:
            if not self._may_try(seqs[b], outlooks[b], sum(lengths) + len(trying)):
                break
            trying.append(b)
        return trying

    def _may_try(self, seq: Sequence, outlook: _Outlook, num_drafts: int) -> bool:
        """Whether one more draft, of the sequence's drafter, may be tried beside `num_drafts` of the step. It is paid for at once."""
        now = self._round
        pace = now.tokens / self._seconds(now.num_rows, now.drafter_seconds, False)
        before = self._seconds(now.num_rows + num_drafts, 0.0, num_drafts > 0)
        call = self._call(max(1, len(seq.tokens) - seq.drafter_computed))
        seconds = self._seconds(now.num_rows + num_drafts + 1, call, True) - before
        loss = max(0.0, seconds - outlook.survivals[outlook.num_foreseen] / pace)
        if loss > self._allowance:
            return False
        self._allowance -= loss
        self._history(seq).idle_rounds = 0
        return True

    def _history(self, seq: Sequence) -> _History:
        if (history := self._histories.get(seq)) is None:
            history = self._histories[seq] = _History(Rates.nothing(self.max_length))
        return history

    def _of_all(self) -> Rates:
        if (rates := self._shared.get(self._bucket)) is None:
            rates = self._shared[self._bucket] = Rates.nothing(self.max_length, self._predictions)
        return rates


def _wanted(num_seqs: int) -> float:
    """How much more than none drafts must promise: nothing more for one sequence, whose few promises are seen all the time."""
    return 1 + _MARGIN * (1 - 1 / num_seqs)


def _bucket(num_seqs: int) -> int:
    """Of the size of a batch."""
    return min(_MAX_BATCH_BUCKET, num_seqs.bit_length())
