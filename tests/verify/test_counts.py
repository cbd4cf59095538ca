"""What is counted of drafts that a Verifier judged: accepted, deferred, lossy-kept."""

from __future__ import annotations

import pytest
import torch

from engine.plan import DraftBatch, QKind, RowBatch, Rows
from engine.verify.block import BlockVerifier
from engine.verify.verifier import Verifier
from tests.tiny import TEST_RULES
from tests.verify.test_laws import sequence


def test_counts_of_deferred_and_lossy_kept_drafts() -> None:
    """Deferred: verified and not in A. Lossy-kept: stands under the rule, and the same coin would have rejected it under exact."""
    q_logits = torch.log(torch.tensor([[[0.9, 0.05, 0.05]] * 3], dtype=torch.float64))
    p_logits = torch.log(torch.tensor([[0.001, 0.5, 0.499]] * 3, dtype=torch.float64))
    ids = torch.tensor([[0, 0]])
    batch = DraftBatch((2,), ids, [[QKind.DENSE] * 3], Rows(q_logits.exp(), q_logits, None), (0,), (False,), (0,))
    p = Rows(p_logits.exp(), p_logits, None)
    for rule, accepted, deferred, lossy in (("exact", 0, 0b1, 0), ("keep_none", 0, 0b1, 0), ("keep_all", 2, 0, 0b11)):
        rows = RowBatch((sequence(rule),) * 3, (0, 1, 2), (0, 0, 0), ids)
        verdict = Verifier(TEST_RULES).verify(batch, p, rows)
        assert (verdict.num_accepted, verdict.deferred_masks, verdict.lossy_masks) == ((accepted,), (deferred,), (lossy,)), rule


@pytest.mark.parametrize("verifier", [Verifier, BlockVerifier])
@pytest.mark.parametrize("rule", ["exact", "keep_none", "lossy"])
def test_where_pi_is_p_nothing_is_lossy_kept(rule: str, verifier: type[Verifier]) -> None:
    """However many windows are looked at, and whoever foresaw drafts of them."""
    rng, num_accepted = torch.Generator().manual_seed(1), 0
    for seed in range(60):
        q, p = (torch.softmax(torch.randn(3, 4, generator=rng, dtype=torch.float64), -1) for _ in range(2))
        ids = torch.tensor([[int(torch.multinomial(q[i], 1, generator=rng)) for i in range(2)]])
        kinds: list[list[int]] = [[QKind.DENSE, QKind.GIVEN if seed % 3 == 0 else QKind.DENSE, QKind.DENSE]]
        batch = DraftBatch((2,), ids, kinds, Rows(q.unsqueeze(0), q.log().unsqueeze(0), None), (0,), (False,), (0,))
        rows = RowBatch((sequence(rule, 0.0, seed),) * 3, (0, 1, 2), (0, 0, 0), ids)
        verdict = verifier(TEST_RULES).verify(batch, Rows(p, p.log(), None), rows)
        num_accepted += verdict.num_accepted[0]
        assert verdict.lossy_masks == (0,)
    assert num_accepted > 20


def test_a_block_that_is_kept_whole_is_lossy_where_the_same_coins_would_not_have() -> None:
    q_logits = torch.log(torch.tensor([[[0.9, 0.05, 0.05]] * 3], dtype=torch.float64))
    p_logits = torch.log(torch.tensor([[0.001, 0.5, 0.499]] * 3, dtype=torch.float64))
    ids = torch.tensor([[0, 0]])
    batch = DraftBatch((2,), ids, [[QKind.DENSE] * 3], Rows(q_logits.exp(), q_logits, None), (0,), (False,), (0,))
    for rule, accepted, lossy in (("exact", 0, 0), ("keep_none", 0, 0), ("keep_all", 2, 0b11)):
        rows = RowBatch((sequence(rule),) * 3, (0, 1, 2), (0, 0, 0), ids)
        verdict = BlockVerifier(TEST_RULES).verify(batch, Rows(p_logits.exp(), p_logits, None), rows)
        assert (verdict.num_accepted, verdict.lossy_masks) == ((accepted,), (lossy,)), rule


def test_lossy_kept_drafts_without_probabilities(monkeypatch: pytest.MonkeyPatch) -> None:
    """x is drawn from pi; the draft is lossy-kept where the same number would have drawn another token from p."""
    monkeypatch.setattr("engine.verify.window.uniforms", lambda keys, positions, purpose: torch.full(keys.shape, 0.8).double())
    p_logits = torch.log(torch.tensor([[0.5, 0.3, 0.2]] * 2, dtype=torch.float64))
    for draft, rule, expected in (
        (0, "token_v3", ((1,), (0,), (0b1,))),
        (0, "exact", ((0,), (0b1,), (0,))),
        (2, "token_v3", ((1,), (0b1,), (0,))),
    ):
        ids = torch.tensor([[draft]])
        batch = DraftBatch((1,), ids, [[QKind.ONE_HOT, QKind.NONE]], None, (0,), (False,), (0,))
        rows = RowBatch((sequence(rule, 0.5),) * 2, (0, 1), (0, 0), ids)
        verdict = Verifier(TEST_RULES).verify(batch, Rows(p_logits.exp(), p_logits, None), rows)
        assert (verdict.num_accepted, verdict.deferred_masks, verdict.lossy_masks) == expected


def test_what_stands_behind_a_rejection_is_not_counted() -> None:
    """Position 0 is rejected; the draft at position 1 would have stood, and only thanks to the rule."""
    q_logits = torch.log(torch.tensor([[[0.25, 0.25, 0.25, 0.25], [0.9, 0.04, 0.03, 0.03], [0.25] * 4]], dtype=torch.float64))
    p_logits = torch.log(torch.tensor([[1e-9, 0.5, 0.3, 0.2]] * 3, dtype=torch.float64))
    ids = torch.tensor([[0, 0]])
    batch = DraftBatch((2,), ids, [[QKind.DENSE] * 3], Rows(q_logits.exp(), q_logits, None), (0,), (False,), (0,))
    rows = RowBatch((sequence("chow", 0.7),) * 3, (0, 1, 2), (0, 0, 0), ids)
    verdict = Verifier(TEST_RULES).verify(batch, Rows(p_logits.exp(), p_logits, None), rows)
    assert (verdict.num_accepted, verdict.deferred_masks, verdict.lossy_masks) == ((0,), (0b1,), (0,))
