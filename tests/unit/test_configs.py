"""Every file in configs/ is a deployment (those in configs/train are recipes), and default.yaml shows every key with its default."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from engine.config import EngineConfig, ModelPair, RuntimeConfig, SpeculationConfig
from server.settings import ServerSettings, load

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(file for file in CONFIGS.iterdir() if file.name != "train")


def test_there_are_configs() -> None:
    assert CONFIGS / "default.yaml" in FILES
    assert all(file.suffix == ".yaml" for file in FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_config_loads_and_serves_presets(file: Path) -> None:
    deployment = load(file, {})
    assert f"{deployment.model.name}:exact" in deployment.model_ids
    assert not deployment.speculation.presets["plain"].enabled
    assert deployment.server.host == "127.0.0.1"


def test_the_default_shows_every_key() -> None:
    content = yaml.safe_load((CONFIGS / "default.yaml").read_text("utf-8"))
    assert content.keys() == EngineConfig.model_fields.keys() | {"server"}
    for section, model in (("model", ModelPair), ("speculation", SpeculationConfig), ("engine", RuntimeConfig), ("server", ServerSettings)):
        assert content[section].keys() == model.model_fields.keys()


def test_the_default_shows_the_defaults() -> None:
    deployment = load(CONFIGS / "default.yaml", {})
    assert deployment.engine == RuntimeConfig()
    assert deployment.server == ServerSettings()
    assert deployment.speculation.model_copy(update={"presets": {}}) == SpeculationConfig()
