"""A packed row in numbers, on the host: what attention over a paged cache is told of it."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass

import numpy as np

from engine.model.attention import Ints, Segment

FEWEST_BLOCKS = 16  # columns of a table: kernels are compiled once more for widths that are no multiple of it


@dataclass(frozen=True, slots=True)
class Ragged:
    """S segments one after another, of N tokens in all."""

    starts: Ints  # [S] position of the first token
    nums: Ints  # [S] tokens
    offsets: Ints  # [S + 1] where their tokens begin in the row; behind them N
    tables: Ints  # [S', B] block tables, padded to powers of two with block 0
    block_size: int

    @classmethod
    def of(cls, segments: ListLike[Segment], block_size: int) -> Ragged:
        starts = np.array([segment.start for segment in segments], dtype=np.int64)
        nums = np.array([segment.num_tokens for segment in segments], dtype=np.int64)
        num_blocks = -(-(starts + nums) // block_size)
        tables = np.zeros((power_of_two(len(segments)), power_of_two(max(FEWEST_BLOCKS, int(num_blocks.max())))), dtype=np.int64)
        for row, (segment, num) in enumerate(zip(segments, num_blocks, strict=True)):
            tables[row, :num] = segment.block_table[:num]
        return cls(starts, nums, np.concatenate(([0], np.cumsum(nums))), tables, block_size)

    @property
    def num_tokens(self) -> int:
        return int(self.offsets[-1])

    @property
    def ends(self) -> Ints:
        """[S] how many keys there are."""
        return self.starts + self.nums

    def places(self, num_rows: int) -> tuple[Ints, Ints]:
        """Positions and slots of the row's tokens, filled up to `num_rows` with position 0 and slot -1."""
        num = self.num_tokens
        positions, slots = np.zeros(max(num_rows, num), dtype=np.int64), np.full(max(num_rows, num), -1, dtype=np.int64)
        own = positions[:num]
        own[:] = np.arange(num) + np.repeat(self.starts - self.offsets[:-1], self.nums)
        slots[:num] = self.slots(np.repeat(np.arange(len(self.nums)), self.nums), own)
        return positions, slots

    def slots(self, segments: Ints, positions: Ints) -> Ints:
        """Where keys and values of positions of segments lie, broadcast together."""
        return self.tables[segments, positions // self.block_size] * self.block_size + positions % self.block_size

    def tiles(self, members: Ints, num_queries: int) -> Ints:
        """[T, 4] the queries of these segments in runs of at most `num_queries`: segment, first row, queries, position of the first.

        Padded to a power of two with runs of no queries, so that few grids of different size are launched.
        """
        found = self.runs(members, num_queries)
        return np.concatenate((found, np.zeros((power_of_two(len(found)) - len(found), 4), dtype=np.int64)))

    def runs(self, members: Ints, num_queries: int) -> Ints:
        """The same without padding."""
        counts = -(-self.nums[members] // num_queries)
        segment = np.repeat(members, counts)
        first = (np.arange(len(segment)) - np.repeat(np.cumsum(counts) - counts, counts)) * num_queries
        num = np.minimum(num_queries, self.nums[segment] - first)
        return np.stack((segment, self.offsets[segment] + first, num, self.starts[segment] + first), -1)

    def first_keys(self, window: int | None) -> Ints:
        """[S] the first position that any query of a segment sees."""
        return np.zeros_like(self.starts) if window is None else np.maximum(0, self.starts - window + 1)


def power_of_two(num: int) -> int:
    """The smallest that is not below it."""
    return 1 << (num - 1).bit_length() if num > 1 else 1


def floor_power(num: int) -> int:
    """The largest power of two that is not above it, and no less than one."""
    return 1 << max(0, num.bit_length() - 1)
