"""Attention, feed-forward and norms of a decoder layer in few operations: one product for what reads the same input, rotation in place.

They take the places of a transformers layer's modules and use that module's own weights, norms and activation. That they
compute the same is not taken for granted: stack.py compares logits with the model's own at every load.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine.errors import UnsupportedModel
from engine.model.attention import LayerAttention, PagedContext

Rotary = tuple[Tensor, Tensor]  # [N, 1, head_dim] each: cosines, and sines with the sign of the half that they multiply

_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
_NORMS = frozenset({"q_norm", "k_norm"})
_MLP = frozenset({"gate_proj", "up_proj", "down_proj", "act_fn"})


class Make(Protocol):
    """What takes the place of linear layers."""

    def __call__(self, *own: nn.Linear, has_heavy_tails: bool = False) -> nn.Module:
        """One layer for those that read the same input, their outputs one after another. The rest is said of that input."""
        ...


def signed(cosines: Tensor, sines: Tensor) -> Rotary:
    """Rotary tables [1, N, head_dim] of transformers, both halves alike, in the form that `rotate_` takes."""
    half = sines.shape[-1] // 2
    return cosines[0].unsqueeze(1), torch.cat((-sines[0, :, :half], sines[0, :, half:]), -1).unsqueeze(1)


def rotate_(heads: Tensor, rotary: Rotary) -> Tensor:
    """Rotate heads [N, H, head_dim] in place by their positions: x cos + (-x2, x1) sin, for halves x1 and x2 (Su et al. 2021)."""
    swapped = heads.roll(heads.shape[-1] // 2, -1)
    return heads.mul_(rotary[0]).addcmul_(swapped, rotary[1])


class FusedAttention(nn.Module):
    """Queries, keys and values as one product, over the paged cache."""

    def __init__(self, own: Any, asked: LayerAttention, num_kv_heads: int, make: Make):
        """`own` is the attention module that it replaces. Raises UnsupportedModel where that has parts that are not known here."""
        super().__init__()
        has_norms = _require_parts(own, _ATTENTION, _NORMS) == _NORMS
        self._asked = asked
        self._head_dim: int = own.head_dim
        self._num_kv_heads = num_kv_heads
        self.qkv_proj = make(own.q_proj, own.k_proj, own.v_proj)
        self.o_proj = make(own.o_proj)
        self.q_norm = quick_norm(own.q_norm) if has_norms else None
        self.k_norm = quick_norm(own.k_norm) if has_norms else None

    def forward(self, hidden_states: Tensor, position_embeddings: Rotary, paged: PagedContext, **_: Any) -> tuple[Tensor, None]:
        """States [1, N, hidden] to [1, N, hidden], with what transformers' layers expect as a second."""
        heads = self.qkv_proj(hidden_states[0]).view(hidden_states.shape[1], -1, self._head_dim)  # of queries, then keys, then values
        num_values = self._num_kv_heads
        num_queries = heads.shape[1] - 2 * num_values
        if self.q_norm is not None and self.k_norm is not None:
            queries, keys, values = heads.split((num_queries, num_values, num_values), 1)
            heads = torch.cat((self.q_norm(queries), self.k_norm(keys), values), 1)
        rotate_(heads[:, :-num_values], position_embeddings)
        attended = paged.attend(self._asked, heads[:, :num_queries], heads[:, num_queries:])
        return self.o_proj(attended.flatten(1)).unsqueeze(0), None


class FusedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), gate and up as one product."""

    def __init__(self, own: Any, make: Make):
        """`own` is the module that it replaces. Raises UnsupportedModel where that has parts that are not known here."""
        super().__init__()
        _require_parts(own, _MLP)
        self.gate_up_proj = make(own.gate_proj, own.up_proj)
        self.down_proj = make(own.down_proj, has_heavy_tails=True)  # of products, and no norm has levelled them
        self.act_fn = own.act_fn

    def forward(self, x: Tensor) -> Tensor:
        """x [1, N, hidden] to [1, N, hidden]."""
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        down: Tensor = self.down_proj(self.act_fn(gate).mul_(up))
        return down


class QuickNorm(nn.Module):
    """Root-mean-square norm as one operation (Zhang and Sennrich 2019)."""

    def __init__(self, weight: Tensor, epsilon: float):
        super().__init__()
        self.weight = nn.Buffer(weight, persistent=False)
        self._epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] to [..., hidden]."""
        return nn.functional.rms_norm(x, self.weight.shape, self.weight, self._epsilon)


def quick_norm(own: nn.Module) -> nn.Module:
    """The norm as one operation where that gives the same bits, else `own`: where it rounds in between, or is another norm."""
    epsilon = getattr(own, "variance_epsilon", getattr(own, "eps", None))
    weight = getattr(own, "weight", None)
    if not isinstance(weight, Tensor) or not isinstance(epsilon, float):
        return own
    sample = torch.linspace(-3, 3, 4 * len(weight), device=weight.device).sin().view(4, -1).to(weight.dtype)
    for effective in (weight.detach(), 1 + weight.detach()):  # Gemma's weights are differences from one
        quick = QuickNorm(effective, epsilon)
        if torch.equal(quick(sample), own(sample)):
            return quick
    return own


def _require_parts(own: nn.Module, needed: frozenset[str], optional: frozenset[str] = frozenset()) -> frozenset[str]:
    """The optional children of `own`. Raises UnsupportedModel where needed ones are missing or others are there."""
    parts = frozenset(name for name, _ in own.named_children())
    if not needed <= parts <= needed | optional:
        raise UnsupportedModel(
            f"{type(own).__name__} is made of {', '.join(sorted(parts))}; known are {', '.join(sorted(needed | optional))}."
        )
    return parts & optional
