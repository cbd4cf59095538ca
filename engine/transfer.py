"""From the host to the engine's device, without waiting for what the device still has to do.

torch.tensor(..., device=...), indexing with a list and .to(device) wait for a GPU's queue each time: the copy reads memory that the system
may move, so torch stays until it is through. Pinned memory stays where it is, and torch's allocator gives it to nobody else until the copy
was made. The other way, from the device to the host, has to wait: a step does that once, for its verdict.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def to_device(values: ListLike[Any] | NDArray[Any] | Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on the device, of numbers (nested lists give more dimensions), of an array, or of a tensor on the host or there already.

    `dtype` None leaves that of a tensor or an array, and for numbers takes torch's choice: int64, float32, bool.
    """
    if isinstance(values, Tensor) and values.device.type != "cpu":
        return values.to(device, dtype)
    host = torch.as_tensor(values, dtype=dtype)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)
