"""What stands in for CUDA graphs on a CPU: a recorder whose repetition calls again, and a gather that can be told another batch."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.kv.cache import KVCache
from engine.model.attention import Attention, AttentionKind, AttentionShape, FixedPass, LayerAttention, PagedContext, Room, Segment
from engine.model.gather_attention import GATHER


@dataclass
class CallingRecorder:
    """Free memory shrinks by `cost` a recording that is still there."""

    free: int = 1 << 30
    cost: int = 0
    num_recorded: int = 0
    num_repeated: int = 0
    spoil: Callable[[int], None] = lambda number: None  # may raise as the recording of this number begins
    alive: list[object] = field(default_factory=list)

    def begin(self) -> None:
        """Nothing is shared."""

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        self.spoil(self.num_recorded)
        self.num_recorded += 1
        run()
        return _Repetition(self, run)

    def free_bytes(self) -> int:
        return self.free - self.cost * len(self.alive)


class _Repetition:
    """Counted as long as anybody has it."""

    def __init__(self, recorder: CallingRecorder, run: Callable[[], None]):
        self._recorder, self._run, self._token = recorder, run, object()
        recorder.alive.append(self._token)

    def __call__(self) -> None:
        self._recorder.num_repeated += 1
        self._run()

    def __del__(self) -> None:
        self._recorder.alive.remove(self._token)


@dataclass(frozen=True)
class FixedGather:
    """GATHER, of whose passes some can be recorded where recording means calling again."""

    windows: tuple[int, ...] = (2, 4)
    name: str = "fixed-gather"
    is_recordable: bool = True

    @property
    def forms(self) -> ListLike[AttentionKind]:
        return (self,)

    def lacks(self, shape: AttentionShape) -> str | None:
        return None

    def over(self, cache: KVCache, block_size: int, shape: AttentionShape) -> Attention:
        return _Paged(GATHER.over(cache, block_size, shape), self.windows)


@dataclass(frozen=True)
class _Paged:
    own: Attention
    windows: tuple[int, ...]

    def context(self, segments: ListLike[Segment], num_rows: int = 0) -> PagedContext:
        return self.own.context(segments, num_rows)

    def fixed(self, room: Room) -> _Passes:
        return _Passes(self.own, self.windows, room)


@dataclass(frozen=True)
class _Passes:
    own: Attention
    windows: tuple[int, ...]
    room: Room

    def make(self, num_rows: int, window: int) -> FixedPass:
        assert num_rows <= self.room.num_rows
        return _Pass(self, num_rows, window)


class _Pass:
    """Both pass and context."""

    def __init__(self, passes: _Passes, num_rows: int, window: int):
        self._passes, self._num_rows, self._window = passes, num_rows, window
        self.positions = torch.zeros(num_rows, dtype=torch.long)
        self._told: PagedContext | None = None

    @property
    def context(self) -> PagedContext:
        return self

    def tell(self, segments: ListLike[Segment]) -> None:
        assert all(own.num_tokens <= self._window and own.end <= self._passes.room.num_positions for own in segments)
        assert sum(own.num_tokens for own in segments) <= self._num_rows
        self._told = self._passes.own.context(segments, self._num_rows)
        self.positions.copy_(self._told.positions)

    def attend(self, asked: LayerAttention, query: Tensor, kv: Tensor) -> Tensor:
        assert self._told is not None
        assert len(query) == self._num_rows
        return self._told.attend(asked, query, kv)
