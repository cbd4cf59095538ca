"""Draft lengths that adapt: survivals against costs, thresholds. No tensors."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass

import msgspec
import pytest

from engine.draft.adaptive import AdaptiveLength
from engine.draft.calibration import Calibration
from engine.draft.confidence import ConfidenceLength, best_threshold
from engine.draft.costs import PassCosts
from engine.plan import Drafting, StepTiming
from engine.request import Choice, SamplingParams
from engine.sequence import Sequence
from tests.unit.factories import make_request

BUDGET = 256
FLAT = {1: 1.0, 64: 1.0}  # more rows cost nothing


def sequences(num: int) -> list[Sequence]:
    """Whose drafter has kept up."""
    found = [Sequence(make_request(id=f"r{i}"), Choice()) for i in range(num)]
    for seq in found:
        seq.drafter_computed = len(seq.tokens) - 1
    return found


# ---------------------------------------------------------------------- adaptive
def adaptive(target: dict[int, float], drafter: dict[int, float] | None = None, max_length: int = 8) -> AdaptiveLength:
    return AdaptiveLength(max_length, PassCosts(target), None if drafter is None else PassCosts(drafter))


def chosen(policy: AdaptiveLength, seqs: list[Sequence], limit: int = 8, budget: int | None = None) -> list[int]:
    return policy.lengths(seqs, [limit] * len(seqs), BUDGET if budget is None else budget, len(seqs))


def teach(policy: AdaptiveLength, seq: Sequence, rounds: list[tuple[int, int]]) -> None:
    for num_draft, num_accepted in rounds:
        policy.observe(seq, num_draft, num_accepted)


def test_drafts_that_cost_nothing_are_all_made() -> None:
    assert chosen(adaptive(FLAT), sequences(3)) == [8, 8, 8]


def test_rows_that_cost_as_much_as_a_pass_are_not_drafted() -> None:
    policy = adaptive({1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0})
    assert chosen(policy, sequences(2)) == [0, 0]


def test_a_limit_and_a_budget_hold() -> None:
    policy, seqs = adaptive(FLAT), sequences(3)
    assert policy.lengths(seqs, [2, 0, 5], BUDGET, 3) == [2, 0, 5]
    assert sum(chosen(policy, seqs, budget=4)) == 4
    assert chosen(policy, seqs, budget=0) == [0, 0, 0]
    assert policy.lengths([], [], BUDGET, 0) == []


def test_who_is_accepted_more_drafts_more() -> None:
    policy, (good, bad) = adaptive({1: 1.0, 64: 4.0}), sequences(2)
    teach(policy, good, [(8, 8)] * 20)
    teach(policy, bad, [(8, 0)] * 20)
    lengths = chosen(policy, [good, bad])
    assert lengths[0] > 4
    assert lengths[1] == 0


def test_a_drafter_that_costs_much_drafts_little() -> None:
    cheap, dear, too_dear = (adaptive(FLAT, {1: share}) for share in (0.05, 0.3, 2.0))
    lengths = [drafted(policy, sequences(1)[0], [0.75] * 8) for policy in (cheap, dear, too_dear)]
    assert lengths[0] > lengths[1] > lengths[2] == 0


def drafted(policy: AdaptiveLength, seq: Sequence, confidences: list[float]) -> int:
    """How many drafts are made where rows have these confidences."""
    (most,) = policy.lengths([seq], [len(confidences)], BUDGET, 1)
    return next((num for num in range(1, most) if not policy.who_goes_on([Drafting(seq, confidences[:num], most - num)])[0]), most)


@dataclass
class World:
    """A pair with known acceptance and costs."""

    rate: float
    row: float  # seconds of one more row
    call: float  # seconds of a call of the drafter

    def speed(self, length: int) -> float:
        expected = sum(self.rate**i for i in range(length + 1))
        return expected / (1 + self.row * length + self.call * length)

    def play(self, policy: AdaptiveLength, num_steps: int) -> float:
        """Tokens a second of one stream under the policy."""
        rng, (seq,) = random.Random(3), sequences(1)
        tokens = seconds = 0.0
        for _ in range(num_steps):
            length = drafted(policy, seq, [0.5] * 8)  # they say nothing
            num = next((i for i in range(length) if rng.random() >= self.rate), length)
            target, drafter = 1 + self.row * length, self.call * length
            policy.observe(seq, length, num, [0.5] * length)
            policy.observe_step(StepTiming(1 + length, length, target, length, length, 0, drafter))
            tokens, seconds = tokens + num + 1, seconds + target + drafter
        return tokens / seconds


@pytest.mark.parametrize("world", [World(*w) for w in itertools.product((0.05, 0.3, 0.6, 0.9), (0.01, 0.1, 0.5), (0.02, 0.2))], ids=str)
def test_speed_comes_near_that_of_the_best_fixed_length(world: World) -> None:
    """Wrong costs to begin with: they are learnt, too."""
    policy = adaptive({1: 1.0, 8: 1.2}, {1: 0.1})
    best = max(world.speed(length) for length in range(9))
    got = world.play(policy, 4000)
    assert got > 0.95 * best, (got, best)
    assert got > 0.97 * world.speed(0)


@pytest.mark.parametrize("call", [0.05, 0.15])
def test_runs_are_followed_and_their_ends_are_seen(call: float) -> None:
    """Rows are sure or unsure in runs, and say so: better than any fixed length, with confidences that are not chances."""
    draw = random.Random(7)
    state, states = True, list[bool]()
    for _ in range(40_000):
        state = state if draw.random() < 0.85 else not state
        states.append(state)
    stands = [draw.random() < (0.95 if state else 0.1) for state in states]
    confidences = [0.6 if state else 0.3 for state in states]

    def speed(policy: AdaptiveLength | None, fixed: int = 0) -> float:
        (seq,), place, tokens, seconds = sequences(1), 0, 0, 0.0
        while place < len(states) - 20:
            limit = fixed if policy is None else policy.lengths([seq], [8], BUDGET, 1)[0]
            num = 0
            while num < limit:
                num += 1
                if policy is not None and not policy.who_goes_on([Drafting(seq, confidences[place : place + num], limit - num)])[0]:
                    break
            good = next((i for i in range(num) if not stands[place + i]), num)
            target, drafter = 1 + 0.01 * num, call * num
            if policy is not None:
                policy.observe(seq, num, good, confidences[place : place + num])
                policy.observe_step(StepTiming(1 + num, num, target, num, num, 0, drafter))
            place, tokens, seconds = place + good + 1, tokens + good + 1, seconds + target + drafter
        return tokens / seconds

    best = max(speed(None, fixed) for fixed in range(9))
    got = speed(adaptive({1: 1.0, 8: 1.07}, {1: call}))
    assert got > 1.03 * best, (got, best)


def asked(policy: AdaptiveLength, confidences: list[float], rooms: list[int]) -> list[bool]:
    """Who goes on behind one draft each."""
    seqs = sequences(len(confidences))
    policy.lengths(seqs, [room + 1 for room in rooms], BUDGET, len(seqs))
    found = policy.who_goes_on([Drafting(seq, [c], room) for seq, c, room in zip(seqs, confidences, rooms, strict=True)])
    for seq in seqs:
        policy.forget(seq)
    assert not policy._round.stand
    return found


def test_one_alone_pays_for_a_whole_call() -> None:
    """Calls that cost the same however many draft in them: what four share pays, and one of them alone does not."""
    policy = adaptive({1: 1.0, 64: 1.5}, {1: 0.15, 64: 0.15})
    assert asked(policy, [0.65] * 4, [7] * 4) == [True] * 4
    assert asked(policy, [0.65, 0.05, 0.05, 0.05], [7] * 4) == [False] * 4
    assert asked(policy, [0.65, 0.95, 0.95, 0.95], [7, 0, 0, 0]) == [False] * 4, "who may not go on does not share in the cost"


def test_the_likeliest_go_on() -> None:
    policy = adaptive({1: 1.0, 64: 3.0}, {1: 0.1, 64: 0.2})
    assert asked(policy, [0.95, 0.05, 0.75, 0.05], [7] * 4) == [True, False, True, False]


def test_after_a_while_without_drafts_one_is_tried() -> None:
    policy, (seq,) = adaptive({1: 1.0, 2: 1.5, 8: 4.0}), sequences(1)
    teach(policy, seq, [(8, 0)] * 30)
    lengths = []
    for _ in range(600):
        lengths += chosen(policy, [seq])
        policy.observe(seq, lengths[-1], 0)
    tried = [i for i, length in enumerate(lengths) if length]
    assert tried
    gaps = [b - a for a, b in itertools.pairwise(tried)]
    assert gaps == sorted(gaps), "each try that nothing comes of makes the next one rarer"
    assert all(lengths[i] == 1 for i in tried)


def test_tries_lose_a_hundredth_of_the_time_at_most() -> None:
    """Many sequences, of which each now and then has a draft that stands, but never for what a row and a call cost among so many."""
    policy, seqs = adaptive({1: 1.0, 16: 1.6, 32: 3.2, 64: 6.4}, {1: 0.3, 16: 0.6}), sequences(16)
    rng, seconds, tokens, num_tries = random.Random(1), 0.0, 0.0, 0
    for _ in range(3000):
        lengths = chosen(policy, seqs)
        for seq, length in zip(seqs, lengths, strict=True):
            num = int(length > 0 and rng.random() < 0.3)
            policy.observe(seq, length, num, [0.3] * length)
            tokens += 1 + num
        num_drafts = sum(map(bool, lengths))
        late = num_drafts * 20
        timing = StepTiming(16 + num_drafts, num_drafts, 1.6 + 0.1 * num_drafts, min(1, num_drafts), late, late, 0.3 * num_drafts)
        policy.observe_step(timing)
        seconds += timing.target_seconds + timing.drafter_seconds
        num_tries += num_drafts
    assert num_tries > 20, "what they are about may have changed"
    assert tokens / seconds > 0.98 * 16 / 1.6


def test_a_drafter_that_has_much_to_read_is_asked_where_enough_rounds_are_left() -> None:
    policy = adaptive(FLAT, {1: 0.1, 64: 6.4})
    late, ready = (Sequence(make_request(id=name, prompt=tuple(range(100)), max_tokens=400), Choice()) for name in ("late", "ready"))
    ready.drafter_computed = 99
    assert chosen(policy, [late])[0] > 0, "10 seconds that 32 rounds share"
    assert chosen(policy, [ready])[0] > 0
    late.tokens += range(390)  # 10 rounds are left for 49 seconds
    ready.tokens += range(390)
    ready.drafter_computed = 489
    assert chosen(policy, [late]) == [0]
    assert chosen(policy, [ready])[0] > 0
    assert chosen(policy, [ready, late])[1] == 0, "each its own"


def test_nobody_is_drafted_for_where_nobody_is_or_nothing_may_be_drafted() -> None:
    assert not AdaptiveLength(0, PassCosts(FLAT), PassCosts(FLAT)).expects_drafts(3)
    assert not AdaptiveLength(4, PassCosts({}), PassCosts({})).expects_drafts(0)


def test_a_pass_has_the_rows_that_are_due_however_small_the_budget() -> None:
    """Where memory ran out, a step holds less than the deployment allows."""
    policy = adaptive({1: 1.0, 8: 1.2, 16: 9.0, 256: 9.1})
    assert policy.lengths(sequences(8), [1] * 8, 24, 8) == [0] * 8
    assert policy.lengths(sequences(8), [1] * 8, 24, 200) == [1] * 8


def test_drafts_look_no_cheaper_beside_a_prompt() -> None:
    """What its tokens take passes in any case: a token is worth what it takes without them."""
    seconds = {1: 0.1, 256: 25.6}
    policy, seqs = adaptive({**seconds, 16: 1.0}), sequences(16)
    assert chosen(policy, seqs) == [0] * 16, "a row for a second's tenth, where 16 of them bring 16 tokens in one second"
    assert policy.lengths(seqs, [8] * 16, BUDGET, 200) == [0] * 16


def taught(longer: float) -> tuple[AdaptiveLength, list[Sequence]]:
    """Ten sequences whose policy has seen passes of 15 rows, with drafts, and without of another batch of its class."""
    policy = AdaptiveLength(8, PassCosts({1: 1.0, 10: 1.5, 16: 1.6, 32: 3.2}), PassCosts({1: 0.02, 16: 0.02}))
    for num, has_drafts in ([(15, False)] * 20 + [(10, True)]) * 60:
        policy.lengths(sequences(num), [0] * num, BUDGET, num)
        rows = 15 if not has_drafts else 15 - num
        policy.observe_step(StepTiming(15, rows * has_drafts, 1.6 * (longer if has_drafts else 1), 0, 0, 0, 0.0))
    return policy, sequences(10)


@pytest.mark.parametrize("longer", [1.0, 1.45])
def test_a_pass_that_checks_drafts_must_be_worth_that_too(longer: float) -> None:
    policy, seqs = taught(longer)
    pays = longer == 1.0
    assert any(chosen(policy, seqs)) is pays
    assert policy.expects_drafts(10) is pays


@pytest.mark.parametrize("num", [1, 3])
def test_a_try_pays_for_it_too(num: int) -> None:
    policy, seqs = taught(1.45)
    for seq in seqs:
        teach(policy, seq, [(1, 0)] * 40)
    policy._allowance = 2.0
    tried = next(lengths for _ in range(600) if any(lengths := policy.lengths(seqs, [1] * num + [0] * (10 - num), BUDGET, 10)))
    assert sum(tried) == num
    assert 2.0 - policy._allowance == pytest.approx(0.45 * 1.5, rel=0.4), "once for a step, however many tries it has"


def test_nobody_goes_on_for_a_prompt() -> None:
    def going(num_rows: int) -> list[bool]:
        policy, seqs = adaptive({1: 1.0, 16: 2.5, 256: 26.5}, {1: 0.1, 256: 0.1}), sequences(1)
        policy.lengths(seqs, [8], BUDGET, num_rows)
        return policy.who_goes_on([Drafting(seqs[0], [0.05], 4)])

    assert going(1) == going(200) == [False]


def test_prompts_are_left_for_later_where_drafts_do_not_pay() -> None:
    policy, seqs = adaptive({1: 1.0, 8: 1.1, 16: 2.0, 32: 2.5}, {1: 0.05, 16: 0.4}), sequences(16)
    assert policy.expects_drafts(1)
    assert policy.expects_drafts(16), "nothing is known yet"
    chosen(policy, seqs)
    for seq in seqs:
        teach(policy, seq, [(1, 0)] * 20)
    assert not policy.expects_drafts(16)
    assert policy.expects_drafts(1), "other batches have rates of their own"


def test_a_sequence_that_left_is_forgotten() -> None:
    policy, seqs = adaptive(FLAT), sequences(2)
    chosen(policy, seqs)
    for seq in seqs:
        policy.forget(seq)
    assert not policy._histories


# ---------------------------------------------------------------------- confidence
def test_drafting_stops_behind_an_unsure_row() -> None:
    (seq,) = sequences(1)
    newest, product = (ConfidenceLength(8, 0.4, is_cumulative) for is_cumulative in (False, True))
    rows = ([0.9], [0.9, 0.4], [0.9, 0.39], [0.1, 0.9])
    assert newest.who_goes_on([Drafting(seq, confidences, 1) for confidences in rows]) == [True, True, False, True]
    assert product.who_goes_on([Drafting(seq, confidences, 1) for confidences in ([0.9], [0.6, 0.7], [0.6, 0.6])]) == [True, True, False]


def test_the_threshold_is_where_missing_and_wasting_cost_least() -> None:
    """Against every threshold in turn."""
    rng = random.Random(5)
    for _ in range(50):
        samples = [(score := round(rng.random(), 1), rng.random() < score) for _ in range(40)]
        good, bad = [s for s, stood in samples if stood], [s for s, stood in samples if not stood]

        def cost(threshold: float, good: list[float] = good, bad: list[float] = bad) -> float:
            return sum(s >= threshold for s in bad) / len(bad) + 3 * sum(s < threshold for s in good) / len(good)

        assert cost(best_threshold(samples, 0.5)) == pytest.approx(min(cost(threshold) for threshold, _ in samples))
    assert best_threshold([(0.3, True)] * 5, 0.5) == best_threshold([(0.3, False)] * 5, 0.5) == 0.5


def test_the_threshold_learns() -> None:
    (seq,) = sequences(1)
    policy = ConfidenceLength(4, 0.1, is_cumulative=False)
    for _ in range(64):
        policy.observe(seq, 3, 2, (0.9, 0.8, 0.5))
    assert policy.threshold == 0.8
    assert policy.who_goes_on([Drafting(seq, [0.9, 0.7], 1)]) == [False]


def test_drafts_behind_the_end_of_an_answer_say_nothing_of_confidence() -> None:
    calibration, (seq,) = adaptive(FLAT, {1: 0.1}), sequences(1)
    calibration.observe(seq, 2, 2, (0.95, 0.95, 0.15, 0.15))
    fresh = Calibration()
    assert calibration._calibration(seq).rate(0.15) == fresh.rate(0.15)
    assert calibration._calibration(seq).rate(0.95) > fresh.rate(0.95)


def test_a_row_that_is_due_anyway_counts_as_spent() -> None:
    """Of a request with a seed, whose drafter runs without drafts, too: a step costs more, and another draft is worth its call sooner."""
    lengths = []
    for is_seeded in (False, True):
        policy = adaptive(FLAT, {1: 0.35})
        sampling = SamplingParams(max_tokens=9, is_seeded=is_seeded)
        seq = Sequence(msgspec.structs.replace(make_request(), sampling=sampling), Choice())
        lengths.append(drafted(policy, seq, [0.75] * 8))
    assert lengths[0] < lengths[1]


def test_what_a_drafter_reads_each_time_is_part_of_what_drafts_cost_and_a_prompt_is_not() -> None:
    """Among many streams it drafts now and then, and in front of every draft stands what came meanwhile."""
    drafter = PassCosts({1: 1.0, 8: 1.0})
    policy = AdaptiveLength(4, PassCosts({1: 10.0}), drafter)
    for _ in range(100):
        policy.observe_step(StepTiming(1, 0, 10.0, 1, 100, 99, 50.0))
    assert drafter.at(1) == 1.0
    for _ in range(100):
        policy.observe_step(StepTiming(1, 0, 10.0, 1, 4, 3, 2.0))
    assert drafter.at(1) == pytest.approx(2.0, rel=0.02)
