"""torch's own recording, on a CUDA device: it repeats what was launched and waits for nothing; what cannot be recorded does no harm."""

from __future__ import annotations

import copy
import random

import pytest
import torch

from engine.config import FixedLengthConfig
from engine.model.attention import Segment
from engine.model.cuda_graphs import CudaRecorder
from engine.model.graphs import Bound, Passes
from engine.model.paged import PagedModel, rows_run
from engine.model.plain_layer import Stream
from engine.model.stack import DecoderStack
from engine.model.triton_attention import TritonAttention
from engine.transfer import to_device
from tests.tiny import VOCAB, Setup, drive, make_core, target_model
from tests.verify.requests import greedy

CUDA = torch.device("cuda")
PASSES = Passes(num_sequences=4, window=6, num_rows=64, num_positions=120)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(params=["llama", "qwen3", "gemma3_text"])
def models(request: pytest.FixtureRequest) -> tuple[PagedModel, PagedModel]:
    """One recorded, one not."""
    own = copy.deepcopy(target_model(torch.float32, architecture=request.param)).to(CUDA)
    stack = DecoderStack(own, choose_attention=lambda _: TritonAttention())
    recorded, launched = (PagedModel(stack, 64, 16) for _ in range(2))
    said = list[str]()
    recorded.record(CudaRecorder(CUDA), PASSES, Bound(1 << 30, "target", said.append))
    assert recorded.rows_run(1) == 1, said
    return recorded, launched


def test_repeated_passes_equal_launched_ones(models: tuple[PagedModel, PagedModel]) -> None:
    rng, done = random.Random(1), [0] * 4
    tables = [list(range(8 * i, 8 * i + 8)) for i in range(4)]
    while min(done) < 100:
        running = [i for i in range(4) if done[i] < 110 and rng.random() < 0.8] or [done.index(min(done))]
        segments = [Segment(tables[i], done[i], rng.choice((1, 2, 6))) for i in running]
        ids = to_device([rng.randrange(VOCAB) for _ in range(sum(own.num_tokens for own in segments))], CUDA)
        got, want = (model.forward(segments, ids, range(len(ids))) for model in models)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
        for i, own in zip(running, segments, strict=True):
            done[i] += own.num_tokens


def test_a_repeated_pass_waits_for_nothing(models: tuple[PagedModel, PagedModel]) -> None:
    segments, ids = [Segment([3, 5], 20, 1), Segment([9], 3, 6)], to_device([1] * 7, CUDA)
    torch.cuda.set_sync_debug_mode("error")
    try:
        models[0].forward(segments, ids, range(7))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_model_that_asks_the_host_is_launched(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """And the device is none the worse for having been asked."""
    own = copy.deepcopy(target_model(torch.float32)).to(CUDA)
    stack = DecoderStack(own, choose_attention=lambda _: TritonAttention())
    embed = stack.embed

    def asking(input_ids: torch.Tensor) -> Stream:
        states, delta = embed(input_ids)
        return states * float(input_ids.max() >= 0), delta

    monkeypatch.setattr(stack, "embed", asking)
    model, current = PagedModel(stack, 16, 16), torch.cuda.current_stream()
    model.record(CudaRecorder(CUDA), PASSES, Bound(1 << 30, "target", print))
    assert "cannot be recorded" in caplog.text
    assert model.rows_run(1) == rows_run(1)
    assert torch.cuda.current_stream() == current
    logits = model.forward([Segment([3], 0, 2)], to_device([1, 2], CUDA), [0, 1])
    assert bool(logits.isfinite().all())


def test_a_bound_of_nothing_leaves_everything_launched() -> None:
    setup = Setup(device="cuda", dtype=torch.float32, attention=TritonAttention(), block_size=16, cuda_graph_memory=1)
    assert make_core(setup)._parts.runner._target.rows_run(1) == rows_run(1)


@pytest.mark.parametrize("policy", [FixedLengthConfig(max=0), FixedLengthConfig(max=5)])
def test_tokens_are_equal_with_and_without(policy: FixedLengthConfig) -> None:
    def tokens(memory: int) -> object:
        setup = Setup(
            device="cuda",
            dtype=torch.float32,
            attention=TritonAttention(),
            policy=policy,
            block_size=16,
            cuda_graph_memory=memory,
        )
        core = make_core(setup)
        assert (core._parts.runner._target.rows_run(1) == 1) == (memory > 1)
        return drive(core, greedy(8)).tokens

    assert tokens(1 << 30) == tokens(1)
