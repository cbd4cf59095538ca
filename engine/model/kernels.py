"""Triton kernels over the paged KV cache: storing keys and values, attention along block tables, joining parts of it.

Beside layer_kernels.py the only file that imports Triton, which CUDA builds of torch bring along. With TRITON_INTERPRET=1 the same code
runs on a CPU, step by step, for tests.

Words: a tile is a run of queries of one segment, [segment, first row, queries, position of the first]; its queries of the GROUP heads that
share a key-value head make the rows of one product. A tile of no queries is padding: it reads and writes nothing.
One whose first position is so far below zero that it ends there has queries without keys, which get zeros.
"""

import os

import triton
import triton.language as tl

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def write_kv(kv, cache, slots, kv_stride, cache_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store rows of kv [N, WIDTH] at slots [N] of cache [slots, WIDTH], but for those whose slot is negative. Grid: N, blocks of WIDTH."""
    row = tl.program_id(0)
    slot = tl.load(slots + row).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_stored = columns < tl.where(slot < 0, 0, WIDTH)
    values = tl.load(kv + row.to(tl.int64) * kv_stride + columns, mask=is_stored)
    tl.store(cache + slot * cache_stride + columns, values, mask=is_stored)


@triton.jit(do_not_specialize=["window"])
def attend(
    query,  # [N, heads, HEAD_DIM], rows query_stride apart
    cache,  # [slots, 2 * kv_heads, HEAD_DIM], slots cache_stride apart
    tables,  # [S, B] block tables, table_stride apart
    tiles,  # [T, 4]
    num_parts,  # [T] of the keys of each tile, with IS_SPLIT: no more than there are splits
    output,  # [N, heads, HEAD_DIM], contiguous; with IS_SPLIT float32 [splits, T, kv_heads, BLOCK_M, HEAD_DIM], parts of it ...
    levels,  # ... and how much each weighs, float32 [splits, T, kv_heads, BLOCK_M]: the logarithm to base 2 of its sum of exponentials
    query_stride,
    cache_stride,
    table_stride,
    window,  # positions that a query sees, its own included, with HAS_WINDOW
    scale,  # of the products of queries and keys, times the logarithm of e to base 2
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,  # rows of a tile
    BLOCK_N: tl.constexpr,  # keys at a time
    BLOCK_D: tl.constexpr,  # HEAD_DIM, filled up to a power of two
):
    """Each query of a tile over the keys that it sees, or over one of several parts of them. Grid: T, kv_heads, splits.

    A tile of fewer parts than there are splits leaves the programs behind them nothing to do: so one grid, recorded once, suits long keys
    and short ones.
    """
    tile = tiles + tl.program_id(0) * 4
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    segment = tl.load(tile)
    first_row = tl.load(tile + 1)
    num_queries = tl.load(tile + 2)
    first_position = tl.load(tile + 3)
    parts = tl.num_programs(2)
    if IS_SPLIT:
        parts = tl.load(num_parts + tl.program_id(0))
    if (num_queries == 0) | (split >= parts):
        return

    rows = tl.arange(0, BLOCK_M)
    heads = kv_head * GROUP + rows % GROUP
    positions = first_position + rows // GROUP
    is_row = rows // GROUP < num_queries
    dims = tl.arange(0, BLOCK_D)
    is_dim = dims < HEAD_DIM
    is_value = is_row[:, None] & is_dim[None, :]
    at = (first_row + rows // GROUP).to(tl.int64)
    queries = tl.load(query + at[:, None] * query_stride + heads[:, None] * HEAD_DIM + dims[None, :], mask=is_value, other=0.0)

    # the keys that this program sees: its part of those between the first query's first and the last query's last
    behind = first_position + num_queries
    first_key = first_position * 0
    if HAS_WINDOW:
        first_key = tl.maximum(first_position - window + 1, 0)
    lowest = first_key // BLOCK_N * BLOCK_N
    part = tl.cdiv(tl.cdiv(behind - lowest, BLOCK_N), parts) * BLOCK_N
    begin = lowest + split * part
    end = tl.minimum(begin + part, behind)

    keys_at = cache + kv_head * HEAD_DIM
    values_at = keys_at + NUM_KV_HEADS * HEAD_DIM
    table = tables + segment.to(tl.int64) * table_stride
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        is_key = (keys >= first_key) & (keys < end)  # others are strangers': they may hold infinities, which a zero does not stop
        block = tl.load(table + keys // BLOCK_SIZE, mask=is_key, other=0)
        slot = (block.to(tl.int64) * BLOCK_SIZE + keys % BLOCK_SIZE) * cache_stride
        key = tl.load(keys_at + slot[None, :] + dims[:, None], mask=is_key[None, :] & is_dim[:, None], other=0.0)
        score = tl.dot(queries, key, input_precision="ieee") * scale
        is_seen = is_key[None, :] & (keys[None, :] <= positions[:, None])
        if HAS_WINDOW:
            is_seen = is_seen & (keys[None, :] > positions[:, None] - window)
        score = tl.where(is_seen, score, float("-inf"))
        top = tl.maximum(highest, tl.max(score, 1))
        level = tl.where(top == float("-inf"), 0.0, top)  # nothing seen yet: -inf less itself would be no number
        weight = tl.exp2(score - level[:, None])
        fade = tl.exp2(highest - level)
        value = tl.load(values_at + slot[:, None] + dims[None, :], mask=is_key[:, None] & is_dim[None, :], other=0.0)
        mixed = mixed * fade[:, None] + tl.dot(weight.to(value.dtype), value, input_precision="ieee")
        total = total * fade + tl.sum(weight, 1)
        highest = top

    total = tl.where(total > 0.0, total, 1.0)  # of a part without keys, and of rows that are padding
    mixed = mixed / total[:, None]
    if IS_SPLIT:
        program = (split.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * NUM_KV_HEADS + kv_head
        place = program * BLOCK_M + rows
        tl.store(levels + place, highest + tl.log2(total), mask=is_row)
    else:
        place = at * (NUM_KV_HEADS * GROUP) + heads
    tl.store(output + place[:, None] * HEAD_DIM + dims[None, :], mixed.to(output.dtype.element_ty), mask=is_value)


@triton.jit
def join(
    parts,  # [splits, T, kv_heads, BLOCK_M, HEAD_DIM]
    levels,  # [splits, T, kv_heads, BLOCK_M]
    tiles,  # [T, 4]
    num_parts,  # [T]
    output,  # [N, heads, HEAD_DIM], contiguous
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Join what `attend` made of the parts of each query's keys, each by its weight. Grid: T, kv_heads."""
    tile = tiles + tl.program_id(0) * 4
    first_row = tl.load(tile + 1)
    num_queries = tl.load(tile + 2)
    if num_queries == 0:
        return

    rows = tl.arange(0, BLOCK_M)
    kv_head = tl.program_id(1)
    is_row = rows // GROUP < num_queries
    dims = tl.arange(0, BLOCK_D)
    is_value = is_row[:, None] & (dims < HEAD_DIM)[None, :]
    own = (tl.program_id(0).to(tl.int64) * NUM_KV_HEADS + kv_head) * BLOCK_M + rows
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for split in range(tl.load(num_parts + tl.program_id(0))):
        place = own + split * tl.num_programs(0).to(tl.int64) * (NUM_KV_HEADS * BLOCK_M)
        part_level = tl.load(levels + place, mask=is_row, other=float("-inf"))
        part = tl.load(parts + place[:, None] * HEAD_DIM + dims[None, :], mask=is_value, other=0.0)
        top = tl.maximum(highest, part_level)
        level = tl.where(top == float("-inf"), 0.0, top)
        fade, weight = tl.exp2(highest - level), tl.exp2(part_level - level)
        mixed = mixed * fade[:, None] + part * weight[:, None]
        total = total * fade + weight
        highest = top
    mixed = mixed / tl.where(total > 0.0, total, 1.0)[:, None]
    at = (first_row + rows // GROUP).to(tl.int64) * (NUM_KV_HEADS * GROUP) + kv_head * GROUP + rows % GROUP
    tl.store(output + at[:, None] * HEAD_DIM + dims[None, :], mixed.to(output.dtype.element_ty), mask=is_value)
