"""The target's last hidden states of all answers, kept beside the shards: the target's body runs once, and an epoch costs its head alone.

In float16: 2 x width bytes a token, and logits that are off by about a thousandth. A shard's file is there whole or not at all.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from engine.errors import ConfigError
from engine.train.batches import Batch, collate, in_passes
from engine.train.models import hidden_rows
from engine.train.shards import Example, write_whole

_HEADER, _NAME = "cascade", "states"


@dataclass(frozen=True)
class Rows:
    """Where the states of an example are."""

    path: Path
    first: int
    number: int


class KeptTeacher:
    """Reads states and runs the target's head."""

    def __init__(self, model: Any, rows: Sequence[Rows]):
        """`model` is the target, `rows` are those of the examples that batches are made of."""
        self._head, self._device, self._dtype = model.lm_head, model.device, model.dtype
        self._rows = rows
        self._files: dict[Path, Any] = {}

    @torch.inference_mode()
    def states(self, batch: Batch) -> Tensor:
        found = torch.cat([self._slice(self._rows[index]) for index in batch.examples])
        return found.to(self._device, self._dtype)

    @torch.inference_mode()
    def logits(self, states: Tensor) -> Tensor:
        return self._head(states)  # type: ignore[no-any-return]  # transformers' modules are untyped

    def _slice(self, rows: Rows) -> Tensor:
        if rows.path not in self._files:
            self._files[rows.path] = safe_open(rows.path, framework="pt").get_slice(_NAME)  # type: ignore[no-untyped-call]
        return self._files[rows.path][rows.first : rows.first + rows.number]  # type: ignore[no-any-return]  # untyped


def keep_states(path: Path, made_of: str, model: Any, examples: Sequence[Example], pass_tokens: int) -> list[Rows]:
    """Where the states of a shard's examples are; the target runs if they are not there. `made_of` names shard and target.

    Raises ConfigError where float16 cannot hold them, SourceError where they cannot be written.
    """
    counts = [len(example.answer_ids) for example in examples]
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    if _made_of(path) != made_of:
        states = torch.empty(sum(counts), model.config.hidden_size, dtype=torch.float16)
        for chosen in in_passes(range(len(examples)), [len(example) for example in examples], pass_tokens):
            batch = collate(examples, chosen).to(model.device)
            with torch.inference_mode():
                found = hidden_rows(model, batch).to("cpu", torch.float16)
            for index, rows in zip(batch.examples, torch.split(found, list(batch.counts)), strict=True):
                states[firsts[index] : firsts[index] + counts[index]] = rows
        if not bool(states.isfinite().all()):
            raise ConfigError("training.keep_states: True - float16 cannot hold this target's states; take False")
        write_whole(path, save({_NAME: states}, {_HEADER: json.dumps({"made_of": made_of})}))
    return [Rows(path, first, count) for first, count in zip(firsts, counts, strict=True)]


def _made_of(path: Path) -> str | None:
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return str(json.loads((file.metadata() or {})[_HEADER])["made_of"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None  # it is made again


OnStates = Callable[[int, int], None]  # shards done, and of how many
