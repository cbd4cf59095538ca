"""What a program that embeds the engine needs; everything else is imported from its own module.

    from engine import Engine, EngineConfig, SamplingParams

Names are looked up when they are used: most of this package is plain data that the server's process imports, too, and that process holds
no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from engine.api import Answer, Engine
    from engine.client import EngineClient, ThreadClient
    from engine.config import EngineConfig
    from engine.errors import ClientError, EngineError, ServerError
    from engine.process import ProcessClient
    from engine.request import Choice, FinishReason, Request, SamplingParams, SpeculationParams, TokenDelta
    from engine.stats import EngineInfo

__all__ = (
    "Answer",
    "Choice",
    "ClientError",
    "Engine",
    "EngineClient",
    "EngineConfig",
    "EngineError",
    "EngineInfo",
    "FinishReason",
    "ProcessClient",
    "Request",
    "SamplingParams",
    "ServerError",
    "SpeculationParams",
    "ThreadClient",
    "TokenDelta",
)

if not TYPE_CHECKING:  # a type checker would take it for a module that has every name
    _HOMES = {
        "engine.api": ("Answer", "Engine"),
        "engine.client": ("EngineClient", "ThreadClient"),
        "engine.config": ("EngineConfig",),
        "engine.errors": ("ClientError", "EngineError", "ServerError"),
        "engine.process": ("ProcessClient",),
        "engine.request": ("Choice", "FinishReason", "Request", "SamplingParams", "SpeculationParams", "TokenDelta"),
        "engine.stats": ("EngineInfo",),
    }
    _HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

    def __getattr__(name):
        if name not in _HOME_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(importlib.import_module(_HOME_OF[name]), name)

    def __dir__():
        return sorted({*globals(), *__all__})
