"""A drafter with its target's embedding: nothing of it is trained or stored, and the folder is loaded like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from engine.api import Engine
from engine.config import EngineConfig
from engine.errors import ConfigError, SourceError
from engine.model.borrowed import ENTRY, NAMES
from engine.model.draft_vocabulary import read_draft_ids
from engine.model.loader import load
from engine.model.source import CONFIG_FILE
from engine.request import SamplingParams
from engine.train.run import Watch, distil, target_folder
from tests.train.conftest import MATERIAL, Recipe
from tests.train.test_distil import lines, train, weights

CPU = torch.device("cpu")
SHAPE = {"hidden_size": 16, "num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "intermediate_size": 24, "embedding": "target"}
CHANGES: dict[str, Any] = {"drafter": {**SHAPE, "dtype": "float32", "init": {"from_target_layers": [1]}, "draft_vocabulary": 30}}


@pytest.fixture
def drafter(recipe: Recipe, shards: list[Path]) -> Path:
    return distil(recipe(**CHANGES), MATERIAL, shards, "x", Watch())


def test_layers_learn_and_the_embedding_stays(drafter: Path, target: Path) -> None:
    stored = {name for file in drafter.glob("model*.safetensors") for name in load_file(file)}
    assert not any(name.startswith(tuple(NAMES)) for name in stored)
    ours, theirs = load(drafter, torch.float64, CPU), load(target, torch.float64, CPU)
    assert torch.equal(ours.model.embed_tokens.weight.float(), theirs.model.embed_tokens.weight.float())
    assert torch.equal(ours.lm_head.weight.float(), theirs.lm_head.weight.float())
    assert not torch.equal(ours.model.layers[0].mlp.up_proj.weight, theirs.model.layers[1].mlp.up_proj.weight)
    assert "embedding and head are the target's" in (drafter / "README.md").read_text("utf-8")


def test_a_run_that_was_ended_goes_on_bit_for_bit(recipe: Recipe, shards: list[Path]) -> None:
    class Killed(BaseException):
        pass

    def kill(report: Any) -> None:
        if report.position.step == 7:
            raise Killed

    plain = recipe(**CHANGES, training__folder=recipe().training.folder + "-plain")
    train(plain, shards)
    losses = [entry["loss"] for entry in lines(plain) if entry["kind"] == "step"]
    assert losses[-1] < losses[0]
    config = recipe(**CHANGES)
    with pytest.raises(Killed):
        train(config, shards, on_report=kill)
    train(config, shards)
    assert lines(config) == lines(plain)
    assert not NAMES & weights(config).keys(), "a checkpoint holds what is trained"
    for name, weight in weights(plain).items():
        assert torch.equal(weight, weights(config)[name]), name


def test_it_drafts_and_answers_alone(drafter: Path, target: Path) -> None:
    """Alone it writes what its own forward says; in a pair the target's text stays the target's, and few drafts stand."""

    def engine(source: Path, helper: Path | None) -> Engine:
        pair = {"name": "tiny", "target": {"source": str(source), "dtype": "float64"}}
        if helper is not None:
            pair["drafter"] = {"kind": "model", "source": str(helper), "dtype": "float64"}
        content = {"model": pair, "engine": {"device": "cpu", "kv_cache": "1MiB", "max_sequences": 4}}
        return Engine(EngineConfig.model_validate(content))

    def greedy(source: Path, helper: Path | None = None) -> list[tuple[int, ...]]:
        with engine(source, helper) as running:
            answers = running.generate([[1, 20, 21, 40 + i] for i in range(4)], SamplingParams(max_tokens=12, temperature=0))
        return [tuple(answer.token_ids) for answer in answers]

    assert greedy(target, drafter) == greedy(target)
    naive, ids = load(drafter, torch.float64, CPU), read_draft_ids(drafter, 304)
    assert ids is not None
    for i, answer in enumerate(greedy(drafter)):
        text = [1, 20, 21, 40 + i]
        for token_id in answer:
            assert token_id == ids[naive(torch.tensor([text])).logits[0, -1, ids].argmax()]
            text.append(token_id)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"source": "nowhere.gguf", "revision": None}, "nowhere.gguf does not exist"),
        ({"revision": None}, "must be a source and a revision"),
        ("self", r"takes lm_head.weight \[304, 16\] from .*, which has none"),
    ],
)
def test_an_embedding_that_cannot_be_had_is_said(entry: Any, message: str, drafter: Path) -> None:
    config = json.loads((drafter / CONFIG_FILE).read_text("utf-8"))
    entry = {"source": str(drafter), "revision": None} if entry == "self" else entry
    (drafter / CONFIG_FILE).write_text(json.dumps(config | {ENTRY: entry}), "utf-8")
    with pytest.raises(SourceError, match=message):
        load(drafter, torch.float32, CPU)


def test_another_width_is_refused(recipe: Recipe) -> None:
    """Before any data is made."""
    shape = CHANGES["drafter"] | {"hidden_size": 8, "init": {}}
    with pytest.raises(ConfigError, match=r"hidden_size: 8 - must be the target's 16"):
        target_folder(recipe(drafter=shape), Watch())


def test_a_drafter_is_trained_further(drafter: Path, recipe: Recipe, shards: list[Path]) -> None:
    shape = CHANGES["drafter"] | {"init": {"drafter": str(drafter)}}
    output = recipe().output
    config = recipe(drafter=shape, training__folder=output + "-run", training__steps=1, training__learning_rate=1e-9, output=output + "-2")
    again = distil(config, MATERIAL, shards, "x", Watch())
    before, after = (load(folder, torch.float32, CPU).state_dict() for folder in (drafter, again))
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=1e-5, atol=1e-7, msg=name)
    assert f"| begun with | the weights of `{drafter.name}`" in (again / "README.md").read_text("utf-8")
    wrong = recipe(drafter=shape | {"intermediate_size": 8}, training__folder=output + "-wrong", output=output + "-3")
    with pytest.raises(ConfigError, match=r"init\.drafter: .* has another shape: intermediate_size is 8 here, there 24"):
        distil(wrong, MATERIAL, shards, "x", Watch())
    absent = recipe(drafter=shape | {"init": {"drafter": "runs/absent"}})
    with pytest.raises(ConfigError, match=r"init\.drafter: 'runs/absent' - is no folder of a model"):
        target_folder(absent, Watch())
