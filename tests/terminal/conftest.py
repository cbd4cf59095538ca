"""The fixtures of the server's tests, for the terminal client."""

from __future__ import annotations

from tests.server.conftest import folder, tokenizer

__all__ = ["folder", "tokenizer"]
