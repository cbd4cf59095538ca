"""Attention of a ragged batch over the paged KV cache: what every kind of it must do, and the kind that all others are held to.

All sequences of a step are packed into one row [1, N]. A Segment says which positions of which block table its part of the row
holds; queries of a segment see the earlier positions of their own sequence, in a sliding layer the last `window` of them, and nothing
else.

GATHER runs on every device: it gathers keys and values and calls scaled_dot_product_attention. Segments of similar size share one call:
both sides are padded to the largest of their power-of-two class, so padding at most doubles the work. A sliding layer gathers the keys
that its window reaches and no others; nothing is freed behind a window.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from engine.kv.cache import KVCache
from engine.transfer import to_device

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
    def forms(self) -> ListLike[AttentionKind]:
        """The ways in which it may go about a pass, each of which is to be tried out."""

    def lacks(self, shape: AttentionShape) -> str | None:
        """What is missing here for attention of this shape; None where nothing is known to be."""

    def over(self, cache: KVCache, block_size: int, shape: AttentionShape) -> Attention:
        """Attention over a cache whose slots are `block * block_size + offset`."""


@dataclass(frozen=True, slots=True)
class _Group:
    """Segments that share one attention call: G of them, at most n queries and L keys each."""

    shape: tuple[int, int]  # G, n
    slots: Tensor  # [G, L] of keys and values; padded with the sequence's own first
    mask: Tensor | None  # [G, 1, n, L] 0 where a query sees a key, else -inf; None where all see all
    first: int | None  # where its queries begin in the packed row, if they lie there one after another; else None, and
    queries: Tensor  # [G * n] their indices in the packed row, padded with 0;
    places: Tensor  # [M] which of these are not padding
    rows: Tensor  # [M] and what their indices are

    def gather(self, packed: Tensor) -> Tensor:
        """Its queries [G, heads, n, head_dim] of packed [N, heads, head_dim]."""
        num_groups, num_queries = self.shape
        first = self.first
        own = packed.index_select(0, self.queries) if first is None else packed[first : first + num_groups * num_queries]
        return own.view(num_groups, num_queries, *packed.shape[1:]).transpose(1, 2)

    def scatter(self, attended: Tensor, packed: Tensor) -> None:
        """Put attended [G, heads, n, head_dim] where its queries were in packed [N, heads, head_dim]."""
        own = attended.transpose(1, 2).flatten(0, 1)
        if self.first is None:
            # index vectors from the host, not booleans: those would wait for the device in every layer
            packed.index_copy_(0, self.rows, own.index_select(0, self.places))
        else:
            packed[self.first : self.first + len(own)] = own


@dataclass(frozen=True, slots=True)
class GatherContext:
    """Index tensors of a pass."""

    cache: KVCache
    positions: Tensor  # [N]
    slots: Tensor  # [M] where the keys and values of the first M rows go; the others are padding
    groups: Mapping[int | None, tuple[_Group, ...]]  # by the layer's window

    def attend(self, asked: LayerAttention, query: Tensor, kv: Tensor) -> Tensor:
        num_real = len(self.slots)
        self.cache.write(asked.layer, self.slots, kv if num_real == len(kv) else kv[:num_real])
        output = torch.zeros_like(query, memory_format=torch.contiguous_format)  # rows that only fill up stay zero
        for group in self.groups[asked.window]:
            keys, values = self.cache.read(asked.layer, group.slots)
            attended = scaled_dot_product_attention(
                group.gather(query), keys, values, attn_mask=group.mask, scale=asked.scaling, enable_gqa=True
            )
            group.scatter(attended, output)
        return output


def paged_context(
    segments: ListLike[Segment], block_size: int, cache: KVCache, windows: ListLike[int | None] = (None,), num_rows: int = 0
) -> GatherContext:
    """Index tensors for a packed row that holds `segments` one after another, filled up to `num_rows`.

    `windows` are the distinct ones of the layers that will run: how many positions a query sees, its own included; None for all.
    """
    store = cache.layers[0]
    runs = [np.arange(segment.start, segment.end) for segment in segments]
    longest = max(segment.end for segment in segments)
    reach = {window: window if window is not None and window < longest else None for window in windows}
    groups = {window: _groups(segments, window, block_size, store) for window in set(reach.values())}
    slots = np.concatenate([_slots(segment, run, block_size) for segment, run in zip(segments, runs, strict=True)])
    positions = np.zeros(max(num_rows, len(slots)), dtype=np.int64)
    positions[: len(slots)] = np.concatenate(runs)
    return GatherContext(
        cache=cache,
        positions=to_device(positions, store.device),
        slots=to_device(slots, store.device),
        groups={window: groups[reached] for window, reached in reach.items()},
    )


def is_hidden(query: Ints, key: Ints, window: int | None) -> NDArray[np.bool_]:
    """Whether a key is later than the query or behind its window. Positions broadcast against each other."""
    later = key > query
    return later if window is None else later | (key <= query - window)


def _slots(segment: Segment, positions: Ints, block_size: int) -> Ints:
    table = np.asarray(segment.block_table, dtype=np.int64)
    return table[positions // block_size] * block_size + positions % block_size


def _groups(segments: ListLike[Segment], window: int | None, block_size: int, store: Tensor) -> tuple[_Group, ...]:
    classes: dict[tuple[int, int], list[tuple[int, Segment]]] = defaultdict(list)
    offset = 0
    for segment in segments:
        num_keys = segment.end - segment.first_key(window)
        classes[segment.num_tokens.bit_length(), num_keys.bit_length()].append((offset, segment))
        offset += segment.num_tokens
    return tuple(_group(members, window, block_size, store) for members in classes.values())


def _group(members: list[tuple[int, Segment]], window: int | None, block_size: int, store: Tensor) -> _Group:
    num_queries = max(segment.num_tokens for _, segment in members)
    num_keys = max(segment.end - segment.first_key(window) for _, segment in members)
    queries = np.zeros((len(members), num_queries), dtype=np.int64)
    # of queries, counted from the first key of their row; a padded one stands on that key, so that it sees something
    standing = np.zeros((len(members), num_queries), dtype=np.int64)
    slots = np.zeros((len(members), num_keys), dtype=np.int64)
    places = []
    for row, (offset, segment) in enumerate(members):
        num, first = segment.num_tokens, segment.first_key(window)
        queries[row, :num] = np.arange(offset, offset + num)
        standing[row, :num] = np.arange(segment.start - first, segment.end - first)
        own = _slots(segment, np.arange(first, segment.end), block_size)
        slots[row, : len(own)] = own
        slots[row, len(own) :] = own[0]  # a stranger's slot could hold an infinity, which a mask does not stop
        places.append(np.arange(row * num_queries, row * num_queries + num))
    hidden = is_hidden(standing[:, None, :, None], np.arange(num_keys), window)
    flat, place = queries.reshape(-1), np.concatenate(places)
    is_run = len(place) == len(flat) and bool((np.diff(flat) == 1).all())
    return _Group(
        shape=queries.shape,
        slots=to_device(slots, store.device),
        mask=_mask(hidden, store) if hidden.any() else None,
        first=int(flat[0]) if is_run else None,
        queries=to_device(flat, store.device),
        places=to_device(place, store.device),
        rows=to_device(flat[place], store.device),
    )


def _mask(hidden: NDArray[np.bool_], store: Tensor) -> Tensor:
    mask = torch.zeros(hidden.shape, dtype=store.dtype, device=store.device)
    return mask.masked_fill_(to_device(hidden, store.device), -torch.inf)


@dataclass(frozen=True)
class _Gather:
    """GATHER over one cache."""

    cache: KVCache
    block_size: int
    windows: tuple[int | None, ...]

    def context(self, segments: ListLike[Segment], num_rows: int = 0) -> GatherContext:
        return paged_context(segments, self.block_size, self.cache, self.windows, num_rows)

    def fixed(self, room: Room) -> None:
        return None


class GatherAttention:
    """Runs everywhere, in every dtype, at the price of a copy of all keys and values that are seen."""

    name = "gather"

    @property
    def forms(self) -> ListLike[AttentionKind]:
        return (self,)

    def lacks(self, shape: AttentionShape) -> str | None:
        return None

    def over(self, cache: KVCache, block_size: int, shape: AttentionShape) -> Attention:
        return _Gather(cache, block_size, shape.windows)


GATHER = GatherAttention()
