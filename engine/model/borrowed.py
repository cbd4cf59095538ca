"""A drafter with its target's embedding: its config says where that is, and its own files hold the layers and nothing else.

The embedding is most of a small model, its rows are what the target itself knows of its tokens, and nothing of it has to be trained.
EAGLE's drafters do the same (Li et al. 2024, section 3.2), and adapters name their base model in this way. Such a folder is complete for
this engine only: it is loaded like any other, alone, too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError
from torch import Tensor
from transformers import PretrainedConfig

from engine.config import ModelSource
from engine.errors import SourceError
from engine.model.parts import read_weights
from engine.model.source import Progress, resolve, silent

ENTRY = "embedding_source"  # of config.json
NAMES = frozenset({"model.embed_tokens.weight", "lm_head.weight"})  # of every architecture that is served


def entry_of(target: ModelSource) -> dict[str, Any]:
    """What config.json holds for a drafter of `target`."""
    return {ENTRY: {"source": target.source, "revision": target.revision}}


def lender_of(config: PretrainedConfig, path: Path, cache_dir: Path | None, progress: Progress = silent) -> Path | None:
    """Whose embedding the model in `path` takes, fetched or converted when it has to be; None if it has its own. Raises SourceError."""
    entry = getattr(config, ENTRY, None)
    if entry is None:
        return None
    try:
        source = ModelSource.model_validate(entry)
    except ValidationError as error:
        raise SourceError(f"{path}: {ENTRY} of its config must be a source and a revision ({error.errors()[0]['msg']}).") from error
    return resolve(source, cache_dir, progress)


def borrowed_weights(config: PretrainedConfig, path: Path, cache_dir: Path | None) -> dict[str, Tensor] | None:
    """The embedding, and the head where it is another, that the model in `path` takes from elsewhere; None if it has its own.

    Raises SourceError where they cannot be had, or are of another shape.
    """
    lender = lender_of(config, path, cache_dir)
    if lender is None:
        return None
    names = NAMES - {"lm_head.weight"} if config.tie_word_embeddings else NAMES
    found = read_weights(lender, names)
    for name in sorted(names):
        shape, wanted = tuple(found[name].shape) if name in found else None, (config.vocab_size, config.hidden_size)
        if shape != wanted:
            raise SourceError(f"{path} takes {name} {list(wanted)} from {lender}, which has {list(shape) if shape else 'none'}.")
    return found
