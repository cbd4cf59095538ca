"""Attention along block tables by our own Triton kernels: for every CUDA device and torch, and for sequences of any mixture.

Nothing is gathered: each program reads keys and values where they lie. Segments of few queries and those of many are launched apart, with
tiles of their own size; where there are too few tiles to keep the device busy, each is split over its keys, and the parts are joined.
Refused are float64, which the kernels' products do not have, and heads beyond what a tile holds. Passes that can be recorded are made of
the same launches in triton_fixed.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.kv.cache import KVCache
from engine.model.attention import AttentionShape, FixedPasses, Ints, LayerAttention, Room, Segment
from engine.model.index_buffer import IndexBuffer
from engine.model.ragged import Ragged, floor_power, power_of_two

FEW, MANY = 16, 64  # rows of a tile; 16 is the least that a product may have
_STAGE_BYTES = {FEW: 16 << 10, MANY: 32 << 10}  # of keys and values that a program loads at a time
# Loads that are under way at a time, those of the block table's entries among them. With the queries they stay below the 99 KiB of small
# devices, in 16 bits.
_STAGES = {FEW: 5, MANY: 2}
_MOST_KEYS = 64  # at a time
_MOST_HEAD_DIM = 256
MOST_SPLITS = 32
_KEYS_A_SPLIT = 128  # a part of fewer is not worth joining
_PROGRAMS_A_PROCESSOR = 2  # loads of one hide behind those of the other
_COLUMNS = 1024  # of a row of keys and values that one program stores
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class TritonAttention:
    """The kind. Tests set what is otherwise chosen."""

    splits: int | None = None  # parts of the keys
    keys: int | None = None  # at a time

    @property
    def name(self) -> str:
        return "triton"

    @property
    def is_recordable(self) -> bool:
        return True

    @property
    def forms(self) -> ListLike[TritonAttention]:
        """With and without parts: so both are compiled at the start, too."""
        return tuple(replace(self, splits=splits) for splits in (1, 3))

    def lacks(self, shape: AttentionShape) -> str | None:
        if find_spec("triton") is None:
            return "Triton is not installed here; torch's builds for CUDA bring it"
        if shape.dtype not in _DTYPES:
            return f"its kernels do not compute in {str(shape.dtype).removeprefix('torch.')}"
        if shape.head_dim > _MOST_HEAD_DIM:
            return f"its kernels hold heads of {_MOST_HEAD_DIM} dimensions at most, and these have {shape.head_dim}"
        if shape.num_heads // shape.num_kv_heads > MANY:
            return f"its kernels hold {MANY} query heads a key-value head at most"
        if shape.device.type != "cuda" and not _kernels().IS_INTERPRETED:
            return "it runs on a CUDA device; on a CPU only step by step, with TRITON_INTERPRET=1, for tests"
        return None

    def num_keys(self, rows: int, shape: AttentionShape) -> int:
        """Keys at a time, for tiles of so many rows."""
        fitting = _STAGE_BYTES[rows] // (2 * power_of_two(shape.head_dim) * shape.dtype.itemsize)
        return self.keys or max(16, min(_MOST_KEYS, fitting))

    def over(self, cache: KVCache, block_size: int, shape: AttentionShape) -> TritonPaged:
        return TritonPaged(cache, block_size, shape, self)


@dataclass(frozen=True, slots=True)
class Launch:
    """Tiles of one size."""

    tiles: Tensor  # [T, 4]
    rows: int  # of a tile
    splits: Mapping[int | None, int]  # by the layer's window: the most parts of a tile's keys, ...
    num_parts: Mapping[int | None, Tensor]  # ... and how many each has [T]


@dataclass(frozen=True)
class TritonPaged:
    """The kernels over one cache."""

    cache: KVCache
    block_size: int
    shape: AttentionShape
    kind: TritonAttention

    @cached_property
    def indices(self) -> IndexBuffer:
        return IndexBuffer(self.shape.device)

    @cached_property
    def num_processors(self) -> int:
        """Of the device, each running some programs at a time."""
        return int(torch.cuda.get_device_properties(self.shape.device).multi_processor_count) if self.shape.device.type == "cuda" else 1

    @property
    def group(self) -> int:
        return self.shape.num_heads // self.shape.num_kv_heads

    def context(self, segments: ListLike[Segment], num_rows: int = 0) -> TritonContext:
        ragged = Ragged.of(segments, self.block_size)
        is_few = ragged.nums * self.group <= FEW
        classes = {rows: np.flatnonzero(own) for rows, own in ((FEW, is_few), (MANY, ~is_few)) if own.any()}
        tiles = [ragged.tiles(members, rows // self.group) for rows, members in classes.items()]
        splits = [{window: self.splits(len(own), int(keys_of(own, window).max())) for window in self.shape.windows} for own in tiles]
        parts = [self.parts(own, splits_of) for own, splits_of in zip(tiles, splits, strict=True)]
        positions, slots, tables, *on_device = self.indices.write([*ragged.places(num_rows), ragged.tables, *chain(tiles, *parts)])
        launches = tuple(
            Launch(own, rows, splits[i], self.by_window(on_device[len(tiles) + i * len(self.shape.windows) :]))
            for i, (own, rows) in enumerate(zip(on_device, classes, strict=False))
        )
        return TritonContext(self, positions, slots, tables, tables.stride(0), launches, ragged.num_tokens)

    def splits(self, num_tiles: int, num_keys: int) -> int:
        """The most parts that so many tiles, of so many keys at most, are worth: a power of two, so that few grids of different size are
        launched."""
        if self.kind.splits is not None:
            return self.kind.splits
        idle = _PROGRAMS_A_PROCESSOR * self.num_processors // (num_tiles * self.shape.num_kv_heads)
        return min(floor_power(idle), floor_power(num_keys // _KEYS_A_SPLIT), MOST_SPLITS)

    def parts(self, tiles: Ints, splits: Mapping[int | None, int]) -> list[Ints]:
        """Of each tile [T], by the layer's window."""
        if self.kind.splits is not None:
            return [np.full(len(tiles), splits[window]) for window in self.shape.windows]
        return [np.clip(keys_of(tiles, window) // _KEYS_A_SPLIT, 1, splits[window]) for window in self.shape.windows]

    def by_window(self, tensors: ListLike[Tensor]) -> dict[int | None, Tensor]:
        """The first of these, in the order of `parts`."""
        return dict(zip(self.shape.windows, tensors, strict=False))

    def fixed(self, room: Room) -> FixedPasses:
        from engine.model.triton_fixed import TritonFixed  # which is made of what stands here

        return TritonFixed(self, room)


@dataclass(frozen=True, slots=True)
class TritonContext:
    """Index tensors of a pass, int32."""

    own: TritonPaged
    positions: Tensor  # [N]
    slots: Tensor  # [N]; -1 for rows that only fill up
    tables: Tensor  # block tables ...
    table_stride: int  # ... that begin so many numbers apart
    launches: tuple[Launch, ...]
    num_tokens: int  # rows that are in a tile

    def attend(self, asked: LayerAttention, query: Tensor, kv: Tensor) -> Tensor:
        cache = self.own.cache.layers[asked.layer]
        query, kv = _with_whole_rows(query), _with_whole_rows(kv)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        if self.num_tokens < len(output):
            output[self.num_tokens :] = 0
        with torch.cuda.device_of(kv):  # type: ignore[no-untyped-call]  # Triton launches on the current device
            self._write(kv, cache)
            for launch in self.launches:
                self._launch(launch, asked, query, cache, output)
        return output

    def _write(self, kv: Tensor, cache: Tensor) -> None:
        width = kv[0].numel()
        grid = (len(kv), -(-width // _COLUMNS))
        _kernels().write_kv[grid](kv, cache, self.slots, kv.stride(0), cache.stride(0), WIDTH=width, BLOCK=_COLUMNS)

    def _launch(self, launch: Launch, asked: LayerAttention, query: Tensor, cache: Tensor, output: Tensor) -> None:
        own, (_, num_heads, head_dim) = self.own, query.shape
        splits, num_kv_heads = launch.splits[asked.window], own.shape.num_kv_heads
        is_split = splits > 1
        grid = (len(launch.tiles), num_kv_heads)
        programs = (splits, *grid, launch.rows)
        parts = output.new_empty((*programs, head_dim), dtype=torch.float32) if is_split else output
        levels = output.new_empty(programs, dtype=torch.float32) if is_split else output
        sizes = {
            "NUM_KV_HEADS": num_kv_heads,
            "GROUP": num_heads // num_kv_heads,
            "HEAD_DIM": head_dim,
            "BLOCK_M": launch.rows,
            "BLOCK_D": max(16, power_of_two(head_dim)),
        }
        _kernels().attend[*grid, splits](
            query,
            cache,
            self.tables,
            launch.tiles,
            launch.num_parts[asked.window],
            parts,
            levels,
            query.stride(0),
            cache.stride(0),
            self.table_stride,
            asked.window or 0,
            asked.scaling * math.log2(math.e),
            BLOCK_SIZE=own.block_size,
            BLOCK_N=own.kind.num_keys(launch.rows, own.shape),
            HAS_WINDOW=asked.window is not None,
            IS_SPLIT=is_split,
            **sizes,
            **launch_options(launch.rows, head_dim),
        )
        if is_split:
            _kernels().join[grid](parts, levels, launch.tiles, launch.num_parts[asked.window], output, **sizes)


def launch_options(rows: int, head_dim: int) -> dict[str, int]:
    """How a kernel with tiles of so many rows is compiled."""
    return {"num_warps": 8 if rows == MANY and head_dim > 128 else 4, "num_stages": _STAGES[rows]}


def keys_of(tiles: Ints, window: int | None) -> Ints:
    """How many keys the queries of each tile see together [T]."""
    first = 0 if window is None else np.maximum(0, tiles[:, 3] - window + 1)
    keys: Ints = tiles[:, 3] + tiles[:, 2] - first
    return keys


def _with_whole_rows(packed: Tensor) -> Tensor:
    """Packed [N, heads, head_dim], a row's numbers one after another."""
    return packed if packed[0].is_contiguous() else packed.contiguous()


def _kernels() -> Any:
    """The module, not before it is needed: Triton is not everywhere, and takes half a second to import."""
    from engine.model import kernels

    return kernels
