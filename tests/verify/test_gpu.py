"""The matrix and the promise once more, on a CUDA device, still in float64 and still without tolerance."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from engine.config import FixedLengthConfig
from engine.model.attention import AttentionKind, Segment
from engine.model.gather_attention import GATHER
from engine.model.paged import PagedModel
from engine.model.stack import DecoderStack
from engine.model.triton_attention import TritonAttention
from engine.transfer import to_device
from tests.reference import answer
from tests.tiny import drive, make_core, naive_target, target_model
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


@pytest.mark.parametrize("kind", [GATHER, TritonAttention()], ids=["gather", "triton"])
def test_a_pass_is_launched_without_waiting_for_the_device(kind: AttentionKind) -> None:
    model = PagedModel(
        DecoderStack(copy.deepcopy(target_model(torch.float32, architecture="qwen3")).to("cuda"), choose_attention=lambda _: kind), 16, 4
    )
    segments = [Segment([3, 5, 7], 0, 9), Segment([2, 9], 4, 1), Segment([1, 4], 2, 3)]
    for mode in ("default", "error"):  # the first compiles and allocates
        torch.cuda.set_sync_debug_mode(mode)
        try:
            ids = to_device([1] * 13, torch.device("cuda"))
            model.forward(segments, ids, [8, 9, 12])
        finally:
            torch.cuda.set_sync_debug_mode("default")
