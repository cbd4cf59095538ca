"""Greedy text of the embedded model equals that of transformers' own generate, with every drafter."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence as ListLike
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ByteSize

from engine.build import assemble, build
from engine.config import (
    DrafterConfig,
    EngineConfig,
    FixedLengthConfig,
    ModelDrafterConfig,
    ModelPair,
    NGramDrafterConfig,
    NoDrafterConfig,
    RuntimeConfig,
    SpeculationConfig,
)
from engine.model.member import Member
from engine.request import Request, SamplingParams, SpeculationParams
from server.settings import load
from server.text import TextTokenizer
from tests.embedded.conftest import SOURCE
from tests.tiny import drive

pytestmark = [pytest.mark.embedded, pytest.mark.timeout(600)]

DEFAULT = Path(__file__).parents[2] / "configs" / "default.yaml"
PROMPTS = Path(__file__).parents[3] / "shared" / "data" / "spec_bench_dev.jsonl"
NUM_PROMPTS, NUM_TOKENS, LONGEST = 20, 32, 300
DRAFTERS: dict[str, DrafterConfig] = {
    "none": NoDrafterConfig(),
    "ngram": NGramDrafterConfig(),
    "model": ModelDrafterConfig(source="the target's first layers"),
}


@pytest.fixture(scope="module")
def prompts(model_path: Path) -> list[tuple[int, ...]]:
    """Chat prompts of Spec-Bench, from all its categories, short enough for a test."""
    if not PROMPTS.exists():
        pytest.skip(f"needs {PROMPTS.name} of the benchmark data")
    tokenizer = TextTokenizer.from_folder(model_path)
    found: list[tuple[int, ...]] = []
    for line in PROMPTS.read_text("utf-8").splitlines()[::5]:
        messages = [{"role": "user", "content": json.loads(line)["turns"][0]}]
        ids = tuple(tokenizer.encode_chat(messages))
        if len(ids) <= LONGEST:
            found.append(ids)
    assert len(found) >= NUM_PROMPTS
    return found[:NUM_PROMPTS]


@pytest.fixture(scope="module")
def expected(own_model: Any, prompts: ListLike[tuple[int, ...]]) -> list[tuple[int, ...]]:
    texts = []
    for ids in prompts:
        row = torch.tensor([ids])
        out = own_model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=2)
        texts.append(tuple(out[0, len(ids) :].tolist()))
    return texts


def truncated(model: Any, num_layers: int) -> Any:
    """The model's first layers as a drafter: right often enough, and often wrong."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = num_layers
    small = type(model)(config)
    small.load_state_dict(model.state_dict(), strict=False)
    return small.eval().requires_grad_(False)


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_text_is_that_of_transformers(
    drafter: str, own_model: Any, prompts: list[tuple[int, ...]], expected: list[tuple[int, ...]], model_path: Path
) -> None:
    from engine.model.stack import DecoderStack

    target = Member(DecoderStack(copy.deepcopy(own_model)), 8192, model_path, (2,))
    small = Member(DecoderStack(truncated(own_model, 28)), 8192, model_path) if drafter == "model" else None
    config = EngineConfig(
        model=ModelPair(name="smollm2", target=SOURCE, drafter=DRAFTERS[drafter]),
        speculation=SpeculationConfig(draft_length=FixedLengthConfig(max=4)),  # a drafter of nearly the target's size never pays
        engine=RuntimeConfig(device="cpu", kv_cache=ByteSize(1 << 29), max_step_tokens=128, max_sequences=8),
    )
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, stop_token_ids=(2,))
    requests = [Request(id=str(i), prompt_ids=ids, sampling=sampling) for i, ids in enumerate(prompts)]
    outcome = drive(assemble(config, target, small), requests)
    assert [outcome.tokens[str(i), 0] for i in range(len(prompts))] == expected
    if drafter != "none":
        assert sum(r.num_accepted for r in outcome.rounds) > 0
        assert any(r.num_accepted < r.num_draft for r in outcome.rounds)


@pytest.mark.parametrize("rule", ["exact", "token_v3"])
def test_the_drafter_that_is_shipped_drafts(rule: str, prompts: list[tuple[int, ...]], expected: list[tuple[int, ...]]) -> None:
    """The default deployment's pair: exact gives transformers' text, a rule that keeps more another one, and both accept a fair part."""
    deployment = load(DEFAULT, {}).engine_part
    engine = RuntimeConfig(device="cpu", kv_cache=ByteSize(1 << 29), max_step_tokens=128, max_sequences=8)
    core = build(deployment.model_copy(update={"engine": engine}))
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, stop_token_ids=(2,))
    speculation = SpeculationParams(rule=rule, alpha=0.0 if rule == "exact" else 0.5)
    requests = [Request(id=str(i), prompt_ids=ids, sampling=sampling, speculation=speculation) for i, ids in enumerate(prompts)]
    outcome = drive(core, requests)
    texts = [outcome.tokens[str(i), 0] for i in range(len(prompts))]
    assert (texts == expected) == (rule == "exact")
    assert sum(r.num_accepted for r in outcome.rounds) > 0.2 * sum(r.num_draft for r in outcome.rounds) > 0


def test_the_drafter_that_is_shipped_is_small_and_has_a_card() -> None:
    folder = DEFAULT.parents[1] / "models" / "smollm2-135m-drafter"
    sizes = [file.stat().st_size for file in folder.iterdir()]
    assert max(sizes) <= 15 << 20
    assert sum(sizes) <= 40 << 20
    card = (folder / "README.md").read_text("utf-8")
    for part in ("license: apache-2.0", "temperature 0", "What a draft costs"):
        assert part in card
