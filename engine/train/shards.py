"""Training data as files: each shard holds some examples as safetensors, and says in its header what it was made from.

A shard is there whole or not at all. Knows nothing of how examples are made.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from engine.errors import SourceError

_HEADER = "cascade"


@dataclass(frozen=True)
class Example:
    """A prompt and the target's answer to it."""

    prompt_ids: Sequence[int]
    answer_ids: Sequence[int]  # the end token included, where there is one
    source: str
    temperature: float

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.answer_ids)


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.safetensors"


def write_whole(path: Path, content: bytes) -> None:
    """Have a file on disk under its name, or not at all. Raises SourceError."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise SourceError(f"{path} cannot be written: {error.strerror}.") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_shard(path: Path, examples: Sequence[Example], provenance: Mapping[str, Any]) -> None:
    """Write `examples` with their `provenance`, which must be JSON. Raises SourceError."""
    sources = sorted({example.source for example in examples})
    lengths = torch.tensor([0, *map(len, examples)])
    tensors = {
        "token_ids": torch.tensor([i for e in examples for i in (*e.prompt_ids, *e.answer_ids)], dtype=torch.int32),  # [T]
        "is_answer": torch.tensor([x for e in examples for x in [*[False] * len(e.prompt_ids), *[True] * len(e.answer_ids)]]).bool(),  # [T]
        "offsets": lengths.cumsum(0),  # [E + 1], where each example begins, and T
        "sources": torch.tensor([sources.index(e.source) for e in examples], dtype=torch.int32),  # [E], indices in the header's list
        "temperatures": torch.tensor([e.temperature for e in examples], dtype=torch.float64),  # [E]
    }
    write_whole(path, save(tensors, {_HEADER: json.dumps({"sources": sources, **provenance}, sort_keys=True)}))


def provenance_of(path: Path) -> dict[str, Any]:
    """What `write_shard` was given, without reading the examples. Raises SourceError."""
    return _read(path)[1]


def num_answer_tokens(path: Path) -> int:
    """Tokens of answers in a shard."""
    return int(_read(path)[0]["is_answer"].sum())


def read_shard(path: Path) -> list[Example]:
    """The examples of a shard, in order. Raises SourceError."""
    tensors, header = _read(path)
    ids = array("i", tensors["token_ids"].tolist())  # a list would take nine times the memory
    is_answer, offsets = tensors["is_answer"], tensors["offsets"].tolist()
    examples = []
    for index, (begin, end) in enumerate(pairwise(offsets)):
        middle = end - int(is_answer[begin:end].sum())
        examples.append(
            Example(
                prompt_ids=ids[begin:middle],
                answer_ids=ids[middle:end],
                source=header["sources"][int(tensors["sources"][index])],
                temperature=float(tensors["temperatures"][index]),
            )
        )
    return examples


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})[_HEADER])
            return {name: file.get_tensor(name) for name in file.keys()}, header  # noqa: SIM118  # it is no mapping
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise SourceError(f"{path} is not a shard of training data ({error}). Remove it, and it is made again.") from error


def is_held_out(example: Example, share: float) -> bool:
    """Whether an example is for validation. Equal prompts are on one side, whichever source and temperature they come with."""
    return int(digest(example.prompt_ids)[:15], 16) < share * 16**15


def digest(what: Iterable[object]) -> str:
    """A fingerprint of numbers, texts and sequences of them."""
    return hashlib.sha256(json.dumps(list(what), default=list).encode()).hexdigest()
