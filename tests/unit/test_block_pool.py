"""BlockPool: exact block ids, the order of reuse, content keys and marks."""

from __future__ import annotations

from engine.kv.block_pool import BlockPool, Model
from engine.sequence import Sequence
from tests.unit.factories import make_sequence


def computed(pool: BlockPool, tokens: tuple[int, ...], drafter_computed: int = 0, salt: str = "") -> Sequence:
    """A sequence whose tokens are all computed, and published."""
    seq = make_sequence(tokens, salt=salt)
    assert pool.grow(seq, len(tokens))
    seq.num_computed, seq.drafter_computed = len(tokens), drafter_computed
    pool.publish(seq)
    return seq


def test_blocks_are_taken_in_order_and_growing_is_all_or_nothing() -> None:
    pool, seq = BlockPool(4, 4), make_sequence(tuple(range(10)))
    assert pool.grow(seq, 9)
    assert seq.block_table == [0, 1, 2]
    other = make_sequence((1,))
    assert not pool.grow(other, 5)
    assert (other.block_table, pool.num_free) == ([], 1)
    pool.check([seq, other])


def test_a_prefix_is_found_by_content_and_never_the_whole_prompt() -> None:
    pool = BlockPool(8, 2)
    seq = computed(pool, (1, 2, 3, 4, 5))
    assert pool.match(make_sequence((1, 2, 3, 4, 9))) == seq.block_table[:2]
    assert pool.match(make_sequence((1, 2, 3, 4))) == seq.block_table[:1], "one row must be computed"
    assert pool.match(make_sequence((9, 2, 3, 4, 5))) == [], "a block's key covers everything before it"


def test_a_prefix_is_found_by_those_with_the_same_salt_alone() -> None:
    pool = BlockPool(16, 2)
    made = {salt: computed(pool, (1, 2, 3, 4, 5), salt=salt).block_table[:2] for salt in ("", "a", "b")}
    for salt, blocks in made.items():
        assert pool.match(make_sequence((1, 2, 3, 4, 9), salt=salt)) == blocks
    assert pool.match(make_sequence((1, 2, 3, 4, 9), salt="c")) == []


def test_a_salt_cannot_name_the_key_of_another_chain() -> None:
    """Else a block would be found under tokens that it does not hold."""
    pool, seq = BlockPool(16, 2), make_sequence((1, 2, 3, 4, 5))
    seq.block_keys = [b"a key and a text"]
    assert pool.key(make_sequence((3, 4, 5), salt="a key and a text"), 0) != pool.key(seq, 1)


def test_a_freed_block_is_found_until_it_is_taken_again() -> None:
    pool = BlockPool(3, 2)
    first = computed(pool, (1, 2, 3, 4, 5))
    pool.trim(first, 0)
    again = make_sequence((1, 2, 3, 4, 6))
    pool.share(again, pool.match(again))
    assert again.block_table == [0, 1]
    pool.trim(again, 0)
    taker = make_sequence(tuple(range(20, 26)))
    assert pool.grow(taker, 6)
    assert pool.match(make_sequence((1, 2, 3, 4, 6))) == []
    pool.check([taker])


def test_blocks_without_content_are_reused_first_and_tails_before_heads() -> None:
    pool = BlockPool(4, 2)
    published = computed(pool, (1, 2, 3, 4))
    private = make_sequence((5, 6, 7))
    assert pool.grow(private, 3)
    pool.trim(published, 0)
    pool.trim(private, 0)
    taker = make_sequence(tuple(range(30, 38)))
    assert pool.grow(taker, 8)
    assert taker.block_table == [2, 3, 1, 0]


def test_marks_say_for_which_model_a_block_is_valid() -> None:
    pool = BlockPool(8, 2)
    seq = computed(pool, (1, 2, 3, 4, 5, 6), drafter_computed=3)
    assert pool.num_valid(seq.block_table, Model.TARGET) == 3
    assert pool.num_valid(seq.block_table, Model.DRAFTER) == 1
    seq.drafter_computed = 6
    pool.publish(seq)
    assert pool.num_valid(seq.block_table, Model.DRAFTER) == 3, "the drafter's mark may come later"
    pool.trim(seq, 0)
    taker = make_sequence(tuple(range(40, 56)))
    assert pool.grow(taker, 16)
    assert pool.num_valid(taker.block_table, Model.DRAFTER) == 0, "a reused block starts without marks"


def test_the_second_block_with_the_same_content_stays_private() -> None:
    pool = BlockPool(8, 2)
    first, second = computed(pool, (1, 2, 3)), computed(pool, (1, 2, 4))
    assert first.block_table[0] != second.block_table[0]
    assert pool.match(make_sequence((1, 2, 5))) == first.block_table[:1]
    pool.check([first, second])
