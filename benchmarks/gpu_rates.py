"""What a device itself does: bytes that it copies a second, products of matrices, and how long it is busy. Knows no model.

These are what the engine is measured against, in the same process and minute: a rate from a data sheet is not reached by anybody.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.measuring import BarSkipped

_COPIES, _PRODUCTS = 10, 5  # that are timed together


def wait_for(device: torch.device) -> None:
    """Until all that was asked of it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(device: torch.device, call: Callable[[], object], times: int) -> float:
    """Of one call of `times` in a row, behind one that is not counted."""
    call()
    wait_for(device)
    start = time.perf_counter()
    for _ in range(times):
        call()
    wait_for(device)
    return (time.perf_counter() - start) / times


def copy_rate(device: torch.device, num_bytes: int) -> float:
    """Bytes read plus bytes written a second while `num_bytes` are copied from one place of the device's memory to another."""
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds_of(device, lambda: target.copy_(source), _COPIES)


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Floating-point operations a second of the product of two square matrices of normal numbers: zeros would heat less and run faster."""
    one, other = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2 * size**3 / seconds_of(device, lambda: one @ other, _PRODUCTS)


def busy_seconds(device: torch.device, run: Callable[[], object]) -> tuple[float, int]:
    """How long at least one kernel or copy was at work during `run`, and how many there were. Raises BarSkipped without a profiler."""
    is_cuda = device.type == "cuda"
    activity, kind = (ProfilerActivity.CUDA, "CUDA") if is_cuda else (ProfilerActivity.CPU, "CPU")
    with profile(activities=[activity]) as found:
        run()
        wait_for(device)
    events = [event for event in found.events() or () if event.device_type.name == kind and not event.is_user_annotation]
    if not events:
        raise BarSkipped(
            "the profiler saw no kernels here; in a container it may need CAP_SYS_ADMIN, or NVreg_RestrictProfilingToAdminUsers=0"
        )
    return covered((event.time_range.start, event.time_range.end) for event in events) / 1e6, len(events)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length that spans (begin, end) cover together, overlaps counted once."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
