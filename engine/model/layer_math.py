"""What a decoder layer computes between its products: norms, residual sums, rotation, gating. Who may compute it, and torch's way.

TORCH runs on every device and in every dtype; triton_layer.py has kernels that do several of its operations at once. Whoever computes it,
a row's numbers do not depend on the rows beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

Rotary = tuple[Tensor, Tensor]  # of cosines and of sines, in a form that whoever made them knows


@dataclass(frozen=True, slots=True)
class RotatedHeads:
    """The heads that one product gives, of queries, then keys, then values. Rotation is for the first two."""

    num_queries: int
    num_keys: int  # and as many of values
    head_dim: int
    q_norm: nn.Module | None = None  # of each head, in front of the rotation; both or neither
    k_norm: nn.Module | None = None

    def parts(self, heads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of heads [N, queries + 2 * keys, head_dim]."""
        return heads[:, : self.num_queries], heads[:, self.num_queries : -self.num_keys], heads[:, -self.num_keys :]


class LayerMath(Protocol):
    """A way to compute it. What it makes are modules, which hold the weights that they need."""

    def say(self, note: str) -> None:
        """For the log."""

    def tables(self, cosines: Tensor, sines: Tensor) -> Rotary:
        """Rotary tables [1, N, head_dim] of transformers, both halves alike, in the form that `rotation` takes."""

    def norm(self, own: nn.Module) -> nn.Module:
        """In the place of a norm: takes x [..., hidden], and may take a delta of the same shape, which is added to x in place before."""

    def rotation(self, of: RotatedHeads) -> nn.Module:
        """Takes heads [N, queries + 2 * keys, head_dim], which it may overwrite, and Rotary; gives the heads, normed and rotated."""

    def gating(self, act_fn: nn.Module) -> nn.Module:
        """Takes [..., 2 * width], gate before up, which it may overwrite; gives act(gate) * up [..., width]."""


def signed(cosines: Tensor, sines: Tensor) -> Rotary:
    """Rotary tables [1, N, head_dim] of transformers as `rotate_` takes them, a sine with the sign of the half that it multiplies."""
    half = sines.shape[-1] // 2
    return cosines[0].unsqueeze(1), torch.cat((-sines[0, :, :half], sines[0, :, half:]), -1).unsqueeze(1)


def rotate_(heads: Tensor, rotary: Rotary) -> Tensor:
    """Rotate heads [N, H, head_dim] in place by their positions: x cos + (-x2, x1) sin, for halves x1 and x2 (Su et al. 2021)."""
    swapped = heads.roll(heads.shape[-1] // 2, -1)
    return heads.mul_(rotary[0]).addcmul_(swapped, rotary[1])


class QuickNorm(nn.Module):
    """Root-mean-square norm as one operation (Zhang and Sennrich 2019)."""

    def __init__(self, weight: Tensor, epsilon: float):
        super().__init__()
        self.weight = nn.Buffer(weight, persistent=False)
        self._epsilon = epsilon

    def forward(self, x: Tensor, delta: Tensor | None = None) -> Tensor:
        """x [..., hidden] to [..., hidden]."""
        return nn.functional.rms_norm(x if delta is None else x.add_(delta), self.weight.shape, self.weight, self._epsilon)


class OwnNorm(nn.Module):
    """A norm as the model has it."""

    def __init__(self, own: nn.Module):
        super().__init__()
        self.own = own

    def forward(self, x: Tensor, delta: Tensor | None = None) -> Tensor:
        """x [..., hidden] to [..., hidden]."""
        normed: Tensor = self.own(x if delta is None else x.add_(delta))
        return normed


def weight_and_epsilon(own: nn.Module) -> tuple[Tensor, float] | None:
    """Of what looks like a norm; None for other modules."""
    epsilon = getattr(own, "variance_epsilon", getattr(own, "eps", None))
    weight = getattr(own, "weight", None)
    return (weight.detach(), epsilon) if isinstance(weight, Tensor) and isinstance(epsilon, float) else None


def quick_norm(own: nn.Module) -> QuickNorm | OwnNorm:
    """The norm as one operation where that gives the same bits, else as it is: where it rounds in between, or is another norm."""
    if (parts := weight_and_epsilon(own)) is None:
        return OwnNorm(own)
    weight, epsilon = parts
    sample = torch.linspace(-3, 3, 4 * len(weight), device=weight.device).sin().view(4, -1).to(weight.dtype)
    for effective in (weight, 1 + weight):  # Gemma's weights are differences from one
        quick = QuickNorm(effective, epsilon)
        if torch.equal(quick(sample), own(sample)):
            return quick
    return OwnNorm(own)


class _Rotation(nn.Module):
    def __init__(self, of: RotatedHeads):
        super().__init__()
        self._of = of
        self.q_norm = None if of.q_norm is None else quick_norm(of.q_norm)
        self.k_norm = None if of.k_norm is None else quick_norm(of.k_norm)

    def forward(self, heads: Tensor, rotary: Rotary) -> Tensor:
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys, values = self._of.parts(heads)
            heads = torch.cat((self.q_norm(queries), self.k_norm(keys), values), 1)
        rotate_(heads[:, : -self._of.num_keys], rotary)
        return heads


class _Gating(nn.Module):
    def __init__(self, act_fn: nn.Module):
        super().__init__()
        self.act_fn = act_fn

    def forward(self, joint: Tensor) -> Tensor:
        gate, up = joint.chunk(2, -1)
        gated: Tensor = self.act_fn(gate).mul_(up)
        return gated


class TorchMath:
    """By torch's operations, one after another."""

    def say(self, note: str) -> None:
        """There is nothing that it would not take."""

    def tables(self, cosines: Tensor, sines: Tensor) -> Rotary:
        return signed(cosines, sines)

    def norm(self, own: nn.Module) -> nn.Module:
        return quick_norm(own)

    def rotation(self, of: RotatedHeads) -> nn.Module:
        return _Rotation(of)

    def gating(self, act_fn: nn.Module) -> nn.Module:
        return _Gating(act_fn)


TORCH = TorchMath()
