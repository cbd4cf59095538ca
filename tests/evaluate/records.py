"""Records of answers that nobody gave."""

from __future__ import annotations

from typing import Any

from benchmarks.evaluate.record import Record


def make_record(point: str = "exact", prompt: str = "0", **changes: Any) -> Record:
    """A record of four tokens in a second."""
    content: dict[str, Any] = {
        "point": point,
        "prompt": prompt,
        "token_ids": (5, 6, 7, 2),
        "text": "",
        "finish_reason": "stop",
        "seconds": 1.0,
        "first_seconds": 0.4,
        "num_first": 1,
        "num_target_calls": 2,
        "nats": 2.0,
    }
    return Record(**(content | changes))
