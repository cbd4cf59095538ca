"""A pass of our kernels whose places are fixed: told any mixture, it gives what the gather gives, zeros behind it, and writes nothing else.

It runs compiled where there is a CUDA device, else step by step where TRITON_INTERPRET=1 says so (CONTRIBUTING.md).
"""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from engine.kv.cache import KVCache
from engine.model.attention import Attention, AttentionShape, LayerAttention, PagedContext, Room, Segment
from engine.model.gather_attention import GATHER
from engine.model.triton_attention import TritonAttention, TritonContext
from engine.model.triton_fixed import TritonFixed
from tests.triton_device import DEVICE, NEEDS_TRITON

pytestmark = NEEDS_TRITON

BLOCK, HEADS, DIM, POSITIONS = 4, 2, 16, 1024
# for passes of so many rows: batches of (start, tokens), which leave from no row to most of them to fill up
BATCHES: dict[int, list[list[tuple[int, int]]]] = {
    1: [[(0, 1)], [(37, 1)]],
    2: [[(5, 1)], [(5, 2)], [(0, 1), (300, 1)]],
    4: [[(9, 3)], [(0, 1)] * 4, [(700, 1), (3, 2)]],
    8: [[(21, 6)], [(0, 1)] * 8, [(500, 1)], [(2, 3), (400, 4)]],
    24: [[(7, 6), (0, 6), (90, 6), (33, 6)], [(i, 1) for i in range(13)], [(0, 21)], [(250, 9), (260, 1), (31, 2)]],
}


class Batch:
    """Segments in blocks from all over a pool, whose earlier positions hold numbers and all other slots what is no number."""

    def __init__(self, segments: list[tuple[int, int]], group: int, window: int | None, seed: int = 1):
        nums = [-(-(start + num) // BLOCK) for start, num in segments]
        free = random.Random(seed).sample(range(sum(nums) + 2), sum(nums) + 2)
        self.segments = [Segment([free.pop() for _ in range(n)], *own) for n, own in zip(nums, segments, strict=True)]
        self.shape = AttentionShape(group * HEADS, HEADS, DIM, (None, window) if window else (None,), torch.float32, DEVICE)
        self.window = window
        generator = torch.Generator().manual_seed(seed)
        store = torch.full(((sum(nums) + 2) * BLOCK, 2 * HEADS, DIM), torch.nan)
        for own in self.segments:
            for position in range(own.start):
                store[own.block_table[position // BLOCK] * BLOCK + position % BLOCK] = torch.randn(2 * HEADS, DIM, generator=generator)
        self.store = store.to(DEVICE)
        num_tokens = sum(own.num_tokens for own in self.segments)
        self.packed = torch.randn(num_tokens, (group + 2) * HEADS, DIM, generator=generator).to(DEVICE)

    def over(self, context: PagedContext, cache: KVCache, num_rows: int) -> tuple[Tensor, Tensor]:
        """What comes out, and what is stored then."""
        cache.layers[0][: len(self.store)] = self.store
        packed = torch.full((num_rows, *self.packed.shape[1:]), 9.0, device=DEVICE)
        packed[: len(self.packed)] = self.packed
        asked = LayerAttention(0, self.window, DIM**-0.5)
        return context.attend(asked, packed[:, : self.shape.num_heads], packed[:, self.shape.num_heads :]), cache.layers[0]


def attention(batch: Batch, kind: TritonAttention, num_processors: int = 66) -> tuple[Attention, KVCache]:
    """On a device of so many processors: on a CPU there is one, and no tile would be split."""
    cache = KVCache(1, 400 * BLOCK, (HEADS, DIM), torch.float32, DEVICE)
    cache.layers[0].fill_(torch.nan)
    paged = kind.over(cache, BLOCK, batch.shape)
    vars(paged)["num_processors"] = num_processors
    return paged, cache


@pytest.mark.parametrize("window", [None, 7, 300])
@pytest.mark.parametrize("group", [1, 3, 4, 20])
@pytest.mark.parametrize("num_rows", BATCHES)
@torch.inference_mode()
def test_whatever_a_pass_is_told_it_equals_the_gather(num_rows: int, group: int, window: int | None) -> None:
    """One pass of each kind, told one batch after the other."""
    batches = [Batch(own, group, window, seed) for seed, own in enumerate(BATCHES[num_rows])]
    paged, cache = attention(batches[0], TritonAttention(keys=32))
    fixed = paged.fixed(Room(num_rows, POSITIONS))
    assert fixed is not None
    passes = [(own, fixed.make(num_rows, own)) for own in (*fixed.windows, 24)]
    for batch in batches:
        longest = max(own.num_tokens for own in batch.segments)
        want, want_store = batch.over(GATHER.over(cache, BLOCK, batch.shape).context(batch.segments, num_rows), cache, num_rows)
        want_store = want_store.clone()
        for _, own in [(most, own) for most, own in passes if longest <= most]:
            context = own.context
            own.tell(batch.segments)
            got, store = batch.over(context, cache, num_rows)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
            assert got[len(batch.packed) :].eq(0).all()
            torch.testing.assert_close(store, want_store, rtol=0, atol=0, equal_nan=True)


def places(context: PagedContext) -> list[int]:
    assert isinstance(context, TritonContext)
    tensors = [context.positions, context.slots, context.tables]
    for launch in context.launches:
        tensors += [launch.tiles, *launch.num_parts.values()]
    return [tensor.data_ptr() for tensor in tensors]


def test_all_passes_find_their_numbers_where_they_were_recorded() -> None:
    batch = Batch([(0, 1)], 4, 7)
    paged, _ = attention(batch, TritonAttention())
    fixed = paged.fixed(Room(24, POSITIONS))
    assert isinstance(fixed, TritonFixed)
    memory = fixed.indices._memory.data_ptr()
    for num_rows, window in ((24, 16), (8, 4), (1, 4)):
        own = fixed.make(num_rows, window)
        before = places(own.context)
        # as many segments as rows, each as long as a sequence may get
        segments = [Segment(list(range(POSITIONS // BLOCK)), POSITIONS - 1, 1)] * num_rows
        told = own._write(segments)
        assert [tensor.data_ptr() for tensor in told] == [*before[:2], *before[3:], before[2]]
        assert told[0].tolist() == [POSITIONS - 1] * num_rows
        assert fixed.indices._memory.data_ptr() == memory, "nothing was moved"


def test_parts_go_by_what_each_tile_sees() -> None:
    """The grid is fixed and suits long keys; over short ones each tile is one part, and a sliding layer has its own."""
    batch = Batch([(0, 1)], 4, 7)
    paged, _ = attention(batch, TritonAttention(), num_processors=132)
    fixed = paged.fixed(Room(8, POSITIONS))
    assert fixed is not None
    own = fixed.make(8, 4)
    context = own.context
    assert isinstance(context, TritonContext)
    (launch,) = context.launches
    assert launch.splits == {None: 8, 7: 1}
    table = list(range(POSITIONS // BLOCK))
    own.tell([Segment(table, 3, 4)])
    assert launch.num_parts[None].tolist() == [1] * 8
    own.tell([Segment(table, 1000, 1), Segment(table, 400, 3), Segment(table, 12, 1)])
    assert launch.num_parts[None].tolist() == [7, 3, 1, 1, 1, 1, 1, 1]
    assert launch.num_parts[7].tolist() == [1] * 8
    own.tell([Segment(table, 1000, 1)] * 8)
    assert max(launch.num_parts[None].tolist()) == 7, "eight tiles of two heads still leave most of the device idle"
