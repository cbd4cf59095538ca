"""What a drafter's adapter reads beside the drafter's own states: of each sequence the state one position in front of its next row.

The target's, which every round leaves behind its last token, and behind a row that was read, if the adapter is chained, what came out of
it. A state is good for the row of one position; where that is another one, since something foreseen stands between, or the sequence was
taken up elsewhere, the row is from the text alone.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.model.state_adapter import StateAdapter
from engine.plan import StepPlan
from engine.sequence import Sequence
from engine.transfer import to_device


@dataclass(frozen=True, slots=True)
class _Before:
    """The state in front of a row."""

    position: int  # that the row is for
    state: Tensor  # [hidden]
    is_targets: bool  # else it came out of the adapter


class TargetStates:
    """The states of the sequences that may read them: those that need no row q at every position."""

    def __init__(self, adapter: StateAdapter):
        self._adapter = adapter
        self._before: dict[Sequence, _Before] = {}

    def observe(self, plan: StepPlan, states: Tensor) -> None:
        """[B, hidden] of the target, those that the last token of each chunk that completed followed from."""
        for chunk, state in zip(plan.completing, states, strict=True):
            if chunk.seq.request.speculation.enabled and not chunk.seq.needs_q:
                self._before[chunk.seq] = _Before(len(chunk.seq.tokens), state, is_targets=True)

    def forget(self, seq: Sequence) -> None:
        """The sequence has left the engine."""
        self._before.pop(seq, None)

    def read(self, seqs: ListLike[Sequence], positions: ListLike[int], states: Tensor) -> Tensor:
        """The drafter's states [N, hidden] of rows for these positions, with what those in front of them tell where there are such."""
        found = [self._before.pop(seq, None) for seq in seqs]
        befores = [before if before and before.position == position else None for before, position in zip(found, positions, strict=True)]
        for is_targets in (True, False):
            known = {i: before.state for i, before in enumerate(befores) if before and before.is_targets is is_targets}
            if len(known) == len(seqs):
                states = self._adapter(states, torch.stack(list(known.values())), is_targets)
            elif known:
                which = to_device(list(known), states.device, torch.long)
                adapted = self._adapter(states.index_select(0, which), torch.stack(list(known.values())), is_targets)
                states = states.index_copy(0, which, adapted)
        if self._adapter.is_chained:
            for seq, position, before, state in zip(seqs, positions, befores, states, strict=True):
                if before:
                    self._before[seq] = _Before(position + 1, state, is_targets=False)
        return states
