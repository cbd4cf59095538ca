"""Randomness as a function of (seed, choice index, position, purpose), and drawing a token with it.

No stream is advanced anywhere, so a neighbour in the batch, the batch's shape or a draft length cannot shift a request's numbers.
Seed and choice index are folded into the sequence's `key`; a position is the absolute index, prompt included, of the token that
is being chosen. Everything is integer arithmetic on the tensors' device: the numbers are the same on every device.
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor


class Purpose(enum.IntEnum):
    """What a number is for; the three at one position are independent."""

    DRAFT = 1
    ACCEPT = 2
    RECOVER = 3


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


# constants of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014)
_GAMMA = _signed(0x9E3779B97F4A7C15)
_FIRST = _signed(0xBF58476D1CE4E5B9)
_SECOND = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, by: int) -> Tensor:
    return (x >> by) & ((1 << (64 - by)) - 1)  # int64 shifts in copies of the sign bit; the mask takes them out


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _FIRST
    x = (x ^ _shift_right(x, 27)) * _SECOND
    return x ^ _shift_right(x, 31)


def keys_of_round(keys: Tensor, starts: Tensor) -> Tensor:
    """Keys [N] of numbers that are one round's own, from those of sequences and the positions [N] at which their rounds begin.

    For whoever looks at a number and may not use it up: at that position the next round needs one that nothing is known of.
    """
    return _mix(keys ^ _mix(starts * 4 * _GAMMA + _GAMMA))


def uniforms(keys: Tensor, positions: Tensor, purpose: Purpose) -> Tensor:
    """Uniform numbers in [0, 1), float64, for int64 keys and positions, broadcast together. Every float64 is a multiple of 2^-53."""
    counter = positions * 4 + int(purpose)
    bits = _mix(keys ^ _mix(counter * _GAMMA + _GAMMA))
    return _shift_right(bits, 11).to(torch.float64) * 2.0**-53


_BLOCK = 128  # tokens that are summed before anything is accumulated


def draw(weights: Tensor, u: Tensor) -> Tensor:
    """Token ids [N] by inverse CDF from weights [N, V] (non-negative, any total) and uniforms u [N].

    The CDF is in float64: a float32 one over 49,152 tokens ends up to 1.5e-5 off its total. It is made in two levels, sums of
    blocks and then the tokens of one block; one over the whole vocabulary takes two to five times as long on a CPU. The result
    always has a positive weight, except in a row without any, which gives some token.
    """
    vocab = weights.shape[-1]
    blocked = _blocks(weights, 0.0)
    sums = blocked.sum(-1, dtype=torch.float64)
    cdf = sums.cumsum(-1)
    goal = u.unsqueeze(-1) * cdf[:, -1:]
    block = _first_above(cdf, goal)
    rest = goal - (cdf.gather(-1, block) - sums.gather(-1, block))
    inside = _of_block(blocked, block)
    token = block * _BLOCK + _first_above(inside.cumsum(-1, dtype=torch.float64), rest.clamp(min=0))
    return token.squeeze(-1).clamp(max=vocab - 1)


def favourites(weights: Tensor) -> Tensor:
    """The token of the largest weight [N, 1] in each row of [N, V], the first of equal ones.

    In two levels, too: torch's argmax over a vocabulary takes five times as long at 6 rows on a CPU, and thirteen times at 32.
    """
    blocked = _blocks(weights, -torch.inf)
    block = blocked.amax(-1).argmax(-1, keepdim=True)
    return block * _BLOCK + _of_block(blocked, block).argmax(-1, keepdim=True)


def _blocks(weights: Tensor, filler: float) -> Tensor:
    """[N, V] as [N, ceil(V / block), block]."""
    padding = -weights.shape[-1] % _BLOCK
    padded = torch.nn.functional.pad(weights, (0, padding), value=filler) if padding else weights
    return padded.reshape(weights.shape[0], padded.shape[-1] // _BLOCK, _BLOCK)


def _of_block(blocked: Tensor, block: Tensor) -> Tensor:
    """[N, block], the block `block` [N, 1] of each row."""
    return blocked.gather(1, block.unsqueeze(-1).expand(-1, -1, _BLOCK)).squeeze(1)


def _first_above(cdf: Tensor, goal: Tensor) -> Tensor:
    """[N, 1] first index whose cumulative weight exceeds the goal; rounding cannot lead behind the last positive weight."""
    index = torch.searchsorted(cdf, goal, right=True)
    last = torch.searchsorted(cdf, cdf[:, -1:].contiguous())
    return torch.minimum(index, last).clamp_(max=cdf.shape[-1] - 1)
