"""Passes that were recorded once and are repeated: the host launches one graph where it would launch twenty kernels a layer.

Recorded are small passes, by the number of rows that they run and by how long their longest segment is: drafted tokens, single tokens
and verify windows. A pass is filled up to the next number of rows that was recorded, which on a GPU costs next to nothing: the weights
are read anyway. What does not fit is launched kernel by kernel as ever: prompts, larger batches, sequences beyond the served context, and
everything where the attention's index tensors have no fixed places. Nobody but PagedModel knows which of both ran.

How a device records is behind `Recorder`; torch's way is in cuda_graphs.py, and tests have one that merely calls again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.model.attention import Attention, FixedPass, FixedPasses, Room, Segment
from engine.model.memory import is_out_of_memory
from engine.model.source import first_line
from engine.model.stack import DecoderStack

_log = logging.getLogger(__name__)

ROWS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # beyond, a GPU takes longer for the products than its host for the launches
_LEAST = 16  # rows for which there is a graph in any case
_TOLERANCE = 2e-2  # of the largest logit: a library may take another kernel when it is recorded, and no more than that
_SAID = 4  # times that a bar is shown
_PLACES = 1 / 2  # of the bound, at most, for what passes leave


class Recorder(Protocol):
    """Records what a device is asked to do."""

    def begin(self) -> None:
        """What is recorded from here on shares memory, and none with what was recorded before."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        """What does again what `run` does, on the same tensors. `run` is called some times before. Raises RuntimeError where it cannot."""

    def free_bytes(self) -> int:
        """Memory of the device that nobody has."""


@dataclass(frozen=True, slots=True)
class Passes:
    """What the passes of a model are like when it serves."""

    num_sequences: int
    window: int  # tokens that a sequence usually runs at most
    num_rows: int  # of a pass
    num_positions: int  # of a sequence


@dataclass(frozen=True, slots=True)
class Bound:
    """What recording may take, and whom it tells how far it is."""

    num_bytes: int
    name: str  # of the model
    say: Callable[[str], None]


@dataclass(frozen=True, slots=True, order=True)
class Bucket:
    """Passes that one recording serves."""

    num_rows: int
    window: int  # tokens of a segment at most

    def __str__(self) -> str:
        return f"{self.num_rows} rows in windows of up to {self.window}"


@dataclass(frozen=True, slots=True)
class _Recorded:
    bucket: Bucket
    told: FixedPass
    repeat: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Places:
    """Where all recordings of a model read and write. One runs at a time."""

    ids: Tensor  # [N]; behind those of a pass lie older ones, whose rows nobody reads
    states: Tensor  # [N, hidden], normed


class Graphs:
    """The recorded passes of a model."""

    def __init__(self, recorded: ListLike[_Recorded] = (), places: _Places | None = None, num_positions: int = 0):
        self._recorded = sorted(recorded, key=lambda own: (own.bucket.window, own.bucket.num_rows))
        self._places, self._num_positions = places, num_positions

    @property
    def buckets(self) -> ListLike[Bucket]:
        return [own.bucket for own in self._recorded]

    def rows_run(self, num: int) -> int | None:
        """Rows that a pass over so many single tokens, or windows, runs; None where it is not recorded."""
        return min((own.bucket.num_rows for own in self._recorded if own.bucket.num_rows >= num), default=None)

    def run(self, segments: ListLike[Segment], input_ids: Tensor) -> Tensor | None:
        """Normed states [N, hidden] of all of input_ids [N], or None where no recording fits. Good until this model's next pass."""
        fitting = self._fitting(segments, len(input_ids))
        if fitting is None or self._places is None:
            return None
        fitting.told.tell(segments)
        self._places.ids[: len(input_ids)].copy_(input_ids)
        fitting.repeat()
        return self._places.states[: len(input_ids)]

    def _fitting(self, segments: ListLike[Segment], num_rows: int) -> _Recorded | None:
        """The one of the shortest windows, and of these the one of fewest rows."""
        if max(segment.end for segment in segments) > self._num_positions:
            return None
        window = max(segment.num_tokens for segment in segments)
        return next((own for own in self._recorded if own.bucket.window >= window and own.bucket.num_rows >= num_rows), None)


def buckets(passes: Passes, windows: ListLike[int]) -> list[Bucket]:
    """What is recorded, largest first, so that the smaller ones run in the memory of the larger. `windows` as FixedPasses has them."""
    found: list[Bucket] = []
    for shorter, window in _classes(passes, windows):
        usual = max(_LEAST, passes.num_sequences * min(window, passes.window))
        most = min(passes.num_rows, passes.num_sequences * window, usual)
        found += [Bucket(rows, window) for rows in ROWS if shorter < rows <= _next(most)]
    return sorted(found, reverse=True)


def _classes(passes: Passes, windows: ListLike[int]) -> Iterator[tuple[int, int]]:
    """(tokens of a window that is in the class before, tokens of one in this), as far as passes have windows of that length."""
    shorter = 0
    for window in windows:
        if shorter < passes.window:
            window = max(window, passes.window) if window == windows[-1] else window
            yield shorter, window
        shorter = window


def _next(num: int) -> int:
    """Of ROWS."""
    return next((rows for rows in ROWS if rows >= num), ROWS[-1])


@torch.inference_mode()
def record(stack: DecoderStack, attention: Attention, passes: Passes, recorder: Recorder, bound: Bound) -> Graphs:
    """Record what fits into the bound. What does not, and what cannot be recorded, is said and runs as ever."""
    began, free = time.perf_counter(), recorder.free_bytes()
    fixed = attention.fixed(Room(_next(passes.num_rows), passes.num_positions))
    if fixed is None:
        bound.say(f"No CUDA graphs of the {bound.name}: attention by {stack.attention.name} cannot be recorded, by triton it can")
        return Graphs()
    asked = buckets(passes, fixed.windows)
    row = stack.config.hidden_size * stack.dtype.itemsize
    fitting = [bucket for bucket in asked if bucket.num_rows * row < bound.num_bytes * _PLACES]
    try:
        recording = _Recording(stack, fixed, _places(stack, fitting), recorder, bound, free)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        fitting = []
    if not fitting:
        bound.say(
            f"No CUDA graphs of the {bound.name}: of {max(0, bound.num_bytes) >> 20} MiB for them its states alone would take too much"
        )
        return Graphs()
    recorder.begin()
    found = recording.all(fitting, passes.num_positions)
    larger = f"; passes of other shapes, and those over more than {max(own.num_rows for own in found)} rows," if found else ": all passes"
    bound.say(
        f"CUDA graphs of the {bound.name}: {len(found)} of {len(asked)} in {(free - recorder.free_bytes()) >> 20} MiB and "
        f"{time.perf_counter() - began:.1f} s{larger} are launched kernel by kernel"
    )
    return Graphs(recording.recorded, recording.places, passes.num_positions) if found else Graphs()


def _places(stack: DecoderStack, fitting: ListLike[Bucket]) -> _Places:
    """Room for the largest of these."""
    most = max((bucket.num_rows for bucket in fitting), default=0)
    ids = torch.arange(most, device=stack.device) * 7919 % stack.vocab_size
    return _Places(ids, torch.empty(most, stack.config.hidden_size, dtype=stack.dtype, device=stack.device))


class _Recording:
    """The start's work on one model."""

    def __init__(self, stack: DecoderStack, fixed: FixedPasses, places: _Places, recorder: Recorder, bound: Bound, free: int):
        """`free` bytes there were before anything was taken."""
        self._stack, self._fixed, self._recorder, self._bound, self._free = stack, fixed, recorder, bound, free
        self.places = places
        self.recorded: list[_Recorded] = []

    def all(self, asked: ListLike[Bucket], num_positions: int) -> list[Bucket]:
        """Largest first. One that takes too much is let go again, and smaller ones are tried; where one fails otherwise, no more are."""
        for number, bucket in enumerate(asked):
            if number * _SAID // len(asked) > (number - 1) * _SAID // len(asked):
                self._bound.say(f"Recording CUDA graphs of the {self._bound.name} {_bar(number, len(asked))}")
            try:
                self._add(bucket, num_positions)
            except RuntimeError as error:
                if not self._may_go_on(bucket, error):
                    break
            if self._taken > self._bound.num_bytes and self.recorded and self.recorded[-1].bucket == bucket:
                self.recorded.pop()
            if self._taken > self._bound.num_bytes:
                break
        return [own.bucket for own in self.recorded]

    @property
    def _taken(self) -> int:
        return self._free - self._recorder.free_bytes()

    def _may_go_on(self, bucket: Bucket, error: RuntimeError) -> bool:
        """Behind an error in recording this one."""
        cause = _cause(error)
        if is_out_of_memory(cause):
            _log.info("Memory ran out as passes of the %s over %s were recorded", self._bound.name, bucket)
            return True
        _log.warning("Passes of the %s over %s cannot be recorded (%s); no more are", self._bound.name, bucket, first_line(cause))
        return False

    def _add(self, bucket: Bucket, num_positions: int) -> None:
        """Raises RuntimeError where it cannot be recorded, or gives other logits than the same kernels launched one by one."""
        told, own = self._fixed.make(bucket.num_rows, bucket.window), self.places.states[: bucket.num_rows]
        ids, context, stack = self.places.ids[: bucket.num_rows], told.context, self._stack

        def run() -> None:
            own.copy_(stack.hidden(ids, context))

        told.tell([self._some(bucket, num_positions)])
        repeat = self._recorder.record(run)
        run()
        compared = own[:_LEAST]  # logits of all rows would take memory that a recording could have
        launched = stack.logits(compared)
        own.zero_()
        repeat()
        largest = launched.amax(-1).abs().max()  # not of those that are never drafted, which are far below
        difference = float((stack.logits(compared) - launched).abs().max() / largest)
        if not difference <= _TOLERANCE:
            raise RuntimeError(f"its logits are off by {difference:.1e} of the largest")
        self.recorded.append(_Recorded(bucket, told, repeat))

    @staticmethod
    def _some(bucket: Bucket, num_positions: int) -> Segment:
        """One segment, and rows that fill up behind it. What it writes to the first blocks is nobody's yet."""
        num = min(bucket.num_rows, bucket.window, num_positions)
        return Segment(range(num), 0, num)


def _cause(error: BaseException) -> BaseException:
    """What went wrong first: where recording fails, so may ending it."""
    return _cause(error.__context__) if isinstance(error.__context__, RuntimeError) else error


def _bar(number: int, total: int) -> str:
    done = 20 * number // total
    return f"[{'#' * done}{'.' * (20 - done)}] {number} of {total}"
