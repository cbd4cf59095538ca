"""Lengths of drafts where the text foretells some: what is forced or predicted costs a row and no call, and has a rate of its own."""

from __future__ import annotations

import random
from collections.abc import Sequence as ListLike

import pytest

from engine.draft.adaptive import AdaptiveLength
from engine.draft.costs import PassCosts
from engine.draft.foresight import NoForesight
from engine.draft.ngram import NGramDrafter
from engine.plan import CERTAIN, PREDICTED, Chunk, Drafting, Foreseen, StepPlan, StepTiming
from engine.request import Choice
from engine.sequence import Sequence
from tests.unit.factories import make_request
from tests.unit.test_lengths import BUDGET, sequences

CHEAP_ROWS = {1: 1.0, 64: 1.6}


class Told(NoForesight):
    """So many tokens are forced, and so many behind them predicted."""

    def __init__(self, num_forced: int = 0, num_predicted: int = 0):
        self.flags = [False] * num_forced + [True] * num_predicted
        self.token_id = 7
        self.num_asked = 0

    def applies(self, seq: Sequence) -> bool:
        return seq.request.id != "plain"

    def next(self, seq: Sequence, drafts: ListLike[int]) -> Foreseen | None:
        self.num_asked += 1
        return Foreseen(self.token_id, self.flags[len(drafts)]) if len(drafts) < len(self.flags) else None


def policy(told: Told, call: float | None = 2.0, target: dict[int, float] = CHEAP_ROWS) -> AdaptiveLength:
    """A call costs twice a pass of the target: nobody drafts who pays for it."""
    return AdaptiveLength(8, PassCosts(target), None if call is None else PassCosts({1: call}), told)


def length_of(policy: AdaptiveLength, seq: Sequence, limit: int = 8, budget: int = BUDGET - 1) -> int:
    return policy.lengths([seq], [limit], budget, 1)[0]


def test_what_is_forced_takes_a_slot_however_dear_the_drafter_is() -> None:
    (seq,) = sequences(1)
    assert length_of(policy(Told()), seq) == 0
    assert length_of(policy(Told(num_forced=5)), seq) == 5
    assert length_of(policy(Told(num_forced=20)), seq) == 8, "the maximum holds"
    assert length_of(policy(Told(num_forced=5)), seq, limit=3) == 3
    assert length_of(policy(Told(num_forced=5)), seq, budget=2) == 2
    assert length_of(policy(Told(num_forced=5), target={1: 1.0, 2: 3.0, 8: 30.0}), seq) == 0, "nor is a row free"


def test_among_many_a_drafter_must_promise_some_per_cent_and_what_is_forced_nothing() -> None:
    """One sequence of 64 has something to draft: the 1.5 per cent that it may bring are worth a row if they are certain."""
    seqs = sequences(64)

    class OneTold(Told):
        def applies(self, seq: Sequence) -> bool:
            return seq is seqs[0]

    rows = {64: 1.0, 96: 1.1}
    limits = [8, *[0] * 63]
    assert policy(OneTold(num_forced=1), target=rows).lengths(seqs, limits, BUDGET, 64)[0] == 1
    assert policy(Told(), call=1e-6, target=rows).lengths(seqs, limits, BUDGET, 64)[0] == 0
    assert policy(Told(), call=1e-6, target=rows).lengths(seqs[:1], limits[:1], BUDGET, 1)[0] == 8, "alone it has nothing to make up for"


def test_behind_what_is_forced_a_drafter_that_pays_goes_on() -> None:
    (seq,) = sequences(1)
    assert length_of(policy(Told(num_forced=3), call=0.02), seq) == 8
    worn = policy(Told(num_forced=3), call=0.3)
    for _ in range(30):
        worn.observe(seq, 5, 3, (CERTAIN, CERTAIN, CERTAIN, 0.5, 0.5))
    assert length_of(worn, seq) == 3, "its own drafts do not stand"


def test_a_drafter_is_judged_by_its_own_drafts_and_a_prediction_by_its_own() -> None:
    (seq,) = sequences(1)
    dear = {1: 1.0, 64: 8.0}
    of_drafter, of_prediction = (policy(Told(num_predicted=4), call=0.02, target=dear) for _ in range(2))
    for _ in range(30):
        of_drafter.observe(seq, 3, 1, (PREDICTED, 0.5, 0.5))  # the drafter is refused
        of_prediction.observe(seq, 3, 1, (0.5, PREDICTED, PREDICTED))  # the prediction is
    assert of_drafter._history(seq).rates.own[0].mixed_with(0.5) < 0.2
    assert of_drafter._predicted_rate(seq) > 0.9
    assert of_prediction._history(seq).rates.own[0].mixed_with(0.5) > 0.8
    assert of_prediction._predicted_rate(seq) < 0.1
    assert length_of(of_drafter, seq) == 4
    assert length_of(of_prediction, seq) == 0, "behind what will be refused nothing stands"


def test_drafts_that_were_not_judged_teach_nothing() -> None:
    (seq,) = sequences(1)
    learning = policy(Told())
    learning.observe(seq, 3, 0, (PREDICTED, 0.5, CERTAIN))
    assert learning._history(seq).rates.own[0].verified == 0
    learning.observe(seq, 3, 1, (CERTAIN, 0.5, 0.5))
    assert [rate.verified for rate in learning._history(seq).rates.own[:2]] == [1, 0]


def test_a_prediction_that_is_wrong_is_drafted_less_for_others_too_but_not_for_one_whose_own_is_right() -> None:
    good, bad, new = sequences(3)
    learning = policy(Told(num_predicted=6), target={1: 1.0, 64: 40.0})
    for _ in range(60):
        learning.observe(good, 6, 6, (PREDICTED,) * 6)
        learning.observe(bad, 1, 0, (PREDICTED,))
    lengths = learning.lengths([good, bad, new], [8] * 3, BUDGET, 3)
    assert lengths[0] > lengths[2] >= lengths[1] == 0


def test_a_drafter_that_was_given_up_is_tried_again_though_something_is_always_forced() -> None:
    (seq,) = sequences(1)
    idle = policy(Told(num_forced=2), call=0.6)
    for _ in range(30):
        idle.observe(seq, 3, 2, (CERTAIN, CERTAIN, 0.5))
    lengths = []
    for _ in range(300):
        lengths.append(length_of(idle, seq))
        idle.observe(seq, lengths[-1], 2, (CERTAIN, CERTAIN, *[0.5] * (lengths[-1] - 2)))
        num_calls = lengths[-1] - 2
        idle.observe_step(StepTiming(1 + lengths[-1], lengths[-1], 1.0, num_calls, num_calls, 0, 0.6 * num_calls))
    assert set(lengths) == {2, 3}
    assert 0 < lengths.count(3) < 20


def test_who_drafts_on_counts_what_was_foreseen() -> None:
    """The longer the drafts in front, the more a step has already, and the less one more draft is worth its call; the sum is right."""
    (seq,) = sequences(1)
    asked = policy(Told(num_forced=2), call=0.05)
    assert length_of(asked, seq) == 8
    assert asked._round.tokens == 3
    assert asked._round.num_rows == 3
    asked.who_goes_on([Drafting(seq, [CERTAIN, CERTAIN, 0.95], 5)])
    assert asked._round.tokens == pytest.approx(3 + asked._calibration(seq).rate(0.95))
    assert asked._round.num_rows == 4


def test_which_tokens_are_foreseen_changes_no_length() -> None:
    rng, seqs, found = random.Random(4), sequences(3), list[list[list[int]]]()
    for _ in range(2):
        told = Told(num_forced=2, num_predicted=3)
        one, lengths = policy(told, call=0.3), list[list[int]]()
        for _ in range(20):
            told.token_id = rng.randrange(99)
            lengths.append(one.lengths(seqs, [8] * 3, BUDGET, 3))
        found.append(lengths)
    assert found[0] == found[1]


def test_who_has_nothing_foreseen_is_not_asked() -> None:
    told = Told(num_forced=2)
    seq = Sequence(make_request(id="plain"), Choice())
    assert length_of(policy(told), seq) == 0
    assert told.num_asked == 0


def test_a_drafter_that_looks_up_says_which_drafts_were_foreseen() -> None:
    seq = Sequence(make_request(prompt=(1, 2, 3, 1, 2)), Choice())
    plan = StepPlan((Chunk(seq, 1, completes=True, max_draft=4),))
    drafts = NGramDrafter(foresight=Told(num_forced=1, num_predicted=1)).propose(plan, 99)
    assert drafts.confidences == ((CERTAIN, PREDICTED, 1.0, 1.0)[: drafts.lengths[0]],)
    assert drafts.lengths[0] >= 2
