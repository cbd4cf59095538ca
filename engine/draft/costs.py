"""What a pass costs: seconds by number of rows, measured, interpolated and kept up to date. Plain numbers; measures nothing itself."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field

# Where a table has an entry. A pass in between counts for both neighbours.
ROWS = (1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096)

_WEIGHT = 0.05  # of a new observation; an entry's first ones weigh more, as in a mean of which the table was the first _TRUST values
_TRUST = 6
_LARGEST_SHARE = 0.5  # that drafts are believed to add to a pass, so that a busy moment does not end them
_OUTLIER = 2.0  # an observation counts as at most so many times what was expected, and at least 1 / that: a busy moment is no law


class PassCosts:
    """Seconds of a pass of one model, by the rows that it runs.

    Where nothing was measured the nearest entries decide: between two by a straight line, below the first like the first, beyond the last
    in proportion to the rows. Larger passes never cost less.
    """

    def __init__(self, seconds: Mapping[int, float], rows_run: Callable[[int], int] = lambda rows: rows):
        """`seconds` by rows; rows must be of ROWS. Empty: every pass costs one second a row until something is observed. `rows_run` says
        how many rows a pass runs where it is filled up: a seventeenth may cost as much as eight, and the seven behind it nothing."""
        unknown = set(seconds) - set(ROWS)
        if unknown or any(not value > 0 for value in seconds.values()):
            raise ValueError(f"costs must be positive, at {ROWS}; got {dict(seconds)}")
        self.rows_run = rows_run
        self._run: dict[int, int] = {}  # by rows
        self._first = dict(seconds)
        self._seen: dict[int, float] = {}
        self._num_observed: dict[int, int] = {}  # by entry
        self._lay_out()

    def at(self, rows: int) -> float:
        """Expected seconds."""
        run = self._run.get(rows)  # a policy asks some hundred times a step, mostly about passes that run as many
        if run is None:
            run = self._run[rows] = self.rows_run(rows)
        seconds = self._asked.get(run)
        if seconds is None:
            seconds = self._asked[run] = _between(self._known, self._values, run) if self._known else float(run)
        return seconds

    def observe(self, rows: int, seconds: float) -> None:
        """A pass over so many rows took so long. Entries around it move towards what was seen.

        So do, in proportion to the nearest of them below, those of which nothing was seen yet: a batch of many sequences, or a busy
        machine, makes all passes longer. If they stayed behind, more rows would seem to be free wherever fewer were found to cost more
        than was measured. Those of fewer rows than any that was seen stay as they are, and are tried.

        Once entries are well known, what still moves them is no news of them but of everything: texts have grown. Then larger ones go along
        that were seen. If they waited to be seen again, drafts that are made seldom would look the cheaper the longer texts become.
        """
        rows = self.rows_run(rows)
        i = bisect_left(ROWS, rows)
        if i == len(ROWS):
            return
        around = {ROWS[i], ROWS[max(0, i - (ROWS[i] != rows))]}
        if not self._known:
            self._first, self._seen = dict.fromkeys(around, seconds), dict.fromkeys(around, seconds)
        else:
            ratio = min(_OUTLIER, max(1 / _OUTLIER, seconds / self.at(rows)))
            weight = max(_WEIGHT, 1 / (_TRUST + min(self._num_observed.get(entry, 0) for entry in around)))
            if weight == _WEIGHT:
                larger = [entry for entry in self._seen if entry > max(around)]
                self._seen |= {entry: self._seen[entry] * (1 + weight * (ratio - 1)) for entry in larger}
            self._seen |= {entry: _between(self._known, self._values, entry) * (1 + weight * (ratio - 1)) for entry in around}
        for entry in around:
            self._num_observed[entry] = self._num_observed.get(entry, 0) + 1
        self._lay_out()

    def table(self) -> dict[int, float]:
        """What is known, to begin another one with."""
        return dict(zip(self._known, self._values, strict=True))

    def _lay_out(self) -> None:
        first = sorted(self._first)
        measured = [self._first[rows] for rows in first]
        self._known = sorted(self._first.keys() | self._seen.keys())
        self._values: list[float] = []
        self._asked: dict[int, float] = {}  # what `at` has said since, by the rows that are run
        ratio = 1.0  # of what was seen to what was measured first, at the nearest entry below
        for rows in self._known:
            expected = self._first.get(rows) or _between(first, measured, rows)
            value = self._seen.get(rows, expected * ratio)
            ratio = value / expected
            self._values.append(max([value, *self._values[-1:]]))


def _between(known: ListLike[int], values: ListLike[float], rows: int) -> float:
    """By a straight line; below the first as there, beyond the last in proportion to the rows."""
    i = bisect_left(known, rows)
    if i == len(known):
        return values[-1] * rows / known[-1]
    if i == 0 or known[i] == rows:
        return values[i]
    (low, high), (a, b) = known[i - 1 : i + 1], values[i - 1 : i + 1]
    return a + (b - a) * (rows - low) / (high - low)


class CostsByBatch:
    """Seconds of the target's passes by rows, for batches of different size: t_p(B, k) of Liu et al. (2024).

    A row of one more sequence costs more than one more row of a sequence that is there, whose keys are read anyway. In one table for all
    batches, the cheap rows of few sequences would make the drafts of many look free.

    A pass that checks drafts takes longer than one of as many rows without any: windows are looked up, attended and judged, not single
    tokens. Sixteen rows are mostly those of a batch of 13 to 16, and in one figure with them ten sequences would seem to get six drafts for
    what sixteen tokens take. So where passes of as many rows are seen with drafts and without, the difference is learnt apart, as a share.
    """

    def __init__(self, first: PassCosts):
        """`first` is what a batch of unknown size begins with."""
        self._latest = _Batch(first)
        self._by_batch: dict[int, _Batch] = {}

    def of(self, batch: int) -> PassCosts:
        """Those of a size, or class of sizes, of batches; of one that was never observed, those of the batch that was observed last. They
        are of passes without drafts: what was seen with drafts was divided by what drafts were known to add, unless prompts ran, too."""
        return self._by_batch.get(batch, self._latest).costs

    def draft_share(self, batch: int) -> float:
        """What a pass of such a batch takes longer for checking drafts at all: 0.1 is a tenth longer than its rows would take."""
        return self._by_batch[batch].draft_share if batch in self._by_batch else 0.0

    def observe(self, batch: int, rows: int, seconds: float, has_drafts: bool = False, has_prompts: bool = False) -> None:
        """A pass over so many rows of such a batch took so long; whether drafts, or pieces of prompts, were among the rows."""
        if batch not in self._by_batch:  # nothing was seen of it yet, so larger passes go along with what is seen of smaller ones
            before = self._latest.costs  # but not its share: a batch that never sees as many rows without drafts could not mend it
            self._by_batch[batch] = _Batch(PassCosts(before.table(), before.rows_run))
        self._latest = self._by_batch[batch]
        if has_prompts:  # which take what their length and place make them take: they say nothing of drafts
            self._latest.costs.observe(rows, seconds)
        else:
            self._latest.observe(rows, seconds, has_drafts)


@dataclass(slots=True)
class _Batch:
    """What is known of batches of one size."""

    costs: PassCosts
    mean_share: float = 0.0  # that passes with drafts take longer; noise may have it below zero
    num_compared: int = 0  # passes with drafts that it is the mean of
    num_plain: dict[int, int] = field(default_factory=dict)  # passes without drafts that were seen, by rows that are run

    @property
    def draft_share(self) -> float:
        return max(0.0, self.mean_share)

    def observe(self, rows: int, seconds: float, has_drafts: bool) -> None:
        run, share = self.costs.rows_run(rows), self.draft_share
        if not has_drafts:
            self.num_plain[run] = self.num_plain.get(run, 0) + 1
        elif self.num_plain.get(run, 0) >= _TRUST:  # else there is nothing to tell rows and drafts apart by
            self.num_compared += 1
            change = min(_LARGEST_SHARE, seconds / self.costs.at(rows) - 1) - self.mean_share
            self.mean_share += max(_WEIGHT, 1 / (_TRUST + self.num_compared)) * change
        self.costs.observe(rows, seconds / (1 + share * has_drafts))
