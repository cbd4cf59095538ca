"""How much a step may run: as much as the deployment says, and less for a while after memory ran out.

Rows and gathered keys are what a step takes beside weights and cache, so fewer tokens is what helps; a preempted sequence would free
blocks of the pool, which is there in any case.
"""

from __future__ import annotations

import math

_PATIENCE = (8, 1024)  # full steps that go well until more is tried: at first, and at most; doubled each time that more was too much
_FULL = 0.75  # of what a step may run: one that runs less says nothing of whether that much fits
_FORGETTING = 8  # times the patience, of full steps without a bound, until it is as at first


class StepBound:
    """The most tokens of a step, drafts included."""

    def __init__(self) -> None:
        self.now: float = math.inf  # beside the deployment's own limit
        self._patience = _PATIENCE[0]
        self._num_good = 0
        self._is_raised = False  # by steps that went well, since the last that did not

    def shrink(self, num_tried: int) -> bool:
        """A step over so many tokens was too much. False where a single token was, so that there is nothing less."""
        if self.now <= 1:
            return False
        if self._is_raised:  # more was tried in vain; the halvings that follow say no more about that
            self._patience = min(_PATIENCE[1], 2 * self._patience)
        self.now, self._num_good, self._is_raised = max(1, num_tried // 2), 0, False
        return True

    def note_good(self, num_run: int, limit: int) -> None:
        """A step over so many tokens went well. `limit` is the deployment's."""
        if num_run < _FULL * min(self.now, limit) or (self.now == math.inf and not self._is_raised):
            return
        self._num_good += 1
        if self.now == math.inf:
            if self._num_good >= _FORGETTING * self._patience:  # memory is there again
                self._patience, self._is_raised = _PATIENCE[0], False
        elif self._num_good >= self._patience:
            self.now, self._num_good, self._is_raised = 2 * self.now, 0, True
            if self.now >= limit:
                self.now = math.inf
