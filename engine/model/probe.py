"""What a model's own forward asks of its attention, watched once at load: windows, shapes of keys, masks.

Watching the calls needs no table of architectures: whatever a config means, this is what its layers do. An attention implementation
of transformers' own interface, it refuses what the paged attention does not compute. It serves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from engine.errors import UnsupportedModel
from engine.model.attention import is_hidden

PROBE = "cascade_probe"
_WITHOUT_EFFECT = frozenset({"dropout", "position_ids", "use_cache"})  # in inference, on a packed row


@dataclass(frozen=True, slots=True)
class LayerCall:
    """What one layer asked for."""

    window: int | None  # positions that a query sees, its own included
    num_heads: int  # of queries
    kv_shape: tuple[int, int]  # key-value heads, head dimension
    scaling: float  # of the products of queries and keys


@dataclass(slots=True)
class Watch:
    """Filled by the layers while the model runs its own forward under PROBE."""

    name: str  # of the model, for messages
    calls: dict[int, LayerCall] = field(default_factory=dict)

    def require_all(self, num_layers: int) -> None:
        """Raises UnsupportedModel where a layer never called: there is something else than attention in it."""
        if silent := sorted(set(range(num_layers)) - self.calls.keys()):
            raise UnsupportedModel(f"{self.name}: layers {silent} ask for no attention; only layers of attention are served.")

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The distinct ones, in the order of the layers."""
        return tuple(dict.fromkeys(call.window for call in self.calls.values()))

    @property
    def num_heads(self) -> int:
        """The most heads of queries that a layer has."""
        return max(call.num_heads for call in self.calls.values())

    @property
    def kv_shape(self) -> tuple[int, int]:
        """The shape that all layers have in common. Raises UnsupportedModel."""
        shapes = {call.kv_shape for call in self.calls.values()}
        if len(shapes) != 1:
            raise UnsupportedModel(
                f"{self.name}: layers differ in key-value heads and head dimension, {sorted(shapes)}; one shape is served."
            )
        return shapes.pop()


class PretendedPast:
    """A cache that claims to hold `num_tokens` positions and holds none: for the masks that a model makes behind a long context."""

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.num_tokens

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.num_tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Number of keys, and the position of the first."""
        return self.num_tokens + query_length, 0

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: Any) -> tuple[Tensor, Tensor]:
        return key, value


def watched_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, N, head_dim]
    key: Tensor,  # [1, kv_heads, N, head_dim]
    value: Tensor,  # [1, kv_heads, N, head_dim]
    attention_mask: Tensor | None,  # [1, 1, N, past + N] True where a query sees a key; None: all earlier ones
    *,
    scaling: float,
    watch: Watch,
    past: PretendedPast | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' own attention; behind a pretended past no attention but a comparison of masks. Raises UnsupportedModel."""
    layer = module.layer_idx
    assert isinstance(layer, int)
    if unknown := sorted(name for name, asked in others.items() if name not in _WITHOUT_EFFECT and asked is not None):
        raise UnsupportedModel(f"{watch.name}: layer {layer} asks its attention for {', '.join(unknown)}, which is not served.")
    if key.shape != value.shape:
        raise UnsupportedModel(
            f"{watch.name}: layer {layer} has keys {tuple(key.shape)} and values {tuple(value.shape)}; one shape is served."
        )
    watch.calls[layer] = LayerCall(sliding_window, query.shape[1], (key.shape[1], key.shape[3]), scaling)
    if past is not None:
        if not _hides_the_same(attention_mask, past.num_tokens, sliding_window):
            raise UnsupportedModel(f"{watch.name}: layer {layer} hides other keys than those behind its window of {sliding_window}.")
        return torch.zeros_like(query).transpose(1, 2), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling)  # type: ignore[no-any-return]  # transformers leaves it untyped


def _hides_the_same(mask: Tensor | None, num_past: int, window: int | None) -> bool:
    """Whether the model's own mask behind `num_past` positions is the one that the paged attention makes."""
    if mask is None:
        return False
    num_keys = mask.shape[3]
    return np.array_equal(~mask[0, 0].cpu().numpy(), is_hidden(np.arange(num_past, num_keys)[:, None], np.arange(num_keys), window))


AttentionInterface.register(PROBE, watched_attention)
AttentionMaskInterface.register(PROBE, sdpa_mask)
