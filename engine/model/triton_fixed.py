"""Passes of the Triton kernels that can be recorded: of one launch over tiles of one size, with every index tensor at a fixed place.

A pass over so many rows has as many tiles, since each tile has a query at least: any mixture of segments fits. Rows that only fill up are
tiles of queries without keys, so that they get zeros from the launch that is there anyway. The most parts of a tile's keys are fixed as
well; how many there are is told with the tile, and a program behind them ends at once. So one recording keeps the device busy over long
keys and wastes no more than some idle programs, and a launch that joins, over short ones.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from functools import cached_property

import numpy as np
from torch import Tensor

from engine.model.attention import Ints, Room, Segment
from engine.model.index_buffer import IndexBuffer
from engine.model.ragged import FEWEST_BLOCKS, Ragged, floor_power, power_of_two
from engine.model.triton_attention import FEW, MANY, Launch, TritonContext, TritonPaged

# Rows of all parts of a pass together: beyond, parts are memory (32 MiB for eight heads of 128 dimensions) and idle programs, not speed.
_PARTS_ROWS = 8192


class TritonFixed:
    """Those over one cache."""

    def __init__(self, own: TritonPaged, room: Room):
        self.own, self.room = own, room
        rows, num_blocks = room.num_rows, -(-room.num_positions // own.block_size)
        tables = power_of_two(rows) * power_of_two(max(FEWEST_BLOCKS, num_blocks))
        sizes = [rows, rows, 4 * rows, *[rows] * len(own.shape.windows), tables]
        self.indices = IndexBuffer(own.shape.device, sizes)

    @property
    def windows(self) -> ListLike[int]:
        return [rows // self.own.group for rows in (FEW, MANY) if rows >= self.own.group]

    def make(self, num_rows: int, window: int) -> _TritonFixedPass:
        tile = FEW if window * self.own.group <= FEW else MANY
        return _TritonFixedPass(self, num_rows, tile, self._splits(num_rows, tile))

    def _splits(self, num_rows: int, tile: int) -> dict[int | None, int]:
        """The most parts that can be of use, by the layer's window."""
        per_tile = tile // self.own.group
        fewest_tiles = -(-num_rows // (2 * per_tile))  # a pass of half as many rows is recorded apart
        fitting = floor_power(_PARTS_ROWS // (num_rows * tile))
        longest = self.room.num_positions
        reach = {window: longest if window is None else min(longest, window + per_tile) for window in self.own.shape.windows}
        return {window: min(fitting, self.own.splits(fewest_tiles, keys)) for window, keys in reach.items()}


class _TritonFixedPass:
    """Of one number of rows and one size of tiles."""

    def __init__(self, passes: TritonFixed, num_rows: int, tile: int, splits: dict[int | None, int]):
        self._passes, self._num_rows, self._tile, self._splits = passes, num_rows, tile, splits

    @cached_property
    def context(self) -> TritonContext:
        positions, slots, tiles, *num_parts, tables = self._write([Segment((0,), 0, 1)])  # any will do: places are what is wanted
        own = self._passes.own
        launch = Launch(tiles, self._tile, self._splits, own.by_window(num_parts))
        return TritonContext(own, positions, slots, tables, FEWEST_BLOCKS, (launch,), self._num_rows)

    def tell(self, segments: ListLike[Segment]) -> None:
        self._write(segments)

    def _write(self, segments: ListLike[Segment]) -> list[Tensor]:
        """Tables come last: they alone differ in size from pass to pass."""
        own = self._passes.own
        ragged = Ragged.of(segments, own.block_size)
        tiles, num_tiles = self._tiles(ragged)
        worth = own.splits(num_tiles, self._passes.room.num_positions)
        parts = own.parts(tiles, {window: min(worth, splits) for window, splits in self._splits.items()})
        tiles[:, 0] *= ragged.tables.shape[1] // FEWEST_BLOCKS  # where a table begins, in strides of the pass
        return self._passes.indices.write([*ragged.places(self._num_rows), tiles, *parts, ragged.tables.reshape(-1)])

    def _tiles(self, ragged: Ragged) -> tuple[Ints, int]:
        """[num_rows, 4]: those of the segments, and how many these are; then rows that fill up, which end in front of all keys."""
        per_tile = self._tile // self._passes.own.group
        runs = ragged.runs(np.arange(len(ragged.nums)), per_tile)
        first = np.arange(ragged.num_tokens, self._num_rows, per_tile)
        nums = np.minimum(per_tile, self._num_rows - first)
        filling = np.stack((np.zeros_like(first), first, nums, -nums), -1)
        tiles = np.zeros((self._num_rows, 4), dtype=np.int64)
        tiles[: len(runs) + len(filling)] = np.concatenate((runs, filling))
        return tiles, len(runs)
