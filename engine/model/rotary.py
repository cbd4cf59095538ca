"""Cosines and sines of positions, looked up: they go by the position alone, since loader.py refuses models whose angles change with a text.

A table of all positions costs a few megabytes and saves each pass some twenty small operations, which one drafted token on a CPU feels.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as ListLike
from typing import Any

import torch
from torch import Tensor

from engine.model.layer_math import Rotary
from engine.model.loader import context_length, has_rope_by_layer_type

_MOST_BYTES = 128 << 20  # of one table: beyond, each pass computes its own
_TRIED = 8192  # positions that passes may reach which are run for their time alone, and are beyond what small models were made for

Kind = tuple[str, ...]


class RotaryTables:
    """Of one model, for each kind of layer that has its own."""

    def __init__(self, model: Any, like: Tensor, form: Callable[[Tensor, Tensor], Rotary]):
        """`like` [1, 1, hidden] is as the states are. `form` turns transformers' cosines and sines [1, N, head_dim] into what layers take,
        a row [N, ...] for each position."""
        self.kinds = _kinds(model)
        self._embed, self._like, self._form = model.model.rotary_emb, like, form
        num_positions = max(_TRIED, context_length(model.config))
        self._whole = {kind: self._of_all(kind, num_positions) for kind in dict.fromkeys(self.kinds)}

    def at(self, positions: Tensor, kinds: ListLike[Kind]) -> dict[Kind, Rotary]:
        """Of positions [N], by the kinds of layers that will run."""
        return {kind: self._of(kind, positions) for kind in dict.fromkeys(kinds)}

    def _of(self, kind: Kind, positions: Tensor) -> Rotary:
        if (whole := self._whole[kind]) is None:
            return self._computed(kind, positions)
        cosines, sines = whole
        return cosines.index_select(0, positions), sines.index_select(0, positions)

    @torch.inference_mode()
    def _of_all(self, kind: Kind, num_positions: int) -> Rotary | None:
        one = self._computed(kind, torch.arange(1, device=self._like.device))
        if num_positions * sum(table.nbytes for table in one) > _MOST_BYTES:
            return None
        return self._computed(kind, torch.arange(num_positions, device=self._like.device))

    def _computed(self, kind: Kind, positions: Tensor) -> Rotary:
        return self._form(*self._embed(self._like, positions.unsqueeze(0), *kind))


def _kinds(model: Any) -> list[Kind]:
    """What `rotary_emb` wants to know of each layer: its type where rotary parameters go by layer type, else nothing."""
    if has_rope_by_layer_type(model.config):
        return [(kind,) for kind in model.config.layer_types]
    return [()] * len(model.model.layers)
