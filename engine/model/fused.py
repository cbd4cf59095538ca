"""Attention and feed-forward of a decoder layer in few operations: one product for what reads the same input, and a LayerMath between.

They take the places of a transformers layer's modules and use that module's own weights, norms and activation. That they
compute the same is not taken for granted: stack.py compares logits with the model's own at every load.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from engine.errors import UnsupportedModel
from engine.model.attention import LayerAttention, PagedContext
from engine.model.layer_math import LayerMath, Rotary, RotatedHeads

_ATTENTION = frozenset({"q_proj", "k_proj", "v_proj", "o_proj"})
_NORMS = frozenset({"q_norm", "k_norm"})
_MLP = frozenset({"gate_proj", "up_proj", "down_proj", "act_fn"})


class Make(Protocol):
    """What takes the place of linear layers."""

    def __call__(self, *own: nn.Linear, has_heavy_tails: bool = False) -> nn.Module:
        """One layer for those that read the same input, their outputs one after another. The rest is said of that input."""
        ...


class FusedAttention(nn.Module):
    """Queries, keys and values as one product, over the paged cache."""

    def __init__(self, own: Any, asked: LayerAttention, num_kv_heads: int, make: Make, math: LayerMath):
        """`own` is the attention module that it replaces. Raises UnsupportedModel where that has parts that are not known here."""
        super().__init__()
        has_norms = _require_parts(own, _ATTENTION, _NORMS) == _NORMS
        self._asked = asked
        self._head_dim: int = own.head_dim
        self._num_queries: int = own.q_proj.out_features // self._head_dim
        norms = (own.q_norm, own.k_norm) if has_norms else (None, None)
        self.rotation = math.rotation(RotatedHeads(self._num_queries, num_kv_heads, self._head_dim, *norms))
        self.qkv_proj = make(own.q_proj, own.k_proj, own.v_proj)
        self.o_proj = make(own.o_proj)

    def attend(self, x: Tensor, rotary: Rotary, paged: PagedContext) -> Tensor:
        """x [N, hidden] to [N, hidden]."""
        heads = self.rotation(self.qkv_proj(x).view(len(x), -1, self._head_dim), rotary)  # of queries, then keys, then values
        attended = paged.attend(self._asked, heads[:, : self._num_queries], heads[:, self._num_queries :])
        output: Tensor = self.o_proj(attended.flatten(1))
        return output

    def forward(self, hidden_states: Tensor, position_embeddings: Rotary, paged: PagedContext, **_: Any) -> tuple[Tensor, None]:
        """States [1, N, hidden] to [1, N, hidden], with what transformers' layers expect as a second."""
        return self.attend(hidden_states[0], position_embeddings, paged).unsqueeze(0), None


class FusedMLP(nn.Module):
    """down(act(gate(x)) * up(x)), gate and up as one product."""

    def __init__(self, own: Any, make: Make, math: LayerMath):
        """`own` is the module that it replaces. Raises UnsupportedModel where that has parts that are not known here."""
        super().__init__()
        _require_parts(own, _MLP)
        self.gate_up_proj = make(own.gate_proj, own.up_proj)
        self.down_proj = make(own.down_proj, has_heavy_tails=True)  # of products, and no norm has levelled them
        self.gating = math.gating(own.act_fn)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., hidden] to [..., hidden]."""
        down: Tensor = self.down_proj(self.gating(self.gate_up_proj(x)))
        return down


def _require_parts(own: nn.Module, needed: frozenset[str], optional: frozenset[str] = frozenset()) -> frozenset[str]:
    """The optional children of `own`. Raises UnsupportedModel where needed ones are missing or others are there."""
    parts = frozenset(name for name, _ in own.named_children())
    if not needed <= parts <= needed | optional:
        raise UnsupportedModel(
            f"{type(own).__name__} is made of {', '.join(sorted(parts))}; known are {', '.join(sorted(needed | optional))}."
        )
    return parts & optional
