"""A real core over tiny models, in which memory runs out: for passes over more than a few tokens, and for one token in any case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.config import EngineConfig, FixedLengthConfig
from engine.core import EngineCore
from engine.model.attention import Segment
from engine.model.paged import PagedModel
from tests.tiny import VOCAB, Setup, make_core

FACTORY = "tests.process.memory:build"
HUNGRY = VOCAB - 1  # a token that no pass can run: no other prompt has it, and no answer does


@dataclass
class Wall:
    """A model some of whose passes fail."""

    refuses: Callable[[int, Tensor], bool]  # by the number of the pass, and its tokens
    error: Callable[[], BaseException] = lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    num_passes: int = 0
    num_refused: int = 0

    def in_front_of(self, model: PagedModel) -> None:
        own = model.states

        def states(segments: Sequence[Segment], input_ids: Tensor, rows: Sequence[int]) -> Tensor:
            self.num_passes += bool(segments)
            if segments and self.refuses(self.num_passes, input_ids):
                self.num_refused += 1
                raise self.error()
            return own(segments, input_ids, rows)

        model.states = states  # type: ignore[method-assign]


def target_of(core: EngineCore) -> PagedModel:
    return core._parts.runner._target


def drafter_of(core: EngineCore) -> PagedModel:
    model: PagedModel = core._parts.drafter._model  # type: ignore[attr-defined]
    return model


def narrow() -> EngineCore:
    """Memory for nine tokens at a time."""
    torch.set_num_threads(1)
    core = make_core(Setup(drafter="model", policy=FixedLengthConfig(max=3), num_blocks=80))
    Wall(lambda _, ids: len(ids) > 9 or HUNGRY in ids).in_front_of(target_of(core))
    return core


def build(config: EngineConfig, progress: Callable[[str], None]) -> EngineCore:
    """What ProcessClient's factory names."""
    return narrow()
