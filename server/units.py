"""Numbers as people read them."""

from __future__ import annotations

UNKNOWN = "unknown offline"


def in_bytes(count: int | None) -> str:
    """A number of bytes; None is one that only the hub could tell."""
    if count is None:
        return UNKNOWN
    amount = float(count)
    for unit in ("B", "KiB", "MiB"):
        if amount < 1024:
            return f"{amount:.4g} {unit}"
        amount /= 1024
    return f"{amount:.4g} GiB"
