"""The matrix and the promise once more with recorded passes under them: token for token the same with and without.

In float64 over the gather, where recording means calling again; and in float32 over our kernels, which run compiled and really recorded
where there is a CUDA device, else step by step where TRITON_INTERPRET=1 says so (CONTRIBUTING.md).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from engine.config import FixedLengthConfig
from engine.core import EngineCore
from engine.model.graphs import Bucket
from engine.model.triton_attention import TritonAttention
from tests.recording import CallingRecorder, FixedGather
from tests.reference import answer
from tests.tiny import Setup, drive, make_core, naive_target
from tests.triton_device import DEVICE, asked_of, needs_triton
from tests.verify.requests import greedy, guided, mask_of
from tests.verify.test_promise import POLICIES, SETUPS, drafter_of, promised


def buckets(core: EngineCore, is_drafter: bool = False) -> list[Bucket]:
    model = core._parts.drafter._model if is_drafter else core._parts.runner._target  # type: ignore[attr-defined]
    return list(model._graphs.buckets)


@pytest.mark.parametrize("policy", [POLICIES[0], POLICIES[2], POLICIES[6]], ids=lambda policy: f"{policy.policy}-{policy.max}")
@pytest.mark.parametrize("name", SETUPS)
def test_text_is_that_of_the_naive_loop(name: str, policy: FixedLengthConfig) -> None:
    """Rules, seeds, grammars and predictions; prompts in pieces, which are launched, between passes that are repeated."""
    requests = [*greedy(4), *guided(promised(SETUPS[name]))]
    want = {
        (r.id, 0): answer(r, naive_target(), drafter_of(SETUPS[name]) if r.sampling.is_seeded else None, mask=mask_of(r)) for r in requests
    }
    for num_blocks, block_size, budget in ((13, 2, 7), (200, 4, 64)):
        recorder = CallingRecorder()
        setup = replace(
            SETUPS[name],
            policy=policy,
            num_blocks=num_blocks,
            block_size=block_size,
            max_step_tokens=budget,
            attention=FixedGather(),
            recorder=recorder,
        )
        core = make_core(setup)
        at_start = recorder.num_repeated
        outcome = drive(core, requests)
        assert outcome.tokens == want
        assert recorder.num_repeated - at_start > len(outcome.steps) / 2


def test_a_verify_window_of_every_length_is_repeated() -> None:
    """One stream: each of its steps but the first is one repetition of the target and one for each draft and what is caught up with."""
    recorder = CallingRecorder()
    setup = Setup(policy=FixedLengthConfig(max=4), max_sequences=1, attention=FixedGather(), recorder=recorder)
    core = make_core(setup)
    assert buckets(core) == [Bucket(1, 2), Bucket(2, 2), Bucket(4, 5), Bucket(8, 5)]
    assert buckets(core, is_drafter=True) == [Bucket(1, 2), Bucket(2, 2)]
    core.add(greedy(1)[0])
    core.step()
    while core.has_work:
        before = recorder.num_repeated
        stats = core.step().stats
        assert recorder.num_repeated - before == 1 + (stats.num_draft_tokens or 0)


def test_the_bound_holds_for_both_models_together_and_the_drafter_comes_first() -> None:
    def core(memory: int, cost: int) -> EngineCore:
        recorder = CallingRecorder(cost=cost)
        setup = Setup(max_sequences=2, max_step_tokens=64, attention=FixedGather(), recorder=recorder, cuda_graph_memory=memory)
        return make_core(setup)

    everything = core(1000 << 20, 1 << 20)
    num_target, num_drafter = len(buckets(everything)), len(buckets(everything, is_drafter=True))
    assert num_target > 2
    assert num_drafter > 1
    tight = core((num_drafter + 2) << 20, 1 << 20)
    assert len(buckets(tight, is_drafter=True)) == num_drafter
    assert len(buckets(tight)) == 2
    little = core(1 << 30, 1 << 28)  # of 1 GiB that is free
    assert len(buckets(little)) + len(buckets(little, is_drafter=True)) == 2, "half of it stays for steps"


def test_costs_go_by_the_rows_that_are_repeated() -> None:
    core = make_core(Setup(attention=FixedGather(), recorder=CallingRecorder()))
    costs = core._parts.without_drafts._costs
    assert [costs.rows_run(num) for num in (1, 3, 9, 17)] == [1, 4, 16, 24]
    assert make_core(Setup())._parts.without_drafts._costs.rows_run(1) == 4, "launched ones are filled up as ever"


@needs_triton
@pytest.mark.parametrize("splits", [None, 2])
@pytest.mark.parametrize("drafter", ["none", "model"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_greedy_text_over_our_kernels_is_that_of_the_naive_loop(architecture: str, drafter: str, splits: int | None) -> None:
    requests, want = asked_of(architecture)
    recorder = None if DEVICE.type == "cuda" else CallingRecorder()
    setup = Setup(
        architecture=architecture,
        drafter=drafter,
        policy=FixedLengthConfig(max=9),  # a window of more queries than a small tile holds
        num_blocks=60,
        max_step_tokens=24,
        device=str(DEVICE),
        dtype=torch.float32,
        attention=TritonAttention(splits, keys=16),
        recorder=recorder,
        max_sequences=3,
    )
    core = make_core(setup)
    assert len({own.window for own in buckets(core)}) == (2 if drafter == "model" else 1)
    at_start = recorder.num_repeated if recorder else 0
    outcome = drive(core, requests)
    assert outcome.tokens == want
    assert recorder is None or recorder.num_repeated - at_start > len(outcome.steps) / 2
