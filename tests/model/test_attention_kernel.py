"""Our kernels equal the gather, for every mixture of segments; nothing that is not to be read is read, nothing else is written.

They run compiled where there is a CUDA device, else step by step where TRITON_INTERPRET=1 says so (CONTRIBUTING.md).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.kv.cache import KVCache
from engine.model.attention import AttentionKind, AttentionShape, LayerAttention, Segment
from engine.model.attention_choice import choose_attention, mistake_of
from engine.model.gather_attention import GATHER
from engine.model.triton_attention import TritonAttention
from tests.triton_device import DEVICE, IS_INTERPRETED, NEEDS_TRITON

pytestmark = NEEDS_TRITON

# start and tokens: a whole prompt, later chunks of others, verify windows, single tokens; ends in and at the end of a block
MIXTURE = ((0, 21), (13, 19), (29, 5), (0, 1), (16, 1), (47, 1))


@dataclass(frozen=True)
class Case:
    """A ragged batch, and a layer that runs it."""

    segments: tuple[tuple[int, int], ...] = MIXTURE
    group: int = 4
    num_kv_heads: int = 2
    head_dim: int = 16
    block_size: int = 16
    window: int | None = None
    dtype: torch.dtype = torch.float32
    num_filling: int = 0
    seed: int = 1

    @property
    def shape(self) -> AttentionShape:
        return AttentionShape(self.group * self.num_kv_heads, self.num_kv_heads, self.head_dim, (self.window,), self.dtype, DEVICE)

    def placed(self) -> tuple[list[Segment], int]:
        """With blocks from all over a pool of that size."""
        nums = [-(-(start + num) // self.block_size) for start, num in self.segments]
        free = random.Random(self.seed).sample(range(sum(nums) + 2), sum(nums) + 2)
        return [Segment([free.pop() for _ in range(n)], *own) for n, own in zip(nums, self.segments, strict=True)], sum(nums) + 2


@torch.inference_mode()
def attended(case: Case, kind: AttentionKind, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    """What comes out, and what is stored then. Slots that nobody is to read hold what is no number before."""
    generator = torch.Generator().manual_seed(case.seed)
    shape, (segments, num_blocks) = case.shape, case.placed()
    cache = KVCache(1, num_blocks * case.block_size, (case.num_kv_heads, case.head_dim), dtype or case.dtype, DEVICE)
    store = cache.layers[0]
    numbers = torch.randn(store.shape, generator=generator).to(case.dtype).to(store)
    store[0::2], store[1::2] = torch.nan, torch.inf
    for segment in segments:
        for position in range(segment.first_key(case.window), segment.start):
            slot = segment.block_table[position // case.block_size] * case.block_size + position % case.block_size
            store[slot] = numbers[slot]
    num_rows = sum(segment.num_tokens for segment in segments) + case.num_filling
    packed = torch.randn(num_rows, shape.num_heads + 2 * shape.num_kv_heads, shape.head_dim, generator=generator).to(case.dtype).to(store)
    packed[num_rows - case.num_filling :] = 9.0
    context = kind.over(cache, case.block_size, shape).context(segments, num_rows)
    asked = LayerAttention(0, case.window, 1.3 * case.head_dim**-0.5)
    return context.attend(asked, packed[:, : shape.num_heads], packed[:, shape.num_heads :]), store


def require_equal(case: Case, kind: AttentionKind, tolerance: float = 1e-5) -> None:
    want, want_store = attended(case, GATHER, torch.promote_types(case.dtype, torch.float32))
    got, store = attended(case, kind)
    assert got.dtype == case.dtype
    torch.testing.assert_close(got.to(want.dtype), want, rtol=0, atol=tolerance)
    torch.testing.assert_close(store.to(want_store.dtype), want_store, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("window", [None, 6, 20])
@pytest.mark.parametrize("block_size", [8, 16])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 128])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_a_mixture_of_segments_equals_the_gather(group: int, head_dim: int, block_size: int, window: int | None) -> None:
    case = Case(group=group, num_kv_heads=1, head_dim=head_dim, block_size=block_size, window=window)
    for splits in (1, 2, 3, 4):
        require_equal(case, TritonAttention(splits, keys=16))


def test_what_is_chosen_for_itself_equals_the_gather() -> None:
    for segments in (MIXTURE, ((200, 1),), ((150, 3), (301, 1)), ((0, 130),)):
        for window in (None, 40):
            require_equal(Case(segments, window=window, group=2, head_dim=64), TritonAttention())


def test_it_passes_its_own_trial() -> None:
    shape = AttentionShape(4, 2, 16, (None, 20), torch.float32, DEVICE)
    assert choose_attention("triton", shape, 16, print).name == "triton"
    assert mistake_of(TritonAttention(2, keys=16), shape, 8) is None


@pytest.mark.parametrize("group", [16, 17, 64])
def test_groups_that_fill_a_tile(group: int) -> None:
    require_equal(Case(((5, 3), (9, 1)), group=group, num_kv_heads=1), TritonAttention(2, keys=16))


@pytest.mark.parametrize("block_size", [1, 3, 24])
def test_blocks_of_other_sizes(block_size: int) -> None:
    require_equal(Case(block_size=block_size, window=9), TritonAttention(2, keys=16))


@pytest.mark.parametrize("splits", [1, 3])
def test_rows_that_only_fill_up_are_written_nowhere_and_get_zeros(splits: int) -> None:
    case = Case(num_filling=5, window=6)
    require_equal(case, TritonAttention(splits, keys=16))
    assert attended(case, TritonAttention(splits))[0][-5:].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("splits", [1, 4])
def test_in_sixteen_bits_it_equals_float32_but_for_rounding(splits: int, dtype: torch.dtype) -> None:
    if dtype is torch.bfloat16 and IS_INTERPRETED:
        pytest.skip("Triton's interpreter multiplies the bits of bfloat16 as if they were integers")
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    require_equal(Case(group=3, head_dim=64, window=20, dtype=dtype), TritonAttention(splits, keys=16), tolerance)


lengths = st.tuples(st.one_of(st.just(0), st.integers(0, 60)), st.one_of(st.just(1), st.integers(1, 24)))
cases = st.builds(
    Case,
    segments=st.lists(lengths, min_size=1, max_size=5).map(tuple),
    group=st.integers(1, 9),
    num_kv_heads=st.integers(1, 2),
    head_dim=st.sampled_from((8, 16, 24, 64)),
    block_size=st.sampled_from((2, 5, 16)),
    window=st.one_of(st.none(), st.integers(1, 40)),
    num_filling=st.integers(0, 3),
    seed=st.integers(0, 99),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases, splits=st.integers(1, 5))
def test_any_ragged_batch_equals_the_gather(case: Case, splits: int) -> None:
    require_equal(case, TritonAttention(splits, keys=16))


def test_a_pass_that_is_like_another_has_its_numbers_in_the_same_places() -> None:
    """What a CUDA graph of one has captured, the other may replay."""
    case = Case()
    segments, num_blocks = case.placed()
    cache = KVCache(1, num_blocks * 16, (2, 16), torch.float32, DEVICE)
    paged = TritonAttention().over(cache, 16, case.shape)
    first = paged.context(segments, 64)
    places = [tensor.data_ptr() for tensor in (first.positions, first.slots, first.tables, *(own.tiles for own in first.launches))]
    other = [Segment(own.block_table, own.start, max(1, own.num_tokens - 1)) for own in segments]
    second = paged.context(other, 64)
    assert places == [
        tensor.data_ptr() for tensor in (second.positions, second.slots, second.tables, *(own.tiles for own in second.launches))
    ]
    assert [(own.rows, own.splits) for own in first.launches] == [(own.rows, own.splits) for own in second.launches]
