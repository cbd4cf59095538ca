"""Triton kernels for what lies between the products of a decoder layer: residual sum and norm, rotation, gating.

Beside kernels.py the only file that imports Triton. Each program has one row, or a part of one, to itself and adds it up in an order that
the width alone decides: a row's bits do not depend on its neighbours. Everything is computed in float32 and rounded where torch's
operations round. Strides and widths are constants, which a model has few of; the number of rows is the grid's.
"""

import os

import triton
import triton.language as tl

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@triton.jit
def add_norm(
    x,  # [N, WIDTH], rows X_STRIDE apart; delta is added to it
    delta,  # [N, WIDTH], rows DELTA_STRIDE apart, with HAS_DELTA
    weight,  # [WIDTH]
    output,  # [N, WIDTH], contiguous
    X_STRIDE: tl.constexpr,
    DELTA_STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    EPSILON: tl.constexpr,
    OFFSET: tl.constexpr,  # is added to weights
    ROUNDS_FIRST: tl.constexpr,  # whether what is normed is rounded before it is multiplied by weights, too
    HAS_DELTA: tl.constexpr,
    BLOCK: tl.constexpr,  # WIDTH, filled up to a power of two
):
    """x += delta; output = x / root of mean square * weight. Grid: N."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_own = columns < WIDTH
    numbers = tl.load(x + row * X_STRIDE + columns, mask=is_own, other=0.0).to(tl.float32)
    if HAS_DELTA:
        added = tl.load(delta + row * DELTA_STRIDE + columns, mask=is_own, other=0.0).to(tl.float32)
        total = (numbers + added).to(x.dtype.element_ty)
        tl.store(x + row * X_STRIDE + columns, total, mask=is_own)
        numbers = total.to(tl.float32)
    normed = numbers * tl.rsqrt(tl.sum(numbers * numbers, 0) / WIDTH + EPSILON)
    if ROUNDS_FIRST:
        normed = normed.to(output.dtype.element_ty).to(tl.float32)
    weights = tl.load(weight + columns, mask=is_own, other=0.0).to(tl.float32) + OFFSET
    tl.store(output + row * WIDTH + columns, (normed * weights).to(output.dtype.element_ty), mask=is_own)


@triton.jit
def rotate(
    heads,  # [N, queries, keys and others, 2 * HALF], rows ROW_STRIDE apart; the first NUM_HEADS are queries and keys
    weights,  # [2, 2 * HALF] of norms, of queries and of keys, with HAS_NORM
    cosines,  # [N, 2 * HALF], rows TABLE_STRIDE apart, both halves alike
    sines,  # the same
    ROW_STRIDE: tl.constexpr,
    TABLE_STRIDE: tl.constexpr,
    NUM_QUERIES: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    EPSILON: tl.constexpr,
    OFFSET: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_H: tl.constexpr,  # heads of a program
    BLOCK_D: tl.constexpr,  # HALF, filled up to a power of two
):
    """Norm queries and keys head by head, and rotate them by their positions, in place. Grid: N, blocks of heads."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    dims = tl.arange(0, BLOCK_D)
    is_dim = dims < HALF
    is_own = (head < NUM_HEADS)[:, None] & is_dim[None, :]
    at = heads + row * ROW_STRIDE + head[:, None] * (2 * HALF) + dims[None, :]
    first = tl.load(at, mask=is_own, other=0.0).to(tl.float32)
    second = tl.load(at + HALF, mask=is_own, other=0.0).to(tl.float32)
    kind = heads.dtype.element_ty
    if HAS_NORM:
        level = tl.rsqrt(tl.sum(first * first + second * second, 1) / (2 * HALF) + EPSILON)[:, None]
        first, second = first * level, second * level
        if ROUNDS_FIRST:
            first, second = first.to(kind).to(tl.float32), second.to(kind).to(tl.float32)
        of = weights + tl.where(head < NUM_QUERIES, 0, 2 * HALF)[:, None] + dims[None, :]
        first = first * (tl.load(of, mask=is_own, other=0.0).to(tl.float32) + OFFSET)
        second = second * (tl.load(of + HALF, mask=is_own, other=0.0).to(tl.float32) + OFFSET)
        first, second = first.to(kind).to(tl.float32), second.to(kind).to(tl.float32)
    cosine = tl.load(cosines + row * TABLE_STRIDE + dims, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    sine = tl.load(sines + row * TABLE_STRIDE + dims, mask=is_dim, other=0.0).to(tl.float32)[None, :]
    rotated = (first * cosine).to(kind).to(tl.float32) - second * sine
    tl.store(at, rotated.to(kind), mask=is_own)
    rotated = (second * cosine).to(kind).to(tl.float32) + first * sine
    tl.store(at + HALF, rotated.to(kind), mask=is_own)


@triton.jit
def gate_up(
    joint,  # [N, 2 * WIDTH], gate before up, rows STRIDE apart
    output,  # [N, WIDTH], contiguous
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    IS_GELU: tl.constexpr,  # in its approximation by tanh; else SiLU
    BLOCK: tl.constexpr,
):
    """output = act(gate) * up. Grid: N, blocks of columns."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_own = columns < WIDTH
    gate = tl.load(joint + row * STRIDE + columns, mask=is_own, other=0.0).to(tl.float32)
    up = tl.load(joint + row * STRIDE + WIDTH + columns, mask=is_own, other=0.0).to(tl.float32)
    level = gate
    if IS_GELU:  # 0.5 (1 + tanh z) is the logistic function of 2 z (Hendrycks and Gimpel 2016)
        level = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
    fade = tl.exp(-tl.abs(level))  # of the side where it cannot overflow
    acted = (gate * tl.where(level < 0, fade, 1.0) / (1.0 + fade)).to(output.dtype.element_ty).to(tl.float32)
    tl.store(output + row * WIDTH + columns, (acted * up).to(output.dtype.element_ty), mask=is_own)
