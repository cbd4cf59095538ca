"""A real core over tiny models for an engine's process."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.config import EngineConfig
from engine.core import EngineCore
from tests.tiny import Setup, make_core

FACTORY = "tests.process.real:build"


def build(config: EngineConfig, progress: Callable[[str], None]) -> EngineCore:
    """What ProcessClient's factory names. Tiny models run faster on one thread than on two."""
    torch.set_num_threads(1)
    return make_core(Setup())
