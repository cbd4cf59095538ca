"""Weights as safetensors in files of limited size, in the transformers format as long as every tensor fits into a file.

One that does not is stored as blocks of rows, NAME.rows.0, NAME.rows.1 and so on, and put together again when it is loaded. Anything
but this engine has to do that by itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, cat

from engine.errors import ConfigError, SourceError
from engine.model.source import WEIGHTS_FILE, WEIGHTS_INDEX, first_line

_BLOCK = re.compile(r"(?P<name>.+)\.rows\.(?P<number>\d+)")
_HEADER_BYTES = 128  # of a tensor's entry, generously; names are short


def write_weights(folder: Path, state: Mapping[str, Tensor], max_file_size: int) -> None:
    """Write a state dict in files of at most `max_file_size` bytes. Raises ConfigError where a single row is larger."""
    files: list[dict[str, Tensor]] = [{}]
    room = _room(max_file_size)
    for name, block in _blocks(state, room):
        if block.nbytes + _HEADER_BYTES > room:
            files.append({})
            room = _room(max_file_size)
        room -= block.nbytes + _HEADER_BYTES
        files[-1][name] = block
    files = [tensors for tensors in files if tensors]
    if len(files) == 1 and not any(map(_BLOCK.fullmatch, files[0])):
        save_file(files[0], folder / WEIGHTS_FILE, {"format": "pt"})
        return
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        save_file(tensors, folder / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    index = {"metadata": {"total_size": sum(weight.nbytes for weight in state.values())}, "weight_map": weight_map}
    (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=1, sort_keys=True) + "\n", "utf-8")


def read_weights(path: Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The state dict of a folder, or those `names` of it that are there: nothing else is read. Raises SourceError."""
    try:
        files = [WEIGHTS_FILE]
        if (path / WEIGHTS_INDEX).is_file():
            files = sorted(set(json.loads((path / WEIGHTS_INDEX).read_text("utf-8"))["weight_map"].values()))
        found: dict[str, Tensor] = {}
        for file in files:
            with safe_open(path / file, framework="pt") as stored:
                found |= {name: stored.get_tensor(name) for name in stored.keys() if names is None or _whole(name) in names}  # noqa: SIM118  # not a dict
        return _joined(found, path)
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError) as error:
        raise SourceError(f"The weights in {path} cannot be loaded: {first_line(error)}") from error


def joined_weights(path: Path) -> dict[str, Tensor] | None:
    """The state dict of a folder whose weights are stored in blocks; None for every other. Raises SourceError."""
    index = path / WEIGHTS_INDEX
    if not index.is_file():
        return None
    try:
        weight_map: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
        has_blocks = any(map(_BLOCK.fullmatch, weight_map))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(f"The weights in {path} cannot be loaded: {first_line(error)}") from error
    return read_weights(path) if has_blocks else None


def _whole(name: str) -> str:
    """The tensor that a stored one is a part of, or is."""
    block = _BLOCK.fullmatch(name)
    return block["name"] if block else name


def _joined(stored: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """A state dict with its blocks put together."""
    blocks: dict[str, dict[int, Tensor]] = {}
    for name in [name for name in stored if _BLOCK.fullmatch(name)]:
        found = _BLOCK.fullmatch(name)
        assert found is not None
        blocks.setdefault(found["name"], {})[int(found["number"])] = stored.pop(name)
    for name, parts in blocks.items():
        if sorted(parts) != list(range(len(parts))):
            raise SourceError(f"The weights in {path} cannot be loaded: {name} lacks a block of rows.")
        stored[name] = cat([parts[number] for number in range(len(parts))])
    return stored


def _room(max_file_size: int) -> int:
    """Bytes for tensors and their entries, beside the file's own."""
    return max_file_size - 1024


def _blocks(state: Mapping[str, Tensor], room: int) -> list[tuple[str, Tensor]]:
    """What is stored: tensors as they are, or the blocks of those that are too large, even so that none is a leftover."""
    found: list[tuple[str, Tensor]] = []
    for name, weight in state.items():
        if weight.nbytes + _HEADER_BYTES <= room:
            found.append((name, weight.contiguous()))
            continue
        rows_per_block = (room - _HEADER_BYTES) // (weight.nbytes // weight.shape[0])
        if rows_per_block < 1:
            raise ConfigError(f"max_file_size: {room + 1024} - is too small for one row of {name}")
        num_blocks = -(-weight.shape[0] // rows_per_block)
        found += [(f"{name}.rows.{number}", block.contiguous()) for number, block in enumerate(weight.tensor_split(num_blocks))]
    return found
