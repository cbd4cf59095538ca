"""How much memory a device has left, so that a deployment that cannot fit is refused in one line instead of being killed."""

from __future__ import annotations

from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated; None where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [n for n in (_free_on_machine(), _free_in_container()) if n is not None]
    return min(found, default=None)


def _free_on_machine() -> int | None:
    if not _MEMINFO.exists():
        return None
    fields = dict(line.split(":", 1) for line in _MEMINFO.read_text("ascii").splitlines())
    entry = fields.get("MemAvailable")
    return int(entry.split()[0]) * 1024 if entry else None


def _free_in_container() -> int | None:
    """What the control group of a container still allows (version 2)."""
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if not (limit.exists() and used.exists()):
        return None
    text = limit.read_text("ascii").strip()
    return None if text == "max" else max(0, int(text) - int(used.read_text("ascii")))
