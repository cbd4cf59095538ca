"""The matrix once more with our attention kernels under it: float32, and the naive loop's text, token for token.

They run compiled where there is a CUDA device, else step by step where TRITON_INTERPRET=1 says so (CONTRIBUTING.md).
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.model.triton_attention import TritonAttention
from tests.tiny import drive, make_core
from tests.triton_device import NEEDS_TRITON, asked_of, tight

pytestmark = NEEDS_TRITON


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("drafter", ["none", "model"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3_text"])
def test_greedy_text_is_that_of_the_naive_loop(architecture: str, drafter: str, splits: int) -> None:
    requests, want = asked_of(architecture)
    setup = replace(tight(architecture, drafter, requests), attention=TritonAttention(splits, keys=16))
    outcome = drive(make_core(setup), requests)
    assert outcome.tokens == want
    assert sum(step.num_preemptions for step in outcome.steps) > 0
    assert drive(make_core(replace(setup, max_step_tokens=32, num_blocks=200, block_size=4)), requests).tokens == want
