"""What a benchmark refuses to run, and how one request can fail.

EngineError
└── BenchmarkError       a benchmark that cannot be run as asked; one line says why
    └── RequestFailed    one request of a load; counted by kind, never dropped
"""

from __future__ import annotations

from engine.errors import EngineError


class BenchmarkError(EngineError):
    """A benchmark that cannot be run as asked."""


class RequestFailed(BenchmarkError):
    """One request that got no complete answer. `kind` is what failures are counted by."""

    def __init__(self, kind: str, message: str):
        super().__init__(f"{kind}: {message}")
        self.kind = kind
        self.message = message
