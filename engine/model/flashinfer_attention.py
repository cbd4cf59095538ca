"""Attention along block tables by FlashInfer, where it is installed (pip install flashinfer-python; float16 and bfloat16, on a GPU).

The only file that imports it. Its wrapper for prompts computes single tokens and verify windows as well. Keys and values are passed as a
pair of strided views of the cache, [blocks, block_size, kv_heads, head_dim] ("NHD"): it takes strides, the same ones for both, and wants
the last dimension dense. Nothing is copied. It is planned once a pass for each window and scaling that layers ask for, from numbers on the
host, so that planning does not wait for the device.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.kv.cache import KVCache
from engine.model.attention import AttentionShape, LayerAttention, Room, Segment
from engine.model.ragged import Ragged
from engine.transfer import to_device

_DTYPES = (torch.float16, torch.bfloat16)
_HEAD_DIMS = (64, 128, 256)
_WORKSPACE_BYTES = 128 << 20  # what its documentation recommends

_Asked = tuple[int | None, float, int]  # window, scaling, query heads


class FlashInferAttention:
    """The kind."""

    name = "flashinfer"
    is_recordable = False

    @property
    def forms(self) -> ListLike[FlashInferAttention]:
        return (self,)

    def lacks(self, shape: AttentionShape) -> str | None:
        if find_spec("flashinfer") is None:
            return "FlashInfer is not installed here (pip install flashinfer-python)"
        if shape.device.type != "cuda":
            return "it runs on a CUDA device"
        if shape.dtype not in _DTYPES:
            return f"it computes in float16 and bfloat16, not in {str(shape.dtype).removeprefix('torch.')}"
        if shape.head_dim not in _HEAD_DIMS:
            return f"its heads have {', '.join(map(str, _HEAD_DIMS))} dimensions, and these have {shape.head_dim}"
        return None

    def over(self, cache: KVCache, block_size: int, shape: AttentionShape) -> _FlashInferPaged:
        return _FlashInferPaged(cache, block_size, shape)


@dataclass(frozen=True, slots=True)
class _FlashInferPaged:
    """FlashInfer over one cache."""

    cache: KVCache
    block_size: int
    shape: AttentionShape
    wrappers: dict[_Asked, Any] = field(default_factory=dict)

    def context(self, segments: ListLike[Segment], num_rows: int = 0) -> _FlashInferContext:
        ragged = Ragged.of(segments, self.block_size)
        positions, slots = ragged.places(num_rows)
        device = self.shape.device
        return _FlashInferContext(self, ragged, to_device(positions, device), to_device(slots[: ragged.num_tokens], device))

    def fixed(self, room: Room) -> None:
        """Each is planned on the host."""

    def planned(self, asked: _Asked, ragged: Ragged) -> Any:
        """A wrapper that knows this pass."""
        if asked not in self.wrappers:
            import flashinfer

            self.wrappers[asked] = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(self.shape.device), "NHD")
        wrapper, (window, scaling, num_heads) = self.wrappers[asked], asked
        num_blocks = -(-ragged.ends // self.block_size)
        indices = np.concatenate([table[:num] for table, num in zip(ragged.tables, num_blocks, strict=False)])
        wrapper.plan(
            _int32(ragged.offsets),
            _int32(np.concatenate(([0], np.cumsum(num_blocks)))),
            to_device(indices.astype(np.int32), self.shape.device),
            _int32(ragged.ends - (num_blocks - 1) * self.block_size),  # positions in each last block
            num_heads,
            self.shape.num_kv_heads,
            self.shape.head_dim,
            self.block_size,
            causal=True,
            sm_scale=scaling,
            window_left=-1 if window is None else window - 1,
            q_data_type=self.shape.dtype,
            kv_data_type=self.shape.dtype,
        )
        return wrapper


@dataclass(frozen=True, slots=True)
class _FlashInferContext:
    """A pass."""

    own: _FlashInferPaged
    ragged: Ragged
    positions: Tensor  # [N]
    slots: Tensor  # [M] of the rows that are no filling
    planned: dict[_Asked, Any] = field(default_factory=dict)

    def attend(self, asked: LayerAttention, query: Tensor, kv: Tensor) -> Tensor:
        num_real, key = len(self.slots), (asked.window, asked.scaling, query.shape[1])
        self.own.cache.write(asked.layer, self.slots, kv[:num_real])
        if key not in self.planned:
            self.planned[key] = self.own.planned(key, self.ragged)
        attended: Tensor = self.planned[key].run(query[:num_real], self.own.cache.blocks(asked.layer, self.own.block_size))
        return attended if num_real == len(query) else torch.cat((attended, attended.new_zeros(query[num_real:].shape)))


@cache
def _workspace(device: torch.device) -> Tensor:
    """Shared by all that run on a device, one after another."""
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _int32(numbers: Any) -> Tensor:
    return torch.from_numpy(numbers.astype(np.int32))
