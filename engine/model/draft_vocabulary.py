"""A drafter that drafts only some tokens: beside its weights lies the list of their ids, and its head is those rows of the full one.

Its distribution is over all tokens and zero at the others, so that nobody further on needs to know. To anything that does not read the
list, the folder is an ordinary checkpoint, whose other rows no training has touched.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.errors import SourceError
from engine.model.source import first_line

FILE = "draft_vocabulary.safetensors"
_NAME = "token_ids"

# The logit of what is not drafted: its probability is exactly 0 at any temperature below 50, and it is still a number, so that a row is a
# distribution when a mask leaves nothing else. Every dtype has it.
NEVER = -1e4


def write_draft_ids(folder: Path, draft_ids: Tensor) -> None:
    """Store the ids [N] of the tokens that are drafted."""
    save_file({_NAME: draft_ids.to("cpu", torch.int32)}, folder / FILE)


def read_draft_ids(folder: Path, vocab_size: int) -> Tensor | None:
    """The ids [N] of the tokens that the model in `folder` drafts, ascending; None for all. Raises SourceError."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        ids = load_file(path)[_NAME].long()
    except (OSError, KeyError, SafetensorError) as error:
        raise SourceError(f"{path} cannot be read: {first_line(error)}") from error
    if ids.ndim != 1 or not len(ids) or bool((ids.diff() <= 0).any()) or int(ids[0]) < 0 or int(ids[-1]) >= vocab_size:
        raise SourceError(f"{path} does not hold ascending token ids below {vocab_size}.")
    return ids
