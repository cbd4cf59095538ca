"""How far a drafter is from its target, row by row, and the gradient of that; nothing here knows a model.

q is the drafter's distribution, p the target's. With a reduced vocabulary D, q is zero outside D, and what p has there cannot be won:

- kl: sum over D of p (log p - log q). Over all tokens it is KL(p || q), which would be infinite otherwise. It is p(D) times the divergence
  of p within D, and a constant: a position counts as much as p's mass in D.
- tv: the sum over all tokens of max(0, p - q), so 1 - sum over D of min(p, q): the probability that a draft is rejected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Loss = Literal["kl", "tv"]
CACHED_ROWS = 64  # over a vocabulary that are judged at a time on a CPU: a dozen passes over more would each go through memory


@dataclass(frozen=True)
class TargetRows:
    """What a target thinks of R rows."""

    log_p: Tensor  # [R, N], of the tokens that the drafter may draft; over all tokens p sums to 1
    favourites: Tensor  # [R], the largest of all tokens

    def split(self, num_rows: int) -> list[TargetRows]:
        pairs = zip(self.log_p.split(num_rows), self.favourites.split(num_rows), strict=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return [TargetRows(log_p, favourites) for log_p, favourites in pairs]


@torch.no_grad()
def target_rows(logits: Tensor, draft_ids: Tensor | None = None) -> TargetRows:
    """Of logits [R, V], float32 at least; `draft_ids` [N] are the tokens of the drafter's head, None all."""
    parts = []
    for some in logits.split(CACHED_ROWS if logits.device.type == "cpu" else len(logits)):  # type: ignore[no-untyped-call]  # torch leaves it untyped
        log_p = torch.log_softmax(some.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
        parts.append((log_p if draft_ids is None else log_p.index_select(-1, draft_ids), log_p.argmax(-1)))
    return TargetRows(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


@dataclass(frozen=True)
class Judgement:
    """R rows, judged."""

    loss: Tensor  # [R]
    acceptance: Tensor  # [R], sum of min(p, q): how likely a draft at temperature 1 stands
    agreement: Tensor  # [R], bool: both have the same favourite
    gradient: Tensor | None  # [R, N], of the sum of losses with respect to the drafter's logits


@torch.no_grad()
def judge(drafter: Tensor, target: TargetRows, loss: Loss, draft_ids: Tensor | None = None, needs_gradient: bool = True) -> Judgement:
    """Compare logits of a drafter [R, N] with what the target thinks; `draft_ids` [N] are the tokens of both, None all.

    Logits are made float32 at least. The gradient is written down rather than left to autograd, which would hold three more such matrices.
    """
    log_q = torch.log_softmax(drafter.to(torch.promote_types(drafter.dtype, torch.float32)), dim=-1)
    q, p = log_q.exp(), target.log_p.exp()
    acceptance = torch.minimum(p, q).sum(-1)
    drafted = log_q.argmax(-1)
    agreement = target.favourites == (drafted if draft_ids is None else draft_ids[drafted])
    if loss == "tv":
        value, gradient = 1 - acceptance, _tv_gradient(p, q) if needs_gradient else None
    else:
        value = torch.sub(target.log_p, log_q, out=log_q).mul_(p).sum(-1)
        gradient = q.mul_(p.sum(-1, keepdim=True)).sub_(p) if needs_gradient else None
    return Judgement(value, acceptance, agreement, gradient)


def _tv_gradient(p: Tensor, q: Tensor) -> Tensor:
    """Of -sum min(p, q) through the softmax: q (g - sum of q g) with g = -1 where q < p."""
    won = (q < p).to(q.dtype).mul_(q)  # q where more of it is accepted
    return q.mul_(won.sum(-1, keepdim=True)).sub_(won)


def joined(parts: Sequence[Judgement]) -> Judgement:
    """Judgements of rows, one after another."""
    gradients = [part.gradient for part in parts if part.gradient is not None]
    return Judgement(
        torch.cat([part.loss for part in parts]),
        torch.cat([part.acceptance for part in parts]),
        torch.cat([part.agreement for part in parts]),
        torch.cat(gradients) if gradients else None,
    )
