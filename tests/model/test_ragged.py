"""What kernels that follow block tables are told of a packed row, and how it gets to the device."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from engine.model.attention import Segment
from engine.model.index_buffer import IndexBuffer
from engine.model.ragged import Ragged, floor_power, power_of_two
from engine.model.triton_attention import keys_of
from engine.transfer import to_device

CPU = torch.device("cpu")


def some(seed: int, block_size: int) -> list[Segment]:
    rng = random.Random(seed)
    free = rng.sample(range(400), 400)
    found = []
    for _ in range(rng.randint(1, 9)):
        start, num = rng.choice((0, rng.randint(0, 70))), rng.choice((1, rng.randint(1, 40)))
        # a table may hold more blocks than are used so far
        found.append(Segment([free.pop() for _ in range(-(-(start + num) // block_size) + rng.randint(0, 2))], start, num))
    return found


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("seed", range(10))
def test_a_token_is_where_its_block_says(seed: int, block_size: int) -> None:
    segments = some(seed, block_size)
    ragged = Ragged.of(segments, block_size)
    tokens = [(segment, position) for segment in segments for position in range(segment.start, segment.end)]
    positions, slots = ragged.places(ragged.num_tokens + 3)
    assert positions.tolist() == [*(position for _, position in tokens), 0, 0, 0]
    assert slots.tolist() == [*(own.block_table[at // block_size] * block_size + at % block_size for own, at in tokens), -1, -1, -1]
    assert all(len(array) == ragged.num_tokens for array in ragged.places(0))


@pytest.mark.parametrize("num_queries", [1, 3, 16])
@pytest.mark.parametrize("seed", range(10))
def test_every_query_is_in_one_tile(seed: int, num_queries: int) -> None:
    segments = some(seed, 4)
    ragged = Ragged.of(segments, 4)
    positions, _ = ragged.places(0)
    members = np.arange(0, len(segments), 2)
    tiles = ragged.tiles(members, num_queries)
    assert len(tiles) == power_of_two(len(tiles))
    seen: list[int] = []
    for segment, first_row, num, position in tiles.tolist():
        assert num <= num_queries
        assert not num or segment in members
        seen += range(first_row, first_row + num)
        assert positions[first_row : first_row + num].tolist() == list(range(position, position + num)) * bool(num)
    assert seen == [row for i in members for row in range(ragged.offsets[i], ragged.offsets[i + 1])]


def test_tables_have_few_different_widths_and_heights() -> None:
    ragged = Ragged.of([Segment([7, 8, 9], 0, 9), Segment([3], 1, 1), Segment(list(range(40)), 70, 3)], 4)
    assert ragged.tables.shape == (4, 32)
    assert ragged.tables[0].tolist() == [7, 8, 9, *[0] * 29]
    assert ragged.tables[2].tolist() == [*range(19), *[0] * 13], "blocks that are not used yet are not read"
    tiles = ragged.tiles(np.array([0, 1, 2]), 16)
    assert keys_of(tiles, None).tolist() == [9, 2, 73, 0]
    assert keys_of(tiles, 4).tolist() == [9, 2, 6, 0]


def test_powers_of_two() -> None:
    assert [power_of_two(num) for num in (0, 1, 2, 3, 4, 5, 8, 9)] == [1, 1, 2, 4, 4, 8, 8, 16]
    assert [floor_power(num) for num in (0, 1, 2, 3, 4, 5, 8, 9)] == [1, 1, 2, 2, 4, 4, 8, 8]


def test_indices_stay_where_they_are() -> None:
    buffer = IndexBuffer(CPU)
    large = [np.arange(100).reshape(4, 25), np.arange(7)]
    first = buffer.write(large)
    assert [tensor.dtype for tensor in first] == [torch.int32] * 2
    assert [tensor.tolist() for tensor in first] == [array.tolist() for array in large]
    small = [np.arange(100, 200).reshape(4, 25), np.arange(3), np.zeros((0, 4), dtype=np.int64)]
    second = buffer.write(small)
    assert [tensor.tolist() for tensor in second] == [array.tolist() for array in small]
    assert [tensor.data_ptr() for tensor in second[:2]] == [tensor.data_ptr() for tensor in first]
    assert all((tensor.data_ptr() - second[0].data_ptr()) % 64 == 0 for tensor in second[:2])


def test_numbers_keep_shape_and_kind() -> None:
    assert to_device([3, 1], CPU).tolist() == [3, 1]
    assert to_device(range(2), CPU).dtype == torch.int64
    assert to_device(np.array([[True, False]]), CPU).tolist() == [[True, False]]
    assert to_device([], CPU, torch.long).shape == (0,)
