"""The tensors behind the slots of one model. Who owns which slot is the BlockPool's business."""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Keys and values of every layer, one row a slot: `block * block_size + offset`."""

    def __init__(self, num_layers: int, num_slots: int, shape: tuple[int, int], dtype: torch.dtype, device: torch.device):
        """`shape` is (key-value heads, head dimension) of a layer."""
        # zeros, not empty: a masked slot is multiplied by zero, and zero times a NaN that lay in memory is NaN
        self.keys = [torch.zeros(num_slots, *shape, dtype=dtype, device=device) for _ in range(num_layers)]
        self.values = [torch.zeros(num_slots, *shape, dtype=dtype, device=device) for _ in range(num_layers)]

    def write(self, layer: int, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [N, heads, head_dim] at slots [N]."""
        self.keys[layer].index_copy_(0, slots, keys)
        self.values[layer].index_copy_(0, slots, values)

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [G, heads, L, head_dim] at slots [G, L]."""
        return self._gather(self.keys[layer], slots), self._gather(self.values[layer], slots)

    @staticmethod
    def _gather(store: Tensor, slots: Tensor) -> Tensor:
        return store.index_select(0, slots.flatten()).view(*slots.shape, *store.shape[1:]).transpose(1, 2)
