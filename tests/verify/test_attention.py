"""The matrix once more with our attention kernels under it: float32, and the naive loop's text, token for token.

They run compiled where there is a CUDA device, else step by step where TRITON_INTERPRET=1 says so (CONTRIBUTING.md).
"""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from engine.config import FixedLengthConfig
from engine.model.triton_attention import TritonAttention
from tests.reference import NaiveModel, answer
from tests.tiny import VOCAB, Setup, drive, make_core, target_model
from tests.verify.requests import greedy

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not IS_INTERPRETED else "cpu"

pytestmark = [
    pytest.mark.skipif(
        find_spec("triton") is None or (DEVICE == "cpu" and not IS_INTERPRETED),
        reason="needs Triton, and a CUDA device or TRITON_INTERPRET=1",
    ),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning"),  # Triton 3.9 announces what 3.10 does
]


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("drafter", ["none", "model"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text"])
def test_greedy_text_is_that_of_the_naive_loop(architecture: str, drafter: str, splits: int) -> None:
    """A small pool, so that sequences are preempted and blocks used again; prompts in pieces, beside verify windows and single tokens."""
    requests = greedy(3)
    longest = max(len(r.prompt_ids) + r.sampling.max_tokens for r in requests)
    naive = NaiveModel(copy.deepcopy(target_model(torch.float32, VOCAB, architecture)).to(torch.float64))
    want = {(r.id, 0): answer(r, naive) for r in requests}
    setup = Setup(
        architecture=architecture,
        drafter=drafter,
        policy=FixedLengthConfig(max=3),
        block_size=2,
        num_blocks=-(-longest // 2),
        max_step_tokens=7,
        device=DEVICE,
        dtype=torch.float32,
        attention=TritonAttention(splits, keys=16),
    )
    outcome = drive(make_core(setup), requests)
    assert outcome.tokens == want
    assert sum(step.num_preemptions for step in outcome.steps) > 0
    assert drive(make_core(replace(setup, max_step_tokens=32, num_blocks=200, block_size=4)), requests).tokens == want
