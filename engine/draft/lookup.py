"""What followed the last few tokens when they last occurred in the text of a sequence: the index behind prompt lookup and copying."""

from __future__ import annotations

from collections.abc import Sequence as ListLike


class SuffixIndex:
    """Where each run of n tokens was last followed by another token, for a few n. Grows by an entry for each n and token."""

    def __init__(self, lengths: ListLike[int]):
        """`lengths` are the n, the longest first."""
        self._lengths = tuple(lengths)
        self._num_indexed = 0  # positions whose token has been entered as a continuation
        self._next: dict[tuple[int, ...], int] = {}

    def extend(self, tokens: list[int]) -> None:
        """Take in what was added to a text that never changes otherwise."""
        for position in range(max(1, self._num_indexed), len(tokens)):
            for n in self._lengths:
                if n <= position:
                    self._next[tuple(tokens[position - n : position])] = position
        self._num_indexed = len(tokens)

    def follower(self, tokens: list[int], drafts: ListLike[int] = ()) -> int | None:
        """The position of what followed the end of tokens + drafts when that last occurred: the longest n that did.

        Drafts count as text. So the answer is the same when they have become tokens.
        """
        text = [*tokens[-self._lengths[0] :], *drafts] if drafts else tokens
        first = len(tokens) + len(drafts) - len(text)  # the position of text[0]
        for n in self._lengths:
            if n > len(text):
                continue
            end = text[-n:]
            for place in range(len(text) - 1, len(text) - 1 - len(drafts), -1):  # behind it, a run that a draft followed
                if place >= n and text[place - n : place] == end:
                    return first + place
            if (found := self._next.get(tuple(end))) is not None:
                return found
        return None
