"""The tensors behind the slots of one model. Who owns which slot is the BlockPool's business."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer, one row a slot: `block * block_size + offset`.

    Both lie side by side, so that a layer writes and reads them in one operation.
    """

    def __init__(self, num_layers: int, num_slots: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device):
        """`shape` is (key-value heads, head dimension) of a layer."""
        # zeros, not empty: a masked slot is multiplied by zero, and zero times a NaN that lay in memory is NaN
        num_heads, head_dim = shape
        self._shape = (2, num_heads, head_dim)
        self._layers = [torch.zeros(num_slots, 2 * num_heads, head_dim, dtype=dtype, device=device) for _ in range(num_layers)]

    @property
    def layers(self) -> list[Tensor]:
        """Of each layer [slots, 2 * heads, head_dim]: the heads' keys, then their values."""
        return self._layers

    def write(self, layer: int, slots: Tensor, kv: Tensor) -> None:
        """Store keys and values [N, 2 * heads, head_dim] at slots [N]."""
        self._layers[layer].index_copy_(0, slots, kv)

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [G, heads, L, head_dim] at slots [G, L]."""
        kv = self._layers[layer].index_select(0, slots.flatten()).view(*slots.shape, *self._shape)
        return kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2)
