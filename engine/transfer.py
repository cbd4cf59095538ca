"""From the host to the engine's device, without waiting for what the device still has to do.

torch.tensor(..., device=...), indexing with a list and .to(device) wait for a GPU's queue each time: the copy reads memory that the system
may move, so torch stays until it is through. Pinned memory stays where it is, and torch's allocator gives it to nobody else until the copy
was made. The other way, from the device to the host, has to wait: a step does that once, for its verdict.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from typing import Any

import torch
from torch import Tensor


def to_device(values: ListLike[Any] | Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor on the device, of numbers (nested lists give more dimensions) or of a tensor on the host.

    `dtype` None leaves a tensor's own, and for numbers takes torch's choice: int64, float32, bool.
    """
    host = torch.as_tensor(values, dtype=dtype)
    if host.device == device:
        return host
    if device.type == "cuda" and host.device.type == "cpu":
        return host.pin_memory().to(device, non_blocking=True)
    return host.to(device)
