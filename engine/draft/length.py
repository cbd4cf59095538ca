"""How many tokens to draft now: the draft-length policies, and the one way in which they share a budget."""

from __future__ import annotations

import heapq
from collections.abc import Sequence as ListLike

from engine.plan import Drafting, StepTiming
from engine.sequence import Sequence


def share_budget(wanted: list[int], budget: int) -> list[int]:
    """Cut lengths until they sum to at most `budget`, always the longest first: its last draft is the least likely to stand.

    Of equally long ones the later is cut, so that older sequences keep theirs.
    """
    excess = sum(wanted) - budget
    longest = [(-length, -index) for index, length in enumerate(wanted)]
    heapq.heapify(longest)
    for _ in range(max(0, excess)):
        length, index = longest[0]
        heapq.heapreplace(longest, (length + 1, index))
    lengths = [0] * len(wanted)
    for length, index in longest:
        lengths[-index] = -length
    return lengths


class FixedLength:
    """The same number of drafts in every step."""

    reads_confidence = False

    def __init__(self, max_length: int):
        self.max_length = max_length

    def lengths(self, seqs: ListLike[Sequence], limits: ListLike[int], budget: int, num_rows: int) -> list[int]:
        return share_budget([min(self.max_length, limit) for limit in limits], budget)

    def who_goes_on(self, drafting: ListLike[Drafting]) -> list[bool]:
        return [True] * len(drafting)

    def expects_drafts(self, num_seqs: int) -> bool:
        return self.max_length > 0

    def observe(self, seq: Sequence, num_draft: int, num_accepted: int, confidences: ListLike[float] = ()) -> None:
        """A fixed length learns nothing."""

    def observe_step(self, timing: StepTiming) -> None:
        """Nor from times."""

    def forget(self, seq: Sequence) -> None:
        """Nothing is remembered."""


class HeuristicLength(FixedLength):
    """Two more drafts after a round in which all were accepted, one fewer otherwise, between 1 and the maximum.

    The schedule of transformers' assisted generation; its default start is 20, ours is the deployment's.
    """

    def __init__(self, start: int, max_length: int):
        super().__init__(max_length)
        self._start = start
        self._length: dict[Sequence, int] = {}

    def lengths(self, seqs: ListLike[Sequence], limits: ListLike[int], budget: int, num_rows: int) -> list[int]:
        wanted = [min(self._length.get(seq, self._start), limit) for seq, limit in zip(seqs, limits, strict=True)]
        return share_budget(wanted, budget)

    def observe(self, seq: Sequence, num_draft: int, num_accepted: int, confidences: ListLike[float] = ()) -> None:
        if not num_draft:
            return
        length = self._length.get(seq, self._start)
        change = 2 if num_accepted == num_draft else -1
        self._length[seq] = min(self.max_length, max(1, length + change))

    def forget(self, seq: Sequence) -> None:
        self._length.pop(seq, None)
