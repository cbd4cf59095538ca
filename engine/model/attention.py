"""Attention of a ragged batch over the paged KV cache, by gather and scaled_dot_product_attention.

All sequences of a step are packed into one row [1, N]. A Segment says which positions of which block table its part of the row
holds; queries of a segment see the earlier positions of their own sequence, in a sliding layer the last `window` of them, and nothing
else. Segments of similar size share one call: both sides are padded to the largest of their power-of-two class, so padding at most
doubles the work. A sliding layer gathers the keys that its window reaches and no others; nothing is freed behind a window.

The function is registered with transformers' AttentionInterface and receives the PagedContext as a keyword through the layers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from engine.kv.cache import KVCache

IMPLEMENTATION = "cascade_paged"

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
class _Group:
    """Segments that share one attention call: G of them, at most n queries and L keys each."""

    queries: Tensor  # [G, n] index in the packed row; padded with 0
    slots: Tensor  # [G, L] of keys and values; padded with the sequence's own first
    mask: Tensor  # [G, 1, n, L] 0 where a query sees a key, else -inf
    rows: Tensor  # [M] the M queries that are not padding: their index in the packed row ...
    places: Tensor  # [M] ... and in the flattened [G * n]


@dataclass(frozen=True, slots=True)
class PagedContext:
    """Where the packed row's tokens stand; made once a pass, the same for all layers."""

    cache: KVCache
    positions: Tensor  # [N]
    slots: Tensor  # [N] where the row's keys and values go
    groups: Mapping[int | None, tuple[_Group, ...]]  # by the layer's window


def paged_context(segments: ListLike[Segment], block_size: int, cache: KVCache, windows: ListLike[int | None] = (None,)) -> PagedContext:
    """Index tensors for a packed row that holds `segments` one after another.

    `windows` are the distinct ones of the layers that will run: how many positions a query sees, its own included; None for all.
    """
    device = cache.keys[0].device
    runs = [np.arange(segment.start, segment.end) for segment in segments]
    longest = max(segment.end for segment in segments)
    reach = {window: window if window is not None and window < longest else None for window in windows}
    groups = {window: _groups(segments, window, block_size, cache.keys[0]) for window in set(reach.values())}
    return PagedContext(
        cache=cache,
        positions=_tensor(np.concatenate(runs), device),
        slots=_tensor(np.concatenate([_slots(segment, run, block_size) for segment, run in zip(segments, runs, strict=True)]), device),
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
    mask = torch.zeros(hidden.shape, dtype=store.dtype, device=store.device)
    mask.masked_fill_(torch.from_numpy(hidden).to(store.device), -torch.inf)
    place = np.concatenate(places)
    return _Group(
        queries=_tensor(queries, store.device),
        slots=_tensor(slots, store.device),
        mask=mask,
        rows=_tensor(queries.reshape(-1)[place], store.device),
        places=_tensor(place, store.device),
    )


def _tensor(array: Ints, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device)


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, heads, N, head_dim]
    key: Tensor,  # [1, kv_heads, N, head_dim]
    value: Tensor,  # [1, kv_heads, N, head_dim]
    attention_mask: Tensor | None,  # None: the context has its own
    *,
    scaling: float,
    paged: PagedContext,
    sliding_window: int | None = None,
    **_: Any,  # what probe.py knows to be without effect
) -> tuple[Tensor, None]:
    """Write the row's keys and values, then attend over what each query sees. Returns [1, N, heads, head_dim]."""
    layer = module.layer_idx
    assert isinstance(layer, int)
    assert attention_mask is None
    paged.cache.write(layer, paged.slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
    packed = query[0].transpose(0, 1)  # [N, heads, head_dim]
    output = torch.empty_like(packed)
    for group in paged.groups[sliding_window]:
        keys, values = paged.cache.read(layer, group.slots)
        attended = scaled_dot_product_attention(
            packed[group.queries].transpose(1, 2), keys, values, attn_mask=group.mask, scale=scaling, enable_gqa=True
        )
        # index vectors from the host, not booleans: those would wait for the device in every layer
        output.index_copy_(0, group.rows, attended.transpose(1, 2).flatten(0, 1).index_select(0, group.places))
    return output.unsqueeze(0), None


AttentionInterface.register(IMPLEMENTATION, paged_attention)
