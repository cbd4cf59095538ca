"""Loss, gradient, acceptance and agreement against sums written out in plain Python, and against autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from engine.train.losses import Loss, judge, target_rows

V = 7
DRAFTED = [0, 2, 3, 6]


def rows(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drafter, target = (3 * torch.randn(5, n, generator=generator, dtype=torch.float64) for n in (V, V))
    return drafter, target


def softmax(logits: list[float]) -> list[float]:
    total = sum(map(math.exp, logits))
    return [math.exp(x) / total for x in logits]


@pytest.mark.parametrize("loss", ["kl", "tv"])
@pytest.mark.parametrize("drafted", [None, DRAFTED], ids=["all tokens", "some tokens"])
def test_rows_are_judged_as_by_hand(loss: Loss, drafted: list[int] | None) -> None:
    drafter, target = rows(1)
    ids = drafted or list(range(V))
    draft_ids = None if drafted is None else torch.tensor(drafted)
    found = judge(drafter[:, : len(ids)], target_rows(target, draft_ids), loss, draft_ids)
    for row in range(len(target)):
        p = softmax(target[row].tolist())
        q = dict(zip(ids, softmax(drafter[row, : len(ids)].tolist()), strict=True))
        acceptance = sum(min(p[v], q.get(v, 0.0)) for v in range(V))
        divergence = sum(p[v] * math.log(p[v] / q[v]) for v in ids)
        want = divergence if loss == "kl" else sum(max(0.0, p[v] - q.get(v, 0.0)) for v in range(V))
        assert float(found.loss[row]) == pytest.approx(want, abs=1e-12)
        assert float(found.acceptance[row]) == pytest.approx(acceptance, abs=1e-12)
        assert bool(found.agreement[row]) == (max(range(V), key=p.__getitem__) == max(q, key=q.__getitem__))


@pytest.mark.parametrize("loss", ["kl", "tv"])
@pytest.mark.parametrize("drafted", [None, DRAFTED], ids=["all tokens", "some tokens"])
def test_the_gradient_is_autograds(loss: Loss, drafted: list[int] | None) -> None:
    drafter, target = rows(2)
    ids = torch.tensor(drafted or range(V))
    logits = drafter[:, : len(ids)].clone().requires_grad_()
    q, p = logits.softmax(-1), target.softmax(-1)[:, ids]
    value = (p * (p / q).log()).sum() if loss == "kl" else -torch.minimum(p, q).sum()
    value.backward()
    draft_ids = None if drafted is None else ids
    thought = target_rows(target, draft_ids)
    found = judge(logits.detach(), thought, loss, draft_ids)
    assert found.gradient is not None
    torch.testing.assert_close(found.gradient, logits.grad, rtol=1e-10, atol=1e-12)
    assert judge(logits.detach(), thought, loss, draft_ids, needs_gradient=False).gradient is None


def test_half_precision_is_judged_in_single() -> None:
    drafter, target = rows(3)
    found = judge(drafter.bfloat16(), target_rows(target.bfloat16()), "kl")
    assert found.loss.dtype is torch.float32
    same = judge(drafter.bfloat16().double(), target_rows(target.bfloat16().double()), "kl")
    torch.testing.assert_close(found.loss.double(), same.loss, rtol=1e-5, atol=1e-6)
