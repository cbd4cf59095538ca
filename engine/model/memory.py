"""How much memory a device has left, so that a deployment that cannot fit is refused in one line instead of being killed; and what it looks
like when it has none.
"""

from __future__ import annotations

from pathlib import Path

import torch

# for whoever runs the deployment, the keys that decide how much memory it takes
ADVICE = (
    "lower engine.kv_cache, engine.max_step_tokens, engine.max_sequences or engine.cuda_graph_memory, "
    "or take a smaller dtype, a quantization or a smaller model"
)
# what torch, Triton and the libraries under torch say where it is no OutOfMemoryError; the last is that of a CPU
_SIGNS = (
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate",
)

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device had no room for what was asked of it; the next thing that is asked may have."""
    return isinstance(error, torch.OutOfMemoryError) or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS))


def let_go(device: torch.device) -> None:
    """Have torch give back what it only keeps for the next time."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def gpu_memory(device: torch.device) -> tuple[int, int]:
    """Bytes that are free, and bytes that there are."""
    let_go(device)
    free, total = torch.cuda.mem_get_info(device)
    return int(free), int(total)


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated; None where the system does not say."""
    if device.type == "cuda":
        return gpu_memory(device)[0]
    found = [n for n in (_free_on_machine(), _free_in_container()) if n is not None]
    return min(found, default=None)


def _free_on_machine() -> int | None:
    if not _MEMINFO.exists():
        return None
    fields = dict(line.split(":", 1) for line in _MEMINFO.read_text("ascii").splitlines())
    entry = fields.get("MemAvailable")
    return int(entry.split()[0]) * 1024 if entry else None


def _free_in_container() -> int | None:
    """What the control group of a container still allows (version 2). Cached files count as used there, and are let go when asked for."""
    limit, used, parts = _CGROUP / "memory.max", _CGROUP / "memory.current", _CGROUP / "memory.stat"
    if not (limit.exists() and used.exists()):
        return None
    text = limit.read_text("ascii").strip()
    if text == "max":
        return None
    found = dict(line.split(" ", 1) for line in parts.read_text("ascii").splitlines()) if parts.exists() else {}
    cached = sum(int(found.get(name, 0)) for name in ("inactive_file", "active_file"))
    return max(0, int(text) - int(used.read_text("ascii")) + cached)
