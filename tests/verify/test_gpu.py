"""The matrix and the promise once more, on a CUDA device, still in float64 and still without tolerance."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.config import FixedLengthConfig
from tests.reference import answer
from tests.tiny import drive, make_core, naive_target
from tests.verify.requests import greedy
from tests.verify.test_promise import SETUPS, drafter_of, promised

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("num_blocks", [13, 200])
@pytest.mark.parametrize("max_draft", [0, 1, 4])
@pytest.mark.parametrize("name", SETUPS)
def test_text_on_a_gpu_is_that_of_the_naive_loop(name: str, max_draft: int, num_blocks: int) -> None:
    setup = replace(SETUPS[name], device="cuda", policy=FixedLengthConfig(max=max_draft), num_blocks=num_blocks, max_step_tokens=16)
    requests = [*greedy(8), *promised(setup)]
    want = {(r.id, 0): answer(r, naive_target(), drafter_of(setup) if r.sampling.is_seeded else None) for r in requests}
    assert drive(make_core(setup), requests).tokens == want
