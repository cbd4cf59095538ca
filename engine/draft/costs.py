"""What a pass costs: seconds by number of rows, measured, interpolated and kept up to date. Plain numbers; measures nothing itself."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping

# Where a table has an entry. A pass in between counts for both neighbours.
ROWS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)

_WEIGHT = 0.05  # of a new observation; an entry's first ones weigh more, as in a mean of which the table was the first _TRUST values
_TRUST = 8
_OUTLIER = 2.0  # an observation counts as at most so many times what was expected, and at least 1 / that: a busy moment is no law


class PassCosts:
    """Seconds of a pass of one model, by the rows that it runs.

    Where nothing was measured the nearest entries decide: between two by a straight line, below the first like the first, beyond the last
    in proportion to the rows. Larger passes never cost less.
    """

    def __init__(self, seconds: Mapping[int, float]):
        """`seconds` by rows; rows must be of ROWS. Empty: every pass costs one second a row until something is observed."""
        unknown = set(seconds) - set(ROWS)
        if unknown or any(not value > 0 for value in seconds.values()):
            raise ValueError(f"costs must be positive, at {ROWS}; got {dict(seconds)}")
        self._seconds = dict(seconds)
        self._num_observed: dict[int, int] = {}  # by entry
        self._lay_out()

    def at(self, rows: int) -> float:
        """Expected seconds."""
        if not self._known:
            return float(rows)
        i = bisect_left(self._known, rows)
        if i == len(self._known):
            return self._values[-1] * rows / self._known[-1]
        if i == 0 or self._known[i] == rows:
            return self._values[i]
        (low, high), (a, b) = self._known[i - 1 : i + 1], self._values[i - 1 : i + 1]
        return a + (b - a) * (rows - low) / (high - low)

    def observe(self, rows: int, seconds: float) -> None:
        """A pass over so many rows took so long. Entries around it move towards what was seen.

        So do, in proportion, those of more rows that nothing was seen of yet: a batch of many sequences, or a busy machine, makes all
        passes longer. If they stayed behind, more rows would seem to be free wherever fewer were found to cost more than was measured.
        Those of fewer rows stay as they are, and are tried.
        """
        i = bisect_left(ROWS, rows)
        if i == len(ROWS):
            return
        around = {ROWS[i], ROWS[max(0, i - (ROWS[i] != rows))]}
        if not self._known:
            self._seconds = dict.fromkeys(around, seconds)
        else:
            ratio = min(_OUTLIER, max(1 / _OUTLIER, seconds / self.at(rows)))
            weight = max(_WEIGHT, 1 / (_TRUST + min(self._num_observed.get(entry, 0) for entry in around)))
            unseen = {entry for entry in self._seconds.keys() - self._num_observed.keys() if entry > rows}
            moving = {entry: self.at(entry) for entry in unseen | around}
            self._seconds |= {entry: value * (1 + weight * (ratio - 1)) for entry, value in moving.items()}
        for entry in around:
            self._num_observed[entry] = self._num_observed.get(entry, 0) + 1
        self._lay_out()

    def table(self) -> dict[int, float]:
        """What is known, to be kept for the next start."""
        return dict(self._seconds)

    def _lay_out(self) -> None:
        self._known = sorted(self._seconds)
        self._values: list[float] = []
        for rows in self._known:
            self._values.append(max([self._seconds[rows], *self._values[-1:]]))


class CostsByBatch:
    """Seconds of the target's passes by rows, for batches of different size: t_p(B, k) of Liu et al. (2024).

    A row of one more sequence costs more than one more row of a sequence that is there, whose keys are read anyway. In one table for all
    batches, the cheap rows of few sequences would make the drafts of many look free.
    """

    def __init__(self, first: PassCosts):
        """`first` is what a batch of unknown size begins with."""
        self._latest = first
        self._by_batch: dict[int, PassCosts] = {}

    def of(self, batch: int) -> PassCosts:
        """Those of a size, or class of sizes, of batches. A new one begins as the one that was observed last, of which nothing was seen
        yet: so larger passes go along with what is seen of smaller ones."""
        if batch not in self._by_batch:
            self._by_batch[batch] = PassCosts(self._latest.table())
        return self._by_batch[batch]

    def observe(self, batch: int, rows: int, seconds: float) -> None:
        """A pass over so many rows of such a batch took so long."""
        self._latest = self.of(batch)
        self._latest.observe(rows, seconds)
