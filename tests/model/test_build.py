"""From files to a running engine: a pair on disk, with tokenizers; what cannot be a pair is refused before weights are read."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ByteSize
from tokenizers import Tokenizer, models

from engine.build import build
from engine.config import (
    DrafterConfig,
    EngineConfig,
    FixedLengthConfig,
    ModelDrafterConfig,
    ModelPair,
    ModelSource,
    NGramDrafterConfig,
    RuntimeConfig,
    SpeculationConfig,
)
from engine.errors import ConfigError, IncompatiblePair, SourceError, UnsupportedModel
from engine.request import Request, SamplingParams
from tests.reference import answer
from tests.tiny import ARCHITECTURES, VOCAB, drafter_model, drive, naive_drafter, naive_target, target_model
from tests.verify.requests import greedy


def save(model: Any, folder: Path, words: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        copy.deepcopy(model).save_pretrained(folder)
    Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])).save(str(folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pair")
    words = [f"w{i}" for i in range(VOCAB - 2)]  # two rows of the embedding are padding
    save(target_model(), root / "target", words)
    save(drafter_model(), root / "drafter", words)
    save(drafter_model(), root / "stranger", [*words[:-1], "other"])
    return root


def config(root: Path, drafter: DrafterConfig) -> EngineConfig:
    return EngineConfig(
        model=ModelPair(name="tiny", target=ModelSource(source=str(root / "target"), dtype="float64"), drafter=drafter),
        speculation=SpeculationConfig(draft_length=FixedLengthConfig(max=4)),
        engine=RuntimeConfig(device="cpu", kv_cache=ByteSize(1 << 18), block_size=4),
    )


def test_a_pair_on_disk_is_served(pair: Path) -> None:
    said: list[str] = []
    core = build(config(pair, ModelDrafterConfig(source=str(pair / "drafter"), dtype="float64")), said.append)
    assert core.info.drafter == f"model:{pair / 'drafter'}"
    assert core.info.vocab_size == VOCAB
    assert core.info.max_model_len == 64
    assert core._parts.runner._target.stack.block_size == 4, "that of the deployment"
    assert any("Warming up" in line for line in said)
    request = Request(id="x", prompt_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=12, seed=5, is_seeded=True))
    assert drive(core, [request]).tokens == {("x", 0): answer(request, naive_target(), naive_drafter())}


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES.keys() - {"llama"}))
def test_a_pair_of_every_architecture_on_disk_is_served(architecture: str, tmp_path: Path) -> None:
    words = [f"w{i}" for i in range(VOCAB)]
    save(target_model(architecture=architecture), tmp_path / "target", words)
    save(drafter_model(architecture=architecture), tmp_path / "drafter", words)
    core = build(config(tmp_path, ModelDrafterConfig(source=str(tmp_path / "drafter"), dtype="float64")))
    assert core.info.max_model_len == 64
    requests = greedy(3)
    want = {(r.id, 0): answer(r, naive_target(architecture)) for r in requests}
    outcome = drive(core, requests)
    assert outcome.tokens == want
    assert any(r.num_accepted for r in outcome.rounds)


def test_attention_that_cannot_run_here_is_refused_and_not_replaced(pair: Path) -> None:
    asked = config(pair, NGramDrafterConfig())
    runtime = asked.engine.model_copy(update={"attention": "varlen"})
    with pytest.raises(ConfigError) as caught:
        build(asked.model_copy(update={"engine": runtime}))
    assert str(caught.value) == "engine.attention: varlen - it runs on a CUDA device. auto takes what is there"


def test_another_tokenizer_is_refused_with_both_named(pair: Path) -> None:
    with pytest.raises(IncompatiblePair) as caught:
        build(config(pair, ModelDrafterConfig(source=str(pair / "stranger"))))
    for part in (str(pair / "target"), str(pair / "stranger"), "'w21'", "'other'"):
        assert part in str(caught.value)


def test_what_cannot_be_served_is_refused_by_name(pair: Path, tmp_path: Path) -> None:
    file = tmp_path / "target" / "config.json"
    file.parent.mkdir()
    for name in ("model.safetensors", "tokenizer.json"):
        (file.parent / name).symlink_to(pair / "target" / name)
    original = json.loads((pair / "target" / "config.json").read_text())
    for change, words in (
        ({"model_type": "mamba"}, "'mamba'"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
    ):
        file.write_text(json.dumps(original | change))
        with pytest.raises(UnsupportedModel, match=words):
            build(config(tmp_path, NGramDrafterConfig()))
    with pytest.raises(SourceError, match="nowhere"):
        build(config(tmp_path / "nowhere", NGramDrafterConfig()))
