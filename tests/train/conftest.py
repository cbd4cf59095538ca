"""A tiny target with a tokenizer and a chat template, and recipes for drafters of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.model.loader import load, quiet_transformers
from engine.train.config import DistilConfig
from engine.train.data import Material, Turns
from engine.train.run import Watch, make_data
from engine.train.shards import Example, read_shard
from tests.server.conftest import TEMPLATE, build_tokenizer
from tests.tiny import tiny_config

VOCAB, END = 304, 2  # not fewer than the tokenizer has
Recipe = Callable[..., DistilConfig]
MATERIAL = Material(Turns(user_start_ids=(1, 20, 21), assistant_start_ids=(END, 22, 1, 23)))


@pytest.fixture(scope="session")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in float64, so that nothing depends on a batch."""
    path = tmp_path_factory.mktemp("target")
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(tiny_config(vocab=VOCAB, eos_token_id=END, num_hidden_layers=2)).double()
    with quiet_transformers():
        model.save_pretrained(path)
    build_tokenizer().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}), "utf-8")
    (path / "chat_template.jinja").write_text(TEMPLATE, "utf-8")
    return path


def recipe_content(target: Path, folder: Path) -> dict[str, Any]:
    return {
        "target": {"source": str(target), "dtype": "float64"},
        "drafter": {"hidden_size": 8, "num_layers": 1, "num_heads": 2, "intermediate_size": 16, "dtype": "float32"},
        "data": {
            "folder": str(folder / "data"),
            "num_tokens": 500,
            "sources": [{"kind": "self", "max_tokens": 6}],
            "max_tokens": 12,
            "max_prompt_tokens": 30,
            "examples_per_shard": 16,
            "batch": 8,
            "kv_cache": "1MiB",
        },
        "training": {
            "folder": str(folder / "run"),
            "steps": 12,
            "batch_tokens": 60,
            "pass_tokens": 100,
            "logit_rows": 16,
            "learning_rate": 0.02,
            "validation_share": 0.2,
            "validate_every": 4,
            "checkpoint_every": 3,
        },
        "output": str(folder / "drafter"),
        "max_file_size": "8KiB",
        "device": "cpu",
        "threads": 1,
    }


@pytest.fixture
def recipe(target: Path, tmp_path: Path) -> Recipe:
    """A recipe with some keys changed, such as training__steps=3."""

    def make(**changes: Any) -> DistilConfig:
        content = recipe_content(target, tmp_path)
        for key, value in changes.items():
            *path, last = key.split("__")
            section = content
            for part in path:
                section = section[part]
            section[last] = value
        return DistilConfig.model_validate(content)

    return make


@pytest.fixture(scope="session")
def shards(target: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Data of the recipe as it stands."""
    content = recipe_content(target, tmp_path_factory.mktemp("made"))
    return make_data(DistilConfig.model_validate(content), MATERIAL, Watch())


@pytest.fixture(scope="module")
def model(target: Path) -> Any:
    return load(target, torch.float64, torch.device("cpu"))


@pytest.fixture(scope="module")
def examples(shards: list[Path]) -> list[Example]:
    return read_shard(shards[0])
