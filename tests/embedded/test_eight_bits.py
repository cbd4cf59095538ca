"""What weights of 8 bits for GPUs cost in quality, on a real model and real text. torch computes the same on a CPU, slowly."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.passes import alone, window
from engine.build import assemble
from engine.config import EngineConfig, ModelPair, ModelSource, RuntimeConfig
from engine.model.eight_bits import Fp8Linear, WeightInt8Linear, why_not_fp8, why_not_int8
from engine.model.linear import AS_THEY_ARE, LinearKind
from engine.model.loader import load
from engine.model.member import Member
from engine.model.stack import DecoderStack
from server.text import TextTokenizer

pytestmark = [pytest.mark.embedded, pytest.mark.timeout(600)]

TEXT = Path(__file__).parents[2] / "LICENSE"
NUM_TOKENS = 400


def perplexity(model_path: Path, kind: LinearKind) -> float:
    """Of the beginning of a text, as one pass of the engine's own target says it."""
    member = Member(DecoderStack(load(model_path, torch.bfloat16, torch.device("cpu")), kind), 2048, model_path)
    config = EngineConfig(model=ModelPair(name="x", target=ModelSource(source="x")), engine=RuntimeConfig(device="cpu", kv_cache=1 << 26))
    core = assemble(config, member)
    ids = tuple(TextTokenizer.from_folder(model_path).encode(TEXT.read_text("utf-8")))[:NUM_TOKENS]
    logits, _, _ = core._parts.runner.forward(*window(alone(core, ids[:1], NUM_TOKENS), num_tokens=1, drafts=ids[1:]))
    return math.exp(nn.functional.cross_entropy(logits[:-1].float(), torch.tensor(ids[1:])))


@pytest.fixture(scope="module")
def plain(model_path: Path) -> float:
    return perplexity(model_path, AS_THEY_ARE)


@pytest.mark.parametrize(
    ("kind", "allowed", "rounding", "why_not"),
    [(WeightInt8Linear, 1.02, 0.1, why_not_int8), (Fp8Linear, 1.05, 0.3, why_not_fp8)],
)
def test_perplexity_hardly_grows(
    kind: type[nn.Module], allowed: float, rounding: float, why_not: Callable[..., str], plain: float, model_path: Path
) -> None:
    if reason := why_not(torch.bfloat16, torch.device("cpu")):
        pytest.skip(reason)
    found = perplexity(model_path, LinearKind(lambda own, _: kind(own), rounding, "test"))
    assert 0.97 < found / plain < allowed
