"""The target's last hidden states of all answers, kept beside the shards, so that the target runs once.

Beside each state stands what a row over the whole vocabulary is needed for, the logarithm of the softmax's sum and the largest token. So
an epoch costs no more than the logits of those tokens that the drafter may draft. States are float16: 2 x width bytes a token, and logits
that are off by about a thousandth. A shard's file is there whole or not at all.
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
from engine.train.losses import CACHED_ROWS, TargetRows
from engine.train.models import Taught, hidden_rows
from engine.train.shards import Example, write_whole

FORMAT = 2  # raise it when the same target and examples would give another file
_HEADER = "cascade"
_STATES, _NORMALIZERS, _FAVOURITES = _NAMES = "states", "log_normalizers", "favourites"  # [R, hidden], [R], [R]


@dataclass(frozen=True)
class Rows:
    """Where the states of an example are."""

    path: Path
    first: int
    number: int


class KeptTeacher:
    """Reads states and runs as much of the target's head as is learnt from."""

    def __init__(self, head: Callable[[Tensor], Tensor], device: torch.device, dtype: torch.dtype, rows: Sequence[Rows]):
        """`head` is as much of the target's as is learnt, [R, hidden] of `dtype` to [R, N].

        `rows` are those of the examples that batches are made of.
        """
        self._head, self._device, self._dtype = head, device, dtype
        self._rows = rows
        self._files: dict[Path, dict[str, Any]] = {}

    @torch.inference_mode()
    def of(self, batch: Batch) -> Taught:
        parts = [self._read(self._rows[index]) for index in batch.examples]
        states, normalizers, favourites = (torch.cat(columns).to(self._device) for columns in zip(*parts, strict=True))
        states = states.to(self._dtype)

        @torch.inference_mode()
        def rows(some: slice) -> TargetRows:
            logits = self._head(states[some])
            log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).sub_(normalizers[some, None])
            return TargetRows(log_p, favourites[some].long())

        return Taught(states, rows)

    def _read(self, rows: Rows) -> list[Tensor]:
        if rows.path not in self._files:
            file: Any = safe_open(rows.path, framework="pt")
            self._files[rows.path] = {name: file.get_slice(name) for name in _NAMES}
        return [self._files[rows.path][name][rows.first : rows.first + rows.number] for name in _NAMES]


def keep_states(path: Path, made_of: str, model: Any, examples: Sequence[Example], pass_tokens: int) -> list[Rows]:
    """Where the states of a shard's examples are; the target runs if they are not there. `made_of` names shard and target.

    Raises ConfigError where float16 cannot hold them, SourceError where they cannot be written.
    """
    counts = [len(example.answer_ids) for example in examples]
    firsts = [sum(counts[:i]) for i in range(len(counts))]
    header = {"format": FORMAT, "made_of": made_of}
    if _header_of(path) != header:
        write_whole(path, save(_computed(model, examples, firsts, sum(counts), pass_tokens), {_HEADER: json.dumps(header)}))
    return [Rows(path, first, count) for first, count in zip(firsts, counts, strict=True)]


@torch.inference_mode()
def _computed(model: Any, examples: Sequence[Example], firsts: Sequence[int], num_rows: int, pass_tokens: int) -> dict[str, Tensor]:
    kept = {
        _STATES: torch.empty(num_rows, model.config.hidden_size, dtype=torch.float16),
        _NORMALIZERS: torch.empty(num_rows, dtype=torch.float32),
        _FAVOURITES: torch.empty(num_rows, dtype=torch.int32),
    }
    for chosen in in_passes(range(len(examples)), [len(example) for example in examples], pass_tokens):
        batch = collate(examples, chosen).to(model.device)
        states = hidden_rows(model, batch)
        summed = [_normalizers(model.lm_head(some)) for some in states.split(CACHED_ROWS)]  # type: ignore[no-untyped-call]  # torch leaves it untyped
        at = torch.cat([torch.arange(firsts[i], firsts[i] + count) for i, count in zip(batch.examples, batch.counts, strict=True)])
        kept[_STATES][at] = states.to("cpu", torch.float16)
        kept[_NORMALIZERS][at] = torch.cat([normalizers for normalizers, _ in summed]).to("cpu", torch.float32)
        kept[_FAVOURITES][at] = torch.cat([favourites for _, favourites in summed]).to("cpu", torch.int32)
    if not bool(kept[_STATES].isfinite().all()):
        raise ConfigError("training.keep_states: True - float16 cannot hold this target's states; take False")
    return kept


def _normalizers(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Of logits [R, V] the logarithm of the softmax's sum [R] and the largest tokens [R]."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest, favourites = logits.max(-1)
    return largest + logits.sub_(largest[:, None]).exp_().sum(-1).log(), favourites


def _header_of(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return json.loads((file.metadata() or {})[_HEADER])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None  # it is made again


OnStates = Callable[[int, int], None]  # shards done, and of how many
