"""The finished drafter: files of limited size, a folder that the engine takes as a drafter, and nothing overwritten that is not ours."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from engine.api import Engine
from engine.config import EngineConfig
from engine.errors import ConfigError, SourceError
from engine.model.draft_vocabulary import read_draft_ids
from engine.model.loader import load
from engine.model.parts import joined_weights, write_weights
from engine.model.stack import DecoderStack
from engine.request import SamplingParams
from engine.train.run import Watch, distil
from tests.train.conftest import MATERIAL, VOCAB, Recipe


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_an_exported_drafter_drafts(dtype: str, recipe: Recipe, shards: list[Path], target: Path) -> None:
    """It begins as the target and hardly moves, so that nearly all of its drafts must stand."""
    shape = {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 24, "tie_embeddings": False}
    drafter = {**shape, "init": {"from_target_layers": [0, 1]}, "dtype": dtype}
    config = recipe(drafter=drafter, training__steps=2, training__learning_rate=1e-6)
    output = distil(config, MATERIAL, shards, "cascade train distil some.yaml", Watch())
    assert max(file.stat().st_size for file in output.glob("*.safetensors")) <= 8192
    card = (output / "README.md").read_text("utf-8")
    assert "cascade train distil some.yaml" in card
    assert "| self |" in card
    assert "## How it got there" in card
    assert "| drafter, quantization none | " in card
    assert str(target.parent) not in card
    pair = {
        "model": {
            "name": "tiny",
            "target": {"source": str(target), "dtype": "float64"},
            "drafter": {"kind": "model", "source": str(output), "dtype": "float64"},
        },
        "speculation": {"draft_length": {"policy": "fixed", "max": 3}},
        "engine": {"device": "cpu", "kv_cache": "1MiB", "max_sequences": 4},
    }
    with Engine(EngineConfig.model_validate(pair)) as engine:
        answers = engine.generate([[1, 20, 21, 40 + i, 2, 22, 1, 23] for i in range(8)], SamplingParams(max_tokens=20, temperature=0))
    drafted, accepted = sum(a.num_draft_tokens for a in answers), sum(a.num_accepted_tokens for a in answers)
    assert accepted > 0.9 * drafted > 0


def test_what_is_not_a_drafter_is_not_overwritten(recipe: Recipe, shards: list[Path]) -> None:
    config = recipe(training__steps=1)
    output = Path(config.output)
    output.mkdir()
    (output / "thesis.txt").write_text("years of work", "utf-8")
    with pytest.raises(ConfigError, match="holds something else"):
        distil(config, MATERIAL, shards, "x", Watch())
    assert not Path(config.training.folder).exists(), "it was trained before it was refused"
    (output / "thesis.txt").rename(output.parent / "thesis.txt")
    distil(config, MATERIAL, shards, "x", Watch())
    before = sorted(file.name for file in output.iterdir())
    distil(config, MATERIAL, shards, "x", Watch(), is_export_only=True)
    assert sorted(file.name for file in output.iterdir()) == before
    assert [file.name for file in output.parent.iterdir() if "tmp" in file.name] == []


def test_what_was_there_before_stays_until_the_new_one_is(
    recipe: Recipe, shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind a link, too, which stays one."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    config = recipe(training__steps=1, output=str(tmp_path / "link"))
    card = distil(config, MATERIAL, shards, "first", Watch()) / "README.md"
    assert (tmp_path / "link").is_symlink()
    assert "`first`" in card.read_text("utf-8")
    rename = Path.rename

    def refuse(path: Path, to: Path) -> Path:
        if ".tmp-" in path.name and not path.name.endswith(".old"):
            raise OSError(28, "No space left on device")
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(SourceError, match="cannot be written: No space left on device"):
        distil(config, MATERIAL, shards, "second", Watch(), is_export_only=True)
    assert "`first`" in card.read_text("utf-8")
    assert sorted(file.name for file in tmp_path.iterdir() if "elsewhere" in file.name) == ["elsewhere"]


def test_nothing_to_export_is_said(recipe: Recipe, shards: list[Path]) -> None:
    with pytest.raises(ConfigError, match="has no checkpoint to export"):
        distil(recipe(), MATERIAL, shards, "x", Watch(), is_export_only=True)


# ---------------------------------------------------------------------- weights in parts
def test_a_large_tensor_is_spread_over_files_and_joined(tmp_path: Path) -> None:
    state = {"a": torch.randn(100, 8), "b": torch.arange(40.0), "c": torch.randn(2000, 2)}
    write_weights(tmp_path, state, 4096)
    assert max(file.stat().st_size for file in tmp_path.glob("*.safetensors")) <= 4096
    joined = joined_weights(tmp_path)
    assert joined is not None
    assert joined.keys() == state.keys()
    assert all(torch.equal(joined[name], state[name]) for name in state)
    lost = next(file for file in sorted(tmp_path.glob("*.safetensors")) if "c.rows.1" in _names(file))
    lost.unlink()
    with pytest.raises(SourceError, match="cannot be loaded"):
        joined_weights(tmp_path)
    with pytest.raises(ConfigError, match="too small for one row of a"):
        write_weights(tmp_path, {"a": torch.zeros(2, 2000)}, 4096)


def _names(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def test_what_fits_is_in_the_transformers_format(tmp_path: Path, target: Path) -> None:
    own = load(target, torch.float64, torch.device("cpu"))
    state = {name: weight.clone() for name, weight in own.state_dict().items()}
    for folder, size in (("whole", 1 << 20), ("several", 60_000)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_bytes((target / "config.json").read_bytes())
        write_weights(tmp_path / folder, state, size)
        assert joined_weights(tmp_path / folder) is None
        again = load(tmp_path / folder, torch.float64, torch.device("cpu"))
        assert all(torch.equal(weight, state[name]) for name, weight in again.state_dict().items())
    assert [file.name for file in (tmp_path / "whole").glob("*.safetensors")] == ["model.safetensors"]
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 1


def test_a_drafter_of_some_tokens_drafts_only_those(recipe: Recipe, shards: list[Path], target: Path) -> None:
    config = recipe(drafter__draft_vocabulary=20, training__steps=2)
    output = distil(config, MATERIAL, shards, "x", Watch())
    ids = read_draft_ids(output, VOCAB)
    assert ids is not None
    assert len(ids) == 20
    assert 2 in ids, "the end token is always among them"
    model = load(output, torch.float64, torch.device("cpu"))
    stack = DecoderStack(copy.deepcopy(model), draft_ids=ids)
    hidden = torch.randn(5, 8, dtype=torch.float64)
    found = stack.logits(hidden).softmax(-1)
    assert found.shape == (5, VOCAB)
    torch.testing.assert_close(found[:, ids], model.lm_head(hidden)[:, ids].softmax(-1))
    others = [token_id for token_id in range(VOCAB) if token_id not in ids]
    assert not found[:, others].any()
    assert f"drafts the 20 most frequent of {VOCAB} tokens" in (output / "README.md").read_text("utf-8")
    with pytest.raises(SourceError, match="ascending token ids below 10"):
        read_draft_ids(output, 10)
