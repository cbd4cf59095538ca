"""pi, the distribution that was agreed to be emitted, of any row of a window: what rules keep becomes what the Verifier weighs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from engine.plan import QKind, Rule
from engine.transfer import to_device
from engine.verify.window import Raw, Window


class Mixture:
    """pi = q on A + eta * p, eta = max(0, 1 - q(A)), without ever holding all rows of it.

    Rows of a lenient rule that keep nothing have pi = min(q, p / l) + R * norm(max(0, p - q)) instead, l in [0, 1] being their lenience and
    R what the first term leaves to 1. At l = 1 that is p.
    """

    def __init__(self, window: Window, rules: Mapping[str, Rule]):
        self._window = window
        names = [seq.request.speculation.rule for seq in window.rows.seqs]
        # known without asking the device; everything else is exact, and cheap
        self.cascading = frozenset(row for row, name in enumerate(names) if not rules[name].is_lossless)
        self._judged = _judged(window, rules, names)
        lenient = [row for name, members in self._judged.items() if rules[name].is_lenient for row in members]
        self._lenience = self._lenience_of(lenient) if lenient else None  # [R]
        self._keeps = self._keep_sets(rules)  # [R, V], or [R, 1] where every rule of the batch keeps all or nothing

    def _keep_sets(self, rules: Mapping[str, Rule]) -> Tensor:
        window = self._window
        found = [self._keep_set(rules[name], members) for name, members in self._judged.items()]
        width = max((keep.shape[-1] for _, keep in found), default=1)
        keeps = torch.zeros(len(window.kinds), width, dtype=torch.bool, device=window.device)
        for members, keep in found:
            keeps[members] = keep
        return keeps

    def _keep_set(self, rule: Rule, members: list[int]) -> tuple[Tensor, Tensor]:
        """Rows [N], and A of each."""
        window, at = self._window, to_device(members, self._window.device)
        params = [window.rows.seqs[row].request.sampling for row in members]
        keep = rule.keep(Raw(window, at, params), window.alpha[at])
        return at, keep if window.p.allowed is None else keep & window.p.allowed[at]

    def _lenience_of(self, lenient: list[int]) -> Tensor:
        lenience = torch.ones(len(self._window.kinds), dtype=self._window.p.probs.dtype, device=self._window.device)
        sampled = [row for row in lenient if not self._window.rows.seqs[row].request.sampling.is_greedy]
        at = to_device(sampled, self._window.device, torch.long)
        lenience[at] = 1 - self._window.alpha[at, 0]
        return lenience

    @cached_property
    def _eta(self) -> Tensor:  # [R]
        if self._keeps.shape[-1] == 1:  # all or nothing: q(A) is 1 or 0, and no row needs to be read
            return (~self._keeps[:, 0]).to(self._window.p.probs.dtype)
        mass = (self._window.q_rows(self._window.everywhere) * self._keeps).sum(-1)
        return (1 - mass).clamp(min=0)  # 1 - 1 can come out as -1e-16, which would reject a token that is in A

    def keep_at(self, rows: Tensor, x: Tensor) -> Tensor:
        """[N] whether x is in A."""
        keeps = self._keeps[rows]
        return keeps[:, 0] if keeps.shape[-1] == 1 else keeps.gather(-1, x.unsqueeze(-1)).squeeze(-1)

    def at(self, rows: Tensor, x: Tensor) -> Tensor:
        """[N] pi(x) where it is less than q(x), and something that is not where it is not: what acceptance needs to know."""
        p = self._window.p_at(rows, x)
        if self._lenience is not None:
            lenience = self._lenience[rows]
            p = torch.where(p < lenience, p / lenience, (p > 0).to(p.dtype))  # 1 is never below q
        return self._window.q_at(rows, x) * self.keep_at(rows, x) + self._eta[rows] * p

    def full(self, rows: Tensor) -> Tensor:
        """[N, V] pi."""
        p = self._window.p.probs[rows]
        if not self.cascading:
            return p
        q = self._window.q_rows(rows)
        pi = self._eta[rows].unsqueeze(-1) * p + q * self._keeps[rows]
        if self._lenience is None:
            return pi
        lenience = self._lenience[rows].unsqueeze(-1)
        return torch.where(lenience < 1, _lenient(q, p, lenience), pi)

    def residual(self, rows: Tensor) -> Tensor:
        """[N, V] proportional to max(0, pi - q), or pi where that is zero everywhere: pi equals q up to rounding."""
        new = self._eta[rows].unsqueeze(-1) * self._window.p.probs[rows]
        residual = (new - self._window.q_rows(rows) * ~self._keeps[rows]).clamp(min=0)
        return torch.where(residual.sum(-1, keepdim=True) > 0, residual, self.full(rows))


def _judged(window: Window, rules: Mapping[str, Rule], names: list[str]) -> dict[str, list[int]]:
    """Rows by rule. Without a row q a rule that needs it cannot judge, and without a draft there is nothing to judge: then A is empty."""
    judged: dict[str, list[int]] = defaultdict(list)
    for row, (name, kind) in enumerate(zip(names, window.kinds, strict=True)):
        if not rules[name].is_lossless and (kind is QKind.DENSE or (kind is QKind.ONE_HOT and not rules[name].needs_q)):
            judged[name].append(row)
    return judged


def _lenient(q: Tensor, p: Tensor, lenience: Tensor) -> Tensor:
    """min(q, p / lenience), and what that leaves to 1 where p is above q. [N, V]; lenience is [N, 1]."""
    kept = torch.where(p < lenience * q, p / lenience, q * (p > 0))
    missing = (p - q).clamp(min=0)
    share = (1 - kept.sum(-1, keepdim=True)).clamp(min=0)
    return kept + share * missing / missing.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
