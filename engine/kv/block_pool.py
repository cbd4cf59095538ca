"""Ownership of KV blocks: reference counts, content keys for prefix reuse, and the order in which free blocks are taken.

A block id names one run of positions in every model's KV tensors; the tensors are in kv/cache.py, and this file knows none.

Free order: blocks without a content key first, then published blocks, least recently freed first, the tail of a sequence before
its head. A published block that is free keeps its key, and with it its KV, until it is taken for something else.
"""

from __future__ import annotations

import enum
import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable

from engine.sequence import Sequence


class Model(enum.IntFlag):
    """Whose KV in a block is valid."""

    TARGET = 1
    DRAFTER = 2


def _root(salt: str) -> bytes:
    """What a chain of content keys begins with. A digest of its own kind: a salt must not be able to name a key of another chain, whose
    block would then be found under tokens that it does not hold."""
    return hashlib.blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=16, person=b"salt").digest() if salt else b""


class BlockPool:
    """`num_blocks` blocks of `block_size` positions."""

    def __init__(self, num_blocks: int, block_size: int):
        self.block_size = block_size
        self.num_blocks = num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._refs = [0] * num_blocks
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._valid = [Model(0)] * num_blocks
        self._num_cached = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._free)

    @property
    def num_cached(self) -> int:
        """Free blocks that are published: their KV can still be found."""
        return self._num_cached

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` positions."""
        return -(-num_tokens // self.block_size)

    # ------------------------------------------------------------------ prefix reuse
    def key(self, seq: Sequence, index: int) -> bytes:
        """Content key of the sequence's full block `index`: a digest of its request's salt and of all tokens up to the block's end."""
        keys, size = seq.block_keys, self.block_size
        while len(keys) <= index:
            start = len(keys) * size
            digest = hashlib.blake2b(keys[-1] if keys else _root(seq.request.cache_salt), digest_size=16)
            digest.update(array("q", seq.tokens[start : start + size]).tobytes())
            keys.append(digest.digest())
        return keys[index]

    def match(self, seq: Sequence) -> list[int]:
        """Published blocks that hold the sequence's leading tokens, as far as it may reuse any; never all of its tokens."""
        blocks = []
        for index in range(seq.num_reusable // self.block_size):
            block = self._block_of.get(self.key(seq, index))
            if block is None:
                break
            blocks.append(block)
        return blocks

    def share(self, seq: Sequence, blocks: list[int]) -> None:
        """Make matched blocks the head of an empty block table."""
        assert not seq.block_table
        for block in blocks:
            if self._refs[block] == 0:
                del self._free[block]
                self._num_cached -= 1
            self._refs[block] += 1
        seq.block_table.extend(blocks)

    def publish(self, seq: Sequence) -> None:
        """Offer the sequence's full computed blocks for reuse, and mark whose KV in them is valid.

        The target's validity publishes; the drafter's mark may come with it, come later, or never come. Where another block
        was published under the same key first, ours stays private.
        """
        for index in range(seq.num_published, seq.num_computed // self.block_size):
            block = seq.block_table[index]
            self._valid[block] |= Model.TARGET
            key = self.key(seq, index)
            if block not in self._key_of and key not in self._block_of:
                self._key_of[block], self._block_of[key] = key, block
            seq.num_published = index + 1
        for index in range(seq.num_drafter_marked, seq.drafter_computed // self.block_size):
            self._valid[seq.block_table[index]] |= Model.DRAFTER
            seq.num_drafter_marked = index + 1

    def num_valid(self, blocks: Iterable[int], model: Model) -> int:
        """Leading blocks in which the model's KV is valid."""
        count = 0
        for block in blocks:
            if model not in self._valid[block]:
                break
            count += 1
        return count

    # ------------------------------------------------------------------ taking and giving back
    def grow(self, seq: Sequence, num_tokens: int) -> bool:
        """Make room for `num_tokens` positions. False, and nothing changed, where too few blocks are free."""
        need = self.blocks_for(num_tokens) - len(seq.block_table)
        if need > len(self._free):
            return False
        seq.block_table.extend(self._take() for _ in range(need))
        return True

    def trim(self, seq: Sequence, num_tokens: int) -> None:
        """Give back the blocks behind the first `num_tokens` positions, the tail first."""
        while len(seq.block_table) > self.blocks_for(num_tokens):
            block = seq.block_table.pop()
            self._refs[block] -= 1
            if self._refs[block] == 0:
                self._free[block] = None
                if block in self._key_of:
                    self._num_cached += 1
                else:
                    self._free.move_to_end(block, last=False)

    def _take(self) -> int:
        block, _ = self._free.popitem(last=False)
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
            self._num_cached -= 1
        self._valid[block] = Model(0)
        self._refs[block] = 1
        return block

    # ------------------------------------------------------------------ invariants
    def check(self, live: Iterable[Sequence]) -> None:
        """Raise AssertionError unless every block is either free or held by exactly the live sequences that list it."""
        held = Counter(block for seq in live for block in seq.block_table)
        assert all(self._refs[block] == held[block] for block in range(self.num_blocks)), "a reference count is off"
        assert held.keys().isdisjoint(self._free), "a held block is free"
        assert self._num_cached == len(self._key_of.keys() & self._free.keys()), "the count of cached blocks is off"
        assert len(self._free) + len(held) == self.num_blocks, "a block is lost"
        assert {block: key for key, block in self._block_of.items()} == self._key_of, "content keys and blocks disagree"
        assert all(Model.TARGET in self._valid[block] for block in self._key_of), "a block was published before it was computed"
