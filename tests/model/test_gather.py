"""Attention that gathers: which segments share a call, and what comes out whoever they share it with."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.kv.cache import KVCache
from engine.model.attention import LayerAttention, Segment
from engine.model.gather_attention import _alike, paged_context

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 6, 2, 4, 4
SCALING = 0.3


def naive(query: Tensor, keys: Tensor, values: Tensor, position: int, window: int | None) -> Tensor:
    """[heads, head_dim] of one query [heads, head_dim] at a position, over keys and values [positions, kv_heads, head_dim]."""
    first = 0 if window is None else max(0, position - window + 1)
    out = []
    for head in range(HEADS):
        own = head // (HEADS // KV_HEADS)
        weights = (keys[first : position + 1, own] @ query[head] * SCALING).softmax(-1)
        out.append(weights @ values[first : position + 1, own])
    return torch.stack(out)


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("seed", range(12))
def test_every_query_sees_its_own_past_whoever_shares_the_call(seed: int, window: int | None) -> None:
    rng, torch_rng = random.Random(seed), torch.Generator().manual_seed(seed)
    cache = KVCache(1, 200 * BLOCK_SIZE, (KV_HEADS, HEAD_DIM), torch.float64, torch.device("cpu"))
    cache.layers[0].fill_(torch.nan)  # what nobody wrote must not be read
    free = rng.sample(range(200), 200)
    segments, pasts = [], []
    for _ in range(rng.choice((1, 2, 3, 9))):
        start, num = rng.choice((0, 3, rng.randint(0, 40))), rng.choice((1, 1, 2, 3, 8, 9, 20))
        table = [free.pop() for _ in range(-(-(start + num) // BLOCK_SIZE))]
        past = torch.randn(start, 2 * KV_HEADS, HEAD_DIM, generator=torch_rng, dtype=torch.float64)
        for position in range(start):
            cache.layers[0][table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE] = past[position]
        segments.append(Segment(table, start, num))
        pasts.append(past)
    num_tokens = sum(segment.num_tokens for segment in segments)
    query = torch.randn(num_tokens + 2, HEADS, HEAD_DIM, generator=torch_rng, dtype=torch.float64)
    kv = torch.randn(num_tokens + 2, 2 * KV_HEADS, HEAD_DIM, generator=torch_rng, dtype=torch.float64)
    context = paged_context(segments, BLOCK_SIZE, cache, (window,), num_tokens + 2)
    got = context.attend(LayerAttention(0, window, SCALING), query, kv)
    row = 0
    for segment, past in zip(segments, pasts, strict=True):
        keys, values = torch.cat((past, kv[row : row + segment.num_tokens])).split(KV_HEADS, 1)
        for position in range(segment.start, segment.end):
            assert torch.allclose(got[row], naive(query[row], keys, values, position, window), atol=1e-12)
            row += 1
    assert not got[num_tokens:].any()


def shared(segments: list[tuple[int, int]]) -> list[list[int]]:
    """Who shares a call, of segments of so many queries and keys."""
    nums, keys = (np.array(numbers) for numbers in zip(*segments, strict=True))
    return [members.tolist() for members in _alike(nums, keys)]


def test_segments_share_a_call_where_padding_is_cheap() -> None:
    assert shared([(1, 100), (3, 120), (1, 90)]) == [[0, 1, 2]]
    assert shared([(1, 100), (1, 4000), (1, 90)]) == [[0, 2], [1]]
    assert shared([(1, 400), (500, 500), (1, 600), (400, 480)]) == [[0, 2], [3], [1]]


@pytest.mark.parametrize("seed", range(20))
def test_everybody_is_in_one_call(seed: int) -> None:
    rng = random.Random(seed)
    segments = [
        (num := rng.choice((1, rng.randint(1, 600))), num + rng.choice((0, rng.randint(0, 3000)))) for _ in range(rng.randint(1, 40))
    ]
    assert sorted(i for members in shared(segments) for i in members) == list(range(len(segments)))
