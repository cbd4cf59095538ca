"""Exact laws of the Verifier, without sampling noise, then a sampled check through the whole engine."""

from __future__ import annotations

import copy
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from engine.config import AdaptiveLengthConfig, ConfidenceLengthConfig, FixedLengthConfig, LengthConfig
from engine.dials import DIALS
from engine.draft.model import ModelDrafter
from engine.plan import DraftBatch, QKind, RowBatch, Rows
from engine.request import Choice, Request, SamplingParams, SpeculationParams
from engine.sequence import Sequence
from engine.verify.block import BlockVerifier
from engine.verify.mixture import Mixture
from engine.verify.verifier import Verifier
from engine.verify.window import Window
from tests.reference import NEEDS_NO_Q, Pair, Row, answer, pi_of, processed, softmax
from tests.tiny import TEST_RULES, Setup, drive, make_core, naive_drafter, naive_target, target_model
from tests.verify.requests import RULES


def dials() -> list[tuple[str, float]]:
    """Every rule at its ends and in between."""
    found = [("keep_none", 0.0), ("keep_all", 0.0)]
    for rule, dial in DIALS.items():
        found += [(rule, alpha) for alpha in sorted({dial.low, dial.default, 0.0, 0.5, dial.high}) if dial.low <= alpha <= dial.high]
    return found


DIALLED = dials()
BETWEEN = tuple(dict(RULES).items())


def sequence(rule: str, alpha: float = 0.0, seed: int = 0, temperature: float = 1.0) -> Sequence:
    sampling, speculation = SamplingParams(max_tokens=9, seed=seed, temperature=temperature), SpeculationParams(rule=rule, alpha=alpha)
    return Sequence(Request(id=f"x{seed}", prompt_ids=(0,), sampling=sampling, speculation=speculation), Choice())


def at_temperature(logits: Tensor, temperature: float) -> Tensor:
    if temperature:
        return torch.softmax(logits / temperature, -1)
    return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)


@pytest.mark.parametrize(("rule", "alpha"), DIALLED)
@pytest.mark.parametrize("is_dense", [True, False], ids=["dense", "one-hot"])
def test_accept_or_recover_has_exactly_the_law_pi(rule: str, alpha: float, is_dense: bool) -> None:
    """q * min(1, pi / q) + lost * residual == pi to 1e-12, for every rule, temperature and mask."""
    generator, vocab, num = torch.Generator().manual_seed(5), 7, 200
    for temperature, masked in itertools.product((0.0, 0.5, 1.0), ("none", "both models", "target only")):
        q_logits, p_logits = (3 * torch.randn(num, vocab, generator=generator, dtype=torch.float64) for _ in range(2))
        allowed = None
        if masked != "none":  # a drafter that cannot mask drafts what is forbidden; no rule may let that stand
            allowed = torch.rand(num, vocab, generator=generator) < 0.6
            allowed[:, 2] = True
            p_logits = p_logits.masked_fill(~allowed, -torch.inf)
        if masked == "both models":
            assert allowed is not None
            q_logits = q_logits.masked_fill(~allowed, -torch.inf)
        p = Rows(at_temperature(p_logits, temperature), p_logits, allowed)
        drafted = torch.randint(vocab, (num,), generator=generator)
        q = at_temperature(q_logits, temperature) if is_dense else torch.nn.functional.one_hot(drafted, vocab).double()
        got_at, residual, full = _pieces(sequence(rule, alpha, 0, temperature), Rows(q, q_logits, None) if is_dense else None, p, drafted)
        for i in range(num):
            raw_q = softmax(tuple(q_logits[i].tolist())) if is_dense else _row(q[i])
            at = Pair(raw_q, softmax(_row(p_logits[i])), _row(q[i]), _row(p.probs[i]), temperature == 0)
            pi = pi_of(rule, alpha, at) if is_dense or rule in NEEDS_NO_Q else at.p
            want = torch.tensor(pi, dtype=torch.float64)
            torch.testing.assert_close(full[i], want, rtol=0, atol=1e-12)
            kept = torch.minimum(q[i], got_at[i])  # q * min(1, pi / q)
            torch.testing.assert_close(kept, torch.minimum(q[i], want), rtol=0, atol=1e-12)
            law = kept + (1 - kept.sum()) * residual[i] / residual[i].sum()
            torch.testing.assert_close(law, want, rtol=0, atol=1e-12)


def _row(x: Tensor) -> Row:
    return tuple(x.tolist())


def _twice(rows: Tensor) -> Tensor:
    return rows.unsqueeze(1).repeat(1, 2, 1)


def _pieces(seq: Sequence, q: Rows | None, p: Rows, drafted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What decides acceptance at every token, residual and full rows of num windows of one draft each (bonus rows are left out)."""
    num, kind = len(drafted), QKind.DENSE if q is not None else QKind.ONE_HOT
    allowed = None if p.allowed is None else p.allowed.repeat_interleave(2, 0)
    assert p.logits is not None
    doubled = Rows(p.probs.repeat_interleave(2, 0), p.logits.repeat_interleave(2, 0), allowed)
    wide = None if q is None or q.logits is None else Rows(_twice(q.probs), _twice(q.logits), None)
    batch = DraftBatch((1,) * num, drafted.unsqueeze(1), [[kind, QKind.NONE]] * num, wide, (0,) * num, (False,) * num, (0,) * num)
    rows = RowBatch((seq,) * 2 * num, (0, 1) * num, tuple(i // 2 for i in range(2 * num)), drafted.unsqueeze(1))
    mixture = Mixture(Window(batch, doubled, rows), TEST_RULES)
    first = torch.arange(num) * 2
    at = torch.stack([mixture.at(first, torch.full((num,), x)) for x in range(p.probs.shape[-1])], -1)
    return at, mixture.residual(first), mixture.full(first)


# ---------------------------------------------------------------- every draft of two tokens over three words
@cache
def table(salt: int, prefix: tuple[int, ...]) -> Row:
    """Logits of a table language model."""
    generator = torch.Generator().manual_seed(hash((salt, *prefix)) % 10_000)
    return _row(1.5 * torch.randn(3, generator=generator, dtype=torch.float64))


def pair(sampling: SamplingParams, prefix: tuple[int, ...]) -> Pair:
    """Rows of the two tables, the drafter's salt being 1."""
    q_logits, p_logits = (table(salt, prefix) for salt in (1, 2))
    is_greedy = sampling.temperature == 0
    return Pair(softmax(q_logits), softmax(p_logits), processed(q_logits, sampling), processed(p_logits, sampling), is_greedy)


@dataclass
class Cases:
    """Windows of two drafts with chosen numbers, each with its weight; all are verified as one batch."""

    drafts: list[tuple[int, int]] = field(default_factory=list)
    numbers: list[dict[tuple[int, int], float]] = field(default_factory=list)  # (offset, purpose) -> number
    weights: list[float] = field(default_factory=list)


def cells(weights: list[float]) -> Iterator[tuple[float, float]]:
    """For an inverse CDF: a number in the middle of every token's interval, and the interval's length."""
    total, low = sum(weights), 0.0
    for w in weights:
        if w > 0:
            yield low + w / total / 2, w / total
        low += w / total


def enumerate_cases(rule: str, alpha: float, temperature: float) -> Cases:
    """Split the space of numbers at the thresholds that the formulas name, one case for each cell."""
    cases, sampling = Cases(), SamplingParams(max_tokens=9, temperature=temperature)

    def rows(prefix: tuple[int, ...]) -> tuple[Row, Row, Row]:
        at = pair(sampling, prefix)
        return at.q, at.p, pi_of(rule, alpha, at)

    def walk(prefix: tuple[int, ...], numbers: dict[tuple[int, int], float], weight: float) -> None:
        offset = len(prefix)
        q, _, pi = rows(prefix)
        for x, (u, mass) in zip([i for i in range(3) if q[i] > 0], cells(list(q)), strict=True):
            threshold = min(1.0, pi[x] / q[x])
            here = {**numbers, (offset, 1): u}
            if threshold > 1e-12:
                accepted = {**here, (offset, 2): threshold / 2, (offset, 3): 0.5}
                if offset == 2:
                    close((*prefix, x), accepted, weight * mass * threshold)
                else:
                    walk((*prefix, x), accepted, weight * mass * threshold)
            if threshold < 1 - 1e-12:
                for v, share in cells([max(0.0, b - a) for a, b in zip(q, pi, strict=True)]):
                    rejected = {**here, (offset, 2): (1 + threshold) / 2, (offset, 3): v}
                    close((*prefix, x), rejected, weight * mass * (1 - threshold) * share)

    def close(drawn: tuple[int, ...], numbers: dict[tuple[int, int], float], weight: float) -> None:
        cases.drafts.append(((*drawn, 0, 0)[0], (*drawn, 0, 0)[1]))  # what lies behind a rejection does not matter
        cases.numbers.append(numbers)
        cases.weights.append(weight)

    walk((), {}, 1.0)
    return cases


def enumerate_blocks(rule: str, alpha: float, temperature: float) -> Cases:
    """The same for block verification: two drafts, a coin for each (all are looked at), and what is drawn behind them."""
    cases, sampling = Cases(), SamplingParams(max_tokens=9, temperature=temperature)
    for drafts in itertools.product(range(3), repeat=2):
        rows = [pair(sampling, drafts[:i]) for i in range(3)]
        pis = [pi_of(rule, alpha, at) for at in rows]
        mass = rows[0].q[drafts[0]] * rows[1].q[drafts[1]]
        if not mass:
            continue
        left = [1.0]
        for i, x in enumerate(drafts):
            left.append(min(1.0, left[i] * pis[i][x] / rows[i].q[x]))
        rests = [[max(0.0, left[i] * b - a) for a, b in zip(rows[i].q, pis[i], strict=True)] for i in range(2)]
        chances = [sum(rests[1]) / (sum(rests[1]) + 1 - left[1]) if sum(rests[1]) + 1 - left[1] > 0 else 1.0, left[2]]
        for passed in itertools.product((False, True), repeat=2):
            weight = mass
            for is_passed, chance in zip(passed, chances, strict=True):
                weight *= chance if is_passed else 1 - chance
            if weight <= 0:
                continue
            num = 2 if passed[1] else int(passed[0])
            coins = {
                (i, 2): chance / 2 if is_passed else (1 + chance) / 2
                for i, (is_passed, chance) in enumerate(zip(passed, chances, strict=True))
            }
            behind = list(pis[2]) if num == 2 else rests[num] if sum(rests[num]) > 0 else list(pis[num])
            for u, share in cells(behind):
                cases.drafts.append((drafts[0], drafts[1]))
                cases.numbers.append({**coins, (num, 3): u})
                cases.weights.append(weight * share)
    return cases


ENUMERATIONS: dict[str, tuple[type[Verifier], Callable[[str, float, float], Cases]]] = {
    "token": (Verifier, enumerate_cases),
    "block": (BlockVerifier, enumerate_blocks),
}


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize(("rule", "alpha"), BETWEEN)
@pytest.mark.parametrize("verification", ENUMERATIONS)
def test_all_drafts_of_two_tokens_enumerated(
    verification: str, rule: str, alpha: float, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The law of what a whole round emits is the product of the pi's."""
    verifier, enumerate_with = ENUMERATIONS[verification]
    cases = enumerate_with(rule, alpha, temperature)
    assert sum(cases.weights) == pytest.approx(1, abs=1e-9)
    seqs = [sequence(rule, alpha, seed, temperature) for seed in range(len(cases.drafts))]
    by_key = {seq.key: numbers for seq, numbers in zip(seqs, cases.numbers, strict=True)}

    def scripted(keys: Tensor, positions: Tensor, purpose: Any) -> Tensor:
        places = zip(keys.tolist(), positions.tolist(), strict=True)
        return torch.tensor([by_key[key].get((position - 1, int(purpose)), 0.5) for key, position in places], dtype=torch.float64)

    monkeypatch.setattr("engine.verify.window.uniforms", scripted)
    monkeypatch.setattr("engine.verify.window.keys_of_round", lambda keys, starts: keys)  # there is one round
    emitted = _verify_tables(verifier, cases, seqs, temperature)
    law: dict[tuple[int, ...], float] = defaultdict(float)
    for tokens, weight in zip(emitted, cases.weights, strict=True):
        law[tokens] += weight
    sampling = SamplingParams(max_tokens=9, temperature=temperature)
    for text in itertools.product(range(3), repeat=3):
        want, got = 1.0, 0.0
        for i in range(4):
            got += law[text[:i]] * _mass(rule, alpha, sampling, text, i)
        for i in range(3):
            want *= pi_of(rule, alpha, pair(sampling, text[:i]))[text[i]]
        assert got == pytest.approx(want, abs=1e-9)


def _mass(rule: str, alpha: float, sampling: SamplingParams, text: tuple[int, ...], start: int) -> float:
    """Probability that later rounds complete text[:start] to text."""
    mass = 1.0
    for i in range(start, 3):
        mass *= pi_of(rule, alpha, pair(sampling, text[:i]))[text[i]]
    return mass


def _verify_tables(verifier: type[Verifier], cases: Cases, seqs: list[Sequence], temperature: float) -> list[tuple[int, ...]]:
    num = len(cases.drafts)
    logits = {salt: torch.tensor([[table(salt, d[:j]) for j in range(3)] for d in cases.drafts], dtype=torch.float64) for salt in (1, 2)}
    q, p = (at_temperature(logits[salt], temperature) for salt in (1, 2))
    ids = torch.tensor(cases.drafts)
    batch = DraftBatch((2,) * num, ids, [[QKind.DENSE] * 3] * num, Rows(q, logits[1], None), (0,) * num, (False,) * num, (0,) * num)
    rows = RowBatch(tuple(s for s in seqs for _ in range(3)), (0, 1, 2) * num, tuple(i // 3 for i in range(3 * num)), ids)
    verdict = verifier(TEST_RULES).verify(batch, Rows(p.flatten(0, 1), logits[2].flatten(0, 1), None), rows)
    return list(verdict.token_ids)


def test_a_row_that_sums_to_more_than_one_keeps_what_is_kept() -> None:
    """1 - q(A) may come out below zero; pi / q would then fall below 1 on A and reject what the rule trusts."""
    q = Rows(torch.tensor([[0.5, 0.25, 0.2500001]]), torch.zeros(1, 3), None)
    p = Rows(torch.tensor([[0.34, 0.33, 0.33]]), torch.zeros(1, 3), None)
    at, _, _ = _pieces(sequence("token_v3", 0.5), q, p, torch.tensor([0]))
    assert (at >= q.probs).all()


# ---------------------------------------------------------------- sampled, through the whole engine
def chosen_by(policy: str, max_draft: int) -> LengthConfig:
    if policy == "confidence":  # in the middle of what the tiny drafter has at the second position: it depends on the first token
        return ConfidenceLengthConfig(max=max_draft, threshold=0.165)
    return AdaptiveLengthConfig(max=max_draft)


@pytest.mark.parametrize(("policy", "max_draft"), [("confidence", 3), ("adaptive", 2)])
@pytest.mark.parametrize("rule", ["exact", "token_v3"])
def test_a_length_that_looks_at_rows_leaves_the_law(policy: str, max_draft: int, rule: str) -> None:
    """Whether a position is verified depends on its row, never on the token drawn there."""
    check_law("model", rule, False, "token", chosen_by(policy, max_draft), max_draft + 1)


def test_a_length_that_looks_at_the_drawn_token_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mistake that the test above is there for: unlikely drafts are dropped, and their positions drawn from p."""
    real = ModelDrafter._batch

    def dropping(self: ModelDrafter, drafts: Any, table: Any) -> DraftBatch:
        for draft in table.drafts:
            at = draft.row, 0
            if draft.num_drafted and table.probs[at][table.ids[at]] < 0.25:
                draft.kinds.clear()
                draft.has_row = False
        return real(self, drafts, table)

    monkeypatch.setattr(ModelDrafter, "_batch", dropping)
    with pytest.raises(AssertionError):
        check_law("model", "exact", False, "token", FixedLengthConfig(max=1), 2)


@pytest.mark.parametrize("verification", ENUMERATIONS)
@pytest.mark.parametrize("is_seeded", [True, False])
@pytest.mark.parametrize(("drafter", "rule"), [("model", "exact"), ("model", "token_v3"), ("ngram", "exact"), ("none", "exact")])
def test_sampled_law_of_a_text(drafter: str, rule: str, is_seeded: bool, verification: Literal["token", "block"]) -> None:
    num_drafts = 2 if verification == "block" else 1
    check_law(drafter, rule, is_seeded, verification, FixedLengthConfig(max=num_drafts), num_drafts + 1)


def check_law(
    drafter: str, rule: str, is_seeded: bool, verification: Literal["token", "block"], policy: LengthConfig, num_tokens: int
) -> None:
    """Chi-square of texts over many choices against the product of pi's; also shows that the numbers are independent."""
    num, head = 6000, (1, 2, 3, 1, 2)
    sampling = SamplingParams(max_tokens=num_tokens, temperature=1.0, top_k=4, seed=1, is_seeded=is_seeded)
    alpha = dict(RULES)[rule]
    speculation = SpeculationParams(rule=rule, alpha=alpha)
    setup = Setup(drafter=drafter, policy=policy, verification=verification, num_blocks=1500, max_sequences=300, max_step_tokens=3000)
    core = make_core(setup)
    seen: Counter[tuple[int, ...]] = Counter()
    for first in range(0, num, 300):
        choices = tuple(Choice(i) for i in range(first, first + 300))
        request = Request(id="x", prompt_ids=head, sampling=sampling, speculation=speculation, choices=choices)
        seen.update(drive(core, [request]).tokens.values())

    def pi(text: tuple[int, ...]) -> Row:
        p = processed(naive_target().logits(list(text)), sampling)
        if drafter != "model":
            return p
        q_logits, p_logits = (m.logits(list(text)) for m in (naive_drafter(), naive_target()))
        return pi_of(rule, alpha, Pair(softmax(q_logits), softmax(p_logits), processed(q_logits, sampling), p))

    expected: dict[tuple[int, ...], float] = {(): num}
    for _ in range(num_tokens):
        expected = {(*text, x): e * a for text, e in expected.items() for x, a in enumerate(pi((*head, *text))) if a}
    assert seen.keys() <= expected.keys()
    rare = {text for text, e in expected.items() if e < 5}
    chi2 = sum((seen[text] - e) ** 2 / e for text, e in expected.items() if text not in rare)
    freedom = len(expected) - len(rare)
    assert freedom >= 4
    assert chi2 < freedom + 4.5 * (2 * freedom) ** 0.5  # exceeded by chance about once in 100,000


@pytest.mark.parametrize("verification", ENUMERATIONS)
def test_the_second_round_follows_the_law_too(verification: Literal["token", "block"], monkeypatch: pytest.MonkeyPatch) -> None:
    """Chi-square of the token at each place. The round before has looked at coins of these places, and of drafts that fell."""
    num, num_tokens, head = 18_000, 3, (1, 2, 3, 1, 2)
    sampling = SamplingParams(max_tokens=num_tokens, temperature=1.5, seed=1, is_seeded=True)
    drafter, generator = copy.deepcopy(target_model()), torch.Generator().manual_seed(5)
    for weight in drafter.parameters():  # so far off that drafts fall often, and so near that coins decide
        weight += 0.2 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    monkeypatch.setattr("tests.tiny.drafter_model", lambda *_: drafter)
    core = make_core(
        Setup(policy=FixedLengthConfig(max=2), verification=verification, num_blocks=1500, max_sequences=300, max_step_tokens=3000)
    )
    seen: list[Counter[int]] = [Counter() for _ in range(num_tokens)]
    for first in range(0, num, 300):
        request = Request(id="x", prompt_ids=head, sampling=sampling, choices=tuple(Choice(i) for i in range(first, first + 300)))
        for tokens in drive(core, [request]).tokens.values():
            for place, token in enumerate(tokens):
                seen[place][token] += 1
    texts: dict[tuple[int, ...], float] = {(): num}
    for found in seen:
        rows = {text: processed(naive_target().logits([*head, *text]), sampling) for text in texts}
        texts = {(*text, x): e * p for text, e in texts.items() for x, p in enumerate(rows[text]) if p}
        expected = defaultdict[int, float](float)
        for text, e in texts.items():
            expected[text[-1]] += e
        common = [x for x, e in expected.items() if e >= 5]
        chi2 = sum((found[x] - expected[x]) ** 2 / expected[x] for x in common)
        assert chi2 < len(common) + 4.5 * (2 * len(common)) ** 0.5


def test_the_oracle_itself_is_seeded_by_choice() -> None:
    request = Request(id="x", prompt_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=8, seed=4, is_seeded=True))
    texts = {answer(request, naive_target(), naive_drafter(), choice=i) for i in range(4)}
    assert len(texts) == 4
