"""Index tensors of a pass in one place: one copy to the device, and addresses that stay the same from pass to pass."""

from __future__ import annotations

from collections.abc import Sequence as ListLike

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class IndexBuffer:
    """Index tensors of a pass, one behind the other in one piece of device memory that stays where it is.

    So a pass needs one copy, and what a CUDA graph has captured finds the numbers of the next pass of like shape in the same places.
    """

    def __init__(self, device: torch.device, sizes: ListLike[int] = ()):
        """It grows when arrays are larger than any before, and lies elsewhere then; never for arrays of these sizes."""
        self._memory = torch.empty(sum(map(_room, sizes)), dtype=torch.int32, device=device)

    def write(self, arrays: ListLike[NDArray[np.int64]]) -> list[Tensor]:
        """int32 tensors of these shapes and numbers, which must fit; good until the next call, which writes to the same place."""
        ends = np.cumsum([_room(array.size) for array in arrays])
        staging = torch.empty(int(ends[-1]), dtype=torch.int32, pin_memory=self._memory.device.type == "cuda")
        host = staging.numpy()
        begins = [0, *(int(end) for end in ends[:-1])]
        for begin, array in zip(begins, arrays, strict=True):
            host[begin : begin + array.size] = array.reshape(-1)
        if len(staging) > len(self._memory):
            self._memory = self._memory.new_empty(1 << (len(staging) - 1).bit_length())
        self._memory[: len(staging)].copy_(staging, non_blocking=True)
        return [self._memory[begin : begin + array.size].view(array.shape) for begin, array in zip(begins, arrays, strict=True)]


def _room(size: int) -> int:
    """Up to a multiple of 64 bytes, so that no kernel is compiled once more for an address that is odd."""
    return -(-size // 16) * 16
