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
        self._read = torch.empty(0, 2 * num_heads, head_dim, dtype=dtype, device=device)  # what was read last

    @property
    def layers(self) -> list[Tensor]:
        """Of each layer [slots, 2 * heads, head_dim]: the heads' keys, then their values."""
        return self._layers

    def write(self, layer: int, slots: Tensor, kv: Tensor) -> None:
        """Store keys and values [N, 2 * heads, head_dim] at slots [N]."""
        self._layers[layer].index_copy_(0, slots, kv)

    def read(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [G, heads, L, head_dim] at slots [G, L]; good until the next call, which writes to the same place.

        Fresh memory for every layer would cost more than the copy: beyond 32 MiB the C library hands it back to the system each time,
        and each of its pages is then faulted in again (64 x 400 slots of 1.5 KiB took 36 ms a layer, and now 4). What the
        largest batch needed stays: one layer's share of the slots in use, blocks that sequences share counting for each of them.
        """
        if self._read.shape[0] < slots.numel():
            self._read = self._read.new_empty(slots.numel() * 5 // 4, *self._read.shape[1:])  # answers grow by a token every step
        kv = self._read[: slots.numel()]
        torch.index_select(self._layers[layer], 0, slots.flatten(), out=kv)
        kv = kv.view(*slots.shape, *self._shape)
        return kv[:, :, 0].transpose(1, 2), kv[:, :, 1].transpose(1, 2)

    def blocks(self, layer: int, block_size: int) -> tuple[Tensor, Tensor]:
        """Keys and values [blocks, block_size, heads, head_dim] where they lie: views, of which only the last dimension is dense."""
        _, num_heads, head_dim = self._shape
        kv = self._layers[layer].view(-1, block_size, 2 * num_heads, head_dim)
        return kv[:, :, :num_heads], kv[:, :, num_heads:]

    def let_go(self) -> None:
        """Give up the place that `read` keeps."""
        self._read = self._read.new_empty(0, *self._read.shape[1:])
