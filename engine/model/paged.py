"""A model together with its KV cache: ragged passes over segments. Target and drafter are two of these over the same block ids."""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from functools import lru_cache

import torch
from torch import Tensor

from engine.kv.cache import KVCache
from engine.model.attention import Segment
from engine.model.graphs import Bound, Graphs, Passes, Recorder, record
from engine.model.stack import DecoderStack
from engine.transfer import to_device

# A CPU's products are slowest below this (PackedLinear would fill each of them up by itself); to a GPU it is all the same.
_MIN_ROWS = 4
# Passes of more rows are filled up to a multiple: a CPU's library makes and keeps kernels for every number of rows that it meets, which
# costs milliseconds once and, over all numbers up to 256, some 200 MB for good. Rows beyond the first, and what they are rounded to.
_ROUNDING = ((64, 16), (16, 8))


class PagedModel:
    """Runs segments of several sequences in one pass."""

    def __init__(self, stack: DecoderStack, num_blocks: int, block_size: int, vocab_size: int | None = None):
        """`vocab_size` cuts the logits to what the pair has in common; None leaves all."""
        self.stack = stack
        self.vocab_size = vocab_size or stack.vocab_size
        self._cache = KVCache(stack.num_layers, num_blocks * block_size, stack.kv_shape, stack.dtype, stack.device)
        self._attention = stack.attention.over(self._cache, block_size, stack.attention_shape)
        self._graphs = Graphs()

    def record(self, recorder: Recorder, passes: Passes, bound: Bound) -> None:
        """Record the passes that are like these, in front of the first one: from here on they are repeated and not launched."""
        self._graphs = record(self.stack, self._attention, passes, recorder, bound)

    def forward(self, segments: ListLike[Segment], input_ids: Tensor, rows: ListLike[int]) -> Tensor:
        """Logits [R, V] of what `states` gives."""
        return self.logits(self.states(segments, input_ids, rows))

    @torch.inference_mode()
    def states(self, segments: ListLike[Segment], input_ids: Tensor, rows: ListLike[int]) -> Tensor:
        """Last states [R, hidden], normed, of the tokens at `rows` (ascending indices in the packed row) of input_ids [N], which fill
        `segments` in order.

        Writes the KV of all N tokens. Reads, for each segment, the KV of all positions before its end. The states are good until the
        next pass: a recorded one writes to the same place.
        """
        if not segments:
            return torch.empty(0, self.stack.config.hidden_size, dtype=self.stack.dtype, device=self.stack.device)
        if (states := self._graphs.run(segments, input_ids)) is not None:
            return _taken(states, rows)
        num_rows = rows_run(len(input_ids))
        if num_rows > len(input_ids):
            input_ids = torch.nn.functional.pad(input_ids, (0, num_rows - len(input_ids)))
        return _taken(self.stack.hidden(input_ids, self._attention.context(segments, num_rows)), rows)

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        """Logits [R, V] of normed states [R, hidden]."""
        if not len(states):
            return torch.empty(0, self.vocab_size, dtype=self.stack.dtype, device=self.stack.device)
        return self.stack.logits(states)[:, : self.vocab_size]

    def rows_run(self, num: int) -> int:
        """Rows that a pass over `num` tokens runs. What a pass costs goes by these."""
        return self._graphs.rows_run(num) or rows_run(num)

    def let_go(self) -> None:
        """Give up what is kept from pass to pass, but for the KV."""
        self._cache.let_go()


@lru_cache(4096)
def rows_run(num: int) -> int:
    """The same where it is launched kernel by kernel."""
    multiple = next((multiple for beyond, multiple in _ROUNDING if num > beyond), 1)
    return max(_MIN_ROWS, -(-num // multiple) * multiple)


def _taken(packed: Tensor, rows: ListLike[int]) -> Tensor:
    """The wanted rows of packed [N, ...]."""
    return packed if len(rows) == len(packed) else packed.index_select(0, to_device(rows, packed.device, torch.long))


def kv_bytes_per_token(stack: DecoderStack) -> int:
    """Bytes of keys and values that one position takes in all layers of a model."""
    heads, head_dim = stack.kv_shape
    return 2 * stack.num_layers * heads * head_dim * stack.dtype.itemsize
