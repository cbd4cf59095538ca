"""Attention of a ragged batch over the paged KV cache: what every kind of it must do.

All sequences of a step are packed into one row [1, N]. A Segment says which positions of which block table its part of the row
holds; queries of a segment see the earlier positions of their own sequence, in a sliding layer the last `window` of them, and nothing
else.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.kv.cache import KVCache

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Segment:
    """`num_tokens` consecutive positions of one sequence, from `start`; its KV lies in the blocks of `block_table`."""

    block_table: ListLike[int]
    start: int
    num_tokens: int

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    def first_key(self, window: int | None) -> int:
        """The first position that any of its queries sees."""
        return 0 if window is None else max(0, self.start - window + 1)


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What one layer asks of attention."""

    layer: int
    window: int | None  # positions that a query sees, its own included; None for all
    scaling: float  # of the products of queries and keys


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """What all layers of a model ask of attention."""

    num_heads: int  # of queries; the most that a layer has
    num_kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]  # the distinct ones
    dtype: torch.dtype
    device: torch.device


class PagedContext(Protocol):
    """Where a packed row's tokens stand; made once a pass, the same for all layers."""

    @property
    def positions(self) -> Tensor:
        """[N]; of rows that only fill the packed row up, 0."""

    def attend(self, asked: LayerAttention, query: Tensor, kv: Tensor) -> Tensor:
        """Write the row's keys and values, then attend over what each query sees.

        query [N, heads, head_dim] and kv [N, 2 * kv_heads, head_dim], keys before values, give [N, heads, head_dim]. Rows that only fill
        up are written nowhere and get zeros.
        """


@dataclass(frozen=True, slots=True)
class Room:
    """What fixed passes are to hold at most."""

    num_rows: int  # of a packed row
    num_positions: int  # of a sequence


class FixedPass(Protocol):
    """A pass over a fixed number of rows whose index tensors stay where they are: what was recorded of it can be repeated for others."""

    @property
    def context(self) -> PagedContext: ...

    def tell(self, segments: ListLike[Segment]) -> None:
        """Write what the pass runs next, one after another. Rows behind them fill up."""


class FixedPasses(Protocol):
    """Those of one attention. They share their index tensors: the one that was told last is the one to run."""

    @property
    def windows(self) -> ListLike[int]:
        """Tokens of a segment, ascending: passes over segments of no more than these are launched in a way of their own."""

    def make(self, num_rows: int, window: int) -> FixedPass:
        """For segments of up to `window` tokens, which may be more than the last of `windows`."""


class Attention(Protocol):
    """Attention over one KV cache."""

    def context(self, segments: ListLike[Segment], num_rows: int = 0) -> PagedContext:
        """Of a packed row that holds `segments` one after another, filled up to `num_rows`. Good until the next one is asked for."""

    def fixed(self, room: Room) -> FixedPasses | None:
        """None where index tensors lie elsewhere in every pass, or the host has a part in each."""


class AttentionKind(Protocol):
    """A way to compute attention. Raises whatever its library does where it cannot; attention_choice.py tries it out before it serves."""

    @property
    def name(self) -> str: ...

    @property
    def is_recordable(self) -> bool:
        """Whether small passes of it can be recorded (graphs.py)."""

    @property
    def forms(self) -> ListLike[AttentionKind]:
        """The ways in which it may go about a pass, each of which is to be tried out."""

    def lacks(self, shape: AttentionShape) -> str | None:
        """What is missing here for attention of this shape; None where nothing is known to be."""

    def over(self, cache: KVCache, block_size: int, shape: AttentionShape) -> Attention:
        """Attention over a cache whose slots are `block * block_size + offset`."""


def is_hidden(query: Ints, key: Ints, window: int | None) -> NDArray[np.bool_]:
    """Whether a key is later than the query or behind its window. Positions broadcast against each other."""
    later = key > query
    return later if window is None else later | (key <= query - window)
