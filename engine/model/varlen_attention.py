"""Attention along block tables by torch's own `varlen_attn` (torch 2.13; float16 and bfloat16, on a GPU).

torch's built-in kernel takes no block tables in that version; FlashAttention 3 (compute capability 9.0) and 4 (10.x) take them where
they are installed. They are activated for the whole process then, as torch wants it, so other attention in 16 bits uses them, too. Whether
the kernel that answers takes blocks of this size is found out when it is tried.

Keys and values of a layer are passed as strided views of the cache, [blocks, block_size, kv_heads, head_dim], of which only the last
dimension has to be dense. Nothing is copied.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from engine.kv.cache import KVCache
from engine.model.attention import AttentionShape, LayerAttention, Room, Segment
from engine.model.index_buffer import IndexBuffer
from engine.model.ragged import Ragged
from engine.transfer import to_device

_DTYPES = (torch.float16, torch.bfloat16)
_IMPLEMENTATIONS = {9: ("FA3", "flash_attn_interface"), 10: ("FA4", "flash_attn.cute")}  # by major compute capability


class VarlenAttention:
    """The kind."""

    name = "varlen"
    is_recordable = False

    @property
    def forms(self) -> ListLike[VarlenAttention]:
        return (self,)

    def lacks(self, shape: AttentionShape) -> str | None:
        if shape.device.type != "cuda":
            return "it runs on a CUDA device"
        if shape.dtype not in _DTYPES:
            return f"it computes in float16 and bfloat16, not in {str(shape.dtype).removeprefix('torch.')}"
        if "block_table" not in inspect.signature(_varlen_attn()).parameters:
            return f"varlen_attn of torch {torch.__version__} takes no block table; that of 2.13 does"
        if not _has_flash_attention(shape.device):
            return "torch's own kernel takes no block table; FlashAttention 3 or 4 does, where it is installed for this GPU"
        return None

    def over(self, cache: KVCache, block_size: int, shape: AttentionShape) -> _VarlenPaged:
        if shape.device.type == "cuda":
            _activate(shape.device)
        return _VarlenPaged(cache, block_size, IndexBuffer(shape.device))


@dataclass(frozen=True, slots=True)
class _VarlenPaged:
    """varlen_attn over one cache."""

    cache: KVCache
    block_size: int
    indices: IndexBuffer

    def context(self, segments: ListLike[Segment], num_rows: int = 0) -> _VarlenContext:
        ragged = Ragged.of(segments, self.block_size)
        positions, slots = ragged.places(num_rows)
        arrays = [positions, ragged.tables[: len(segments)], ragged.offsets, ragged.ends]
        real_slots = to_device(slots[: ragged.num_tokens], self.cache.layers[0].device)  # int64, as writing wants it
        return _VarlenContext(self, real_slots, int(ragged.nums.max()), int(ragged.ends.max()), *self.indices.write(arrays))

    def fixed(self, room: Room) -> None:
        """Its longest segment and longest keys are numbers of the host."""


@dataclass(frozen=True, slots=True)
class _VarlenContext:
    """Index tensors of a pass."""

    own: _VarlenPaged
    slots: Tensor  # [M] of the rows that are no filling
    most_queries: int  # of a segment
    most_keys: int
    positions: Tensor  # [N]
    tables: Tensor  # [S, B]
    offsets: Tensor  # [S + 1] of the segments' queries
    ends: Tensor  # [S] keys of each segment

    def attend(self, asked: LayerAttention, query: Tensor, kv: Tensor) -> Tensor:
        num_real = len(self.slots)
        self.own.cache.write(asked.layer, self.slots, kv[:num_real])
        keys, values = self.own.cache.blocks(asked.layer, self.own.block_size)
        attended: Tensor = _varlen_attn()(
            query[:num_real],
            keys,
            values,
            self.offsets,
            None,
            self.most_queries,
            self.most_keys,
            scale=asked.scaling,
            window_size=(-1 if asked.window is None else asked.window - 1, 0),
            enable_gqa=True,
            seqused_k=self.ends,
            block_table=self.tables,
        )
        return attended if num_real == len(query) else torch.cat((attended, attended.new_zeros(query[num_real:].shape)))


def _varlen_attn() -> Any:
    """Not before it is needed: its module brings torch's compiler along, which takes a second."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn


def _has_flash_attention(device: torch.device) -> bool:
    """Whether a FlashAttention was chosen before, or is installed for this device."""
    from torch.nn import attention

    return attention.current_flash_attention_impl() is not None or _installed(device) is not None


def _installed(device: torch.device) -> str | None:
    """Torch's name for the FlashAttention of this device."""
    major, _ = torch.cuda.get_device_capability(device)
    implementation, module = _IMPLEMENTATIONS.get(major, ("", ""))
    is_there = module and find_spec(module.partition(".")[0]) is not None and find_spec(module) is not None
    return implementation if is_there else None


def _activate(device: torch.device) -> None:
    """Let torch use the FlashAttention that is installed for this device, if none was chosen before."""
    from torch.nn import attention

    if attention.current_flash_attention_impl() is None and (implementation := _installed(device)) is not None:
        attention.activate_flash_attention_impl(implementation)
