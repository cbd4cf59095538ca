"""Attention that gathers: the kind that runs everywhere, and that all others are held to.

Keys and values are gathered, and scaled_dot_product_attention is called. Segments share a call where padding to the largest of them costs
less than another call would. A sliding layer gathers the keys that its window reaches and no others; nothing is freed behind a window.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from engine.kv.cache import KVCache
from engine.model.attention import Attention, AttentionKind, AttentionShape, Ints, LayerAttention, Room, Segment, is_hidden
from engine.model.ragged import Ragged
from engine.transfer import to_device

# What a call costs beside its keys, and each key beside those of one query, in keys of one sequence; measured on a CPU of two cores.
_CALL = 320
_QUERY = 1 / 12
_MOST_FOLDED = 8  # queries: with more, torch's kernel fills its products up by itself


@dataclass(frozen=True, slots=True)
class _Scattered:
    """Where the queries of a group are in the packed row, if they do not lie there one after another."""

    queries: Tensor  # [G * n] their indices, padded with 0;
    places: Tensor  # [M] which of these are not padding
    rows: Tensor  # [M] and what their indices are


@dataclass(frozen=True, slots=True)
class _Group:
    """Segments that share one attention call: G of them, at most n queries and L keys each."""

    shape: tuple[int, int]  # G, n
    slots: Tensor  # [G, L] of keys and values; padded with the sequence's own first
    mask: Tensor | None  # [G, 1, n, L] 0 where a query sees a key, else -inf; None where all see all
    first: int  # where its queries begin in the packed row
    scattered: _Scattered | None  # None where they lie there one after another
    folded_masks: dict[int, Tensor] = field(default_factory=dict)  # by heads that were folded into queries; made for the first layer

    @property
    def is_folded(self) -> bool:
        """Whether query heads that share a key-value head become queries of one head.

        torch's kernel multiplies head by head, and two or three queries of 16 sequences take twice to five times as long so.
        """
        return 1 < self.shape[1] <= _MOST_FOLDED

    def gather(self, packed: Tensor, num_kv_heads: int) -> tuple[Tensor, Tensor | None]:
        """Its queries of packed [N, heads, head_dim], and their mask: [G, heads, n, head_dim], or folded, with `num_kv_heads` for heads."""
        num_groups, num_queries = self.shape
        if self.scattered is None:
            own = packed[self.first : self.first + num_groups * num_queries]
        else:
            own = packed.index_select(0, self.scattered.queries)
        own = own.view(num_groups, num_queries, *packed.shape[1:])
        if not self.is_folded:
            return own.transpose(1, 2), self.mask
        num_shared = packed.shape[1] // num_kv_heads
        folded = own.view(num_groups, num_queries, num_kv_heads, num_shared, -1).transpose(1, 2).flatten(2, 3)
        return folded, self._folded_mask(num_shared)

    def _folded_mask(self, num_shared: int) -> Tensor | None:
        if self.mask is not None and num_shared not in self.folded_masks:
            self.folded_masks[num_shared] = self.mask.repeat_interleave(num_shared, 2)
        return self.folded_masks.get(num_shared)

    def scatter(self, attended: Tensor, packed: Tensor) -> None:
        """Put what became of those queries where they were in packed [N, heads, head_dim]."""
        if self.is_folded:
            attended = attended.view(*attended.shape[:2], self.shape[1], -1, attended.shape[-1])
        own = attended.transpose(1, 2).reshape(-1, *packed.shape[1:])
        if self.scattered is None:
            packed[self.first : self.first + len(own)] = own
        else:
            # index vectors from the host, not booleans: those would wait for the device in every layer
            packed.index_copy_(0, self.scattered.rows, own.index_select(0, self.scattered.places))


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
            queries, mask = group.gather(query, keys.shape[1])
            is_grouped = queries.shape[1] > keys.shape[1]
            attended = scaled_dot_product_attention(queries, keys, values, attn_mask=mask, scale=asked.scaling, enable_gqa=is_grouped)
            group.scatter(attended, output)
        return output


def paged_context(
    segments: ListLike[Segment], block_size: int, cache: KVCache, windows: ListLike[int | None] = (None,), num_rows: int = 0
) -> GatherContext:
    """Index tensors for a packed row that holds `segments` one after another, filled up to `num_rows`.

    `windows` are the distinct ones of the layers that will run: how many positions a query sees, its own included; None for all.
    """
    device = cache.layers[0].device
    longest = max(segment.end for segment in segments)
    reach = {window: window if window is not None and window < longest else None for window in windows}
    if len(segments) == 1:
        return _context_of_one(segments[0], block_size, cache, reach, num_rows)
    ragged = Ragged.of(segments, block_size)
    groups = {window: _groups(ragged, window, cache.layers[0]) for window in set(reach.values())}
    positions, slots = ragged.places(num_rows)
    return GatherContext(
        cache=cache,
        positions=to_device(positions, device),
        slots=to_device(slots[: ragged.num_tokens], device),
        groups={window: groups[reached] for window, reached in reach.items()},
    )


def _context_of_one(
    segment: Segment, block_size: int, cache: KVCache, reach: Mapping[int | None, int | None], num_rows: int
) -> GatherContext:
    """The same in fewer operations: at one stream each draft needs a context, and none of its numbers is large."""
    store, end = cache.layers[0], segment.end
    blocks = np.asarray(segment.block_table[: -(-end // block_size)], dtype=np.int64)
    slots = to_device((blocks[:, None] * block_size + np.arange(block_size)).reshape(-1)[:end], store.device)
    positions = np.zeros(max(num_rows, segment.num_tokens), dtype=np.int64)
    own = positions[: segment.num_tokens]
    own[:] = np.arange(segment.start, end)

    def group(window: int | None) -> tuple[_Group, ...]:
        first = segment.first_key(window)
        hidden = is_hidden(own[None, None, :, None], np.arange(first, end), window) if len(own) > 1 else None
        return (_Group((1, len(own)), slots[first:].unsqueeze(0), None if hidden is None else _mask(hidden, store), 0, None),)

    groups = {window: group(window) for window in set(reach.values())}
    return GatherContext(
        cache=cache,
        positions=to_device(positions, store.device),
        slots=slots[segment.start :],
        groups={window: groups[reached] for window, reached in reach.items()},
    )


def _groups(ragged: Ragged, window: int | None, store: Tensor) -> tuple[_Group, ...]:
    first_keys = ragged.first_keys(window)
    return tuple(_group(ragged, members, first_keys, window, store) for members in _alike(ragged.nums, ragged.ends - first_keys))


def _alike(nums: Ints, num_keys: Ints) -> list[Ints]:
    """Which of S segments share a call: padding, to the most queries and keys of one of them, must cost less than calls of their own."""
    found: list[list[int]] = []
    most, most_keys, cost = 0, 0, 0.0  # of the last one found
    for i in np.lexsort((num_keys, np.frexp(nums)[1])).tolist():  # frexp's exponents are numbers of bits
        num, keys = int(nums[i]), int(num_keys[i])
        joint_most, joint_keys, alone = max(most, num), max(most_keys, keys), _cost(1, num, keys)
        joint = _cost(len(found[-1]) + 1, joint_most, joint_keys) if found else math.inf
        if joint <= cost + alone:
            found[-1].append(i)
            most, most_keys, cost = joint_most, joint_keys, joint
        else:
            found.append([i])
            most, most_keys, cost = num, keys, alone
    return [np.array(sorted(members)) for members in found]


def _cost(num_segments: int, num_queries: int, num_keys: int) -> float:
    return _CALL + num_segments * num_keys * (1 + num_queries * _QUERY)


def _group(ragged: Ragged, members: Ints, first_keys: Ints, window: int | None, store: Tensor) -> _Group:
    """Segments `members` [G] of those whose first keys [S] these are."""
    nums, starts, first = ragged.nums[members], ragged.starts[members], first_keys[members, None]
    ends = ragged.ends[members, None]
    query, key = np.arange(nums.max()), np.arange((ends - first).max())
    # a stranger's slot could hold an infinity, which a mask does not stop: so what is padding reads the sequence's own first
    slots = ragged.slots(members[:, None], np.where(first + key < ends, first + key, first))
    is_query = query < nums[:, None]
    # of queries, counted from the first key of their row; a padded one stands on that key, so that it sees something
    standing = np.where(is_query, starts[:, None] - first + query, 0)
    is_seen = len(query) == 1 and bool((ends - first == len(key)).all())
    hidden = None if is_seen else is_hidden(standing[:, None, :, None], key, window)
    offsets = ragged.offsets[members]
    is_run = bool(is_query.all() and (np.diff(offsets) == len(query)).all())
    return _Group(
        shape=(len(members), len(query)),
        slots=to_device(slots, store.device),
        mask=None if hidden is None else _mask(hidden, store),
        first=int(offsets[0]),
        scattered=None if is_run else _scattered(offsets[:, None] + query, is_query, store.device),
    )


def _scattered(at: Ints, is_query: NDArray[np.bool_], device: torch.device) -> _Scattered:
    flat, place = np.where(is_query, at, 0).reshape(-1), np.flatnonzero(is_query)
    return _Scattered(to_device(flat, device), to_device(place, device), to_device(flat[place], device))


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
    is_recordable = False

    @property
    def forms(self) -> ListLike[AttentionKind]:
        return (self,)

    def lacks(self, shape: AttentionShape) -> str | None:
        return None

    def over(self, cache: KVCache, block_size: int, shape: AttentionShape) -> Attention:
        return _Gather(cache, block_size, shape.windows)


GATHER = GatherAttention()
