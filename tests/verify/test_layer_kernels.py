"""The matrix once more with our kernels between products, and those of attention beside them: float32, and the naive loop's text.

They run compiled where there is a CUDA device, else step by step where TRITON_INTERPRET=1 says so (CONTRIBUTING.md).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.errors import UnsupportedModel
from engine.model.attention import Segment
from engine.model.eight_bits import WeightInt8Linear
from engine.model.gather_attention import GATHER
from engine.model.layer_math import TORCH, LayerMath
from engine.model.linear import AS_THEY_ARE, LinearKind
from engine.model.paged import PagedModel
from engine.model.plain_layer import OwnLayer, PlainLayer
from engine.model.stack import DecoderStack
from engine.model.triton_attention import TritonAttention
from engine.model.triton_layer import TritonGating, TritonMath, TritonNorm, TritonRotation, choose_layer_math
from engine.transfer import to_device
from tests.tiny import ARCHITECTURES, VOCAB, drive, make_core, target_model, tiny_config
from tests.triton_device import DEVICE, NEEDS_TRITON, asked_of, tight

pytestmark = NEEDS_TRITON

SEGMENTS = [Segment([3, 5, 7], 0, 9), Segment([2, 9], 4, 1), Segment([1, 4], 2, 3)]


def math(say: Callable[[str], None] = pytest.fail) -> TritonMath:
    return TritonMath(DEVICE, say)


def logits(model: Any, math: LayerMath, kind: LinearKind = AS_THEY_ARE) -> Tensor:
    stack = DecoderStack(copy.deepcopy(model).to(DEVICE), kind, math=math)
    return PagedModel(stack, 16, 4).forward(SEGMENTS, to_device([5 * i % VOCAB for i in range(13)], DEVICE, torch.long), [8, 9, 12])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_norm_rotation_and_gate_is_ours(architecture: str) -> None:
    said: list[str] = []
    stack = DecoderStack(copy.deepcopy(target_model(torch.float32, architecture=architecture)).to(DEVICE), math=math(said.append))
    kind = OwnLayer if architecture == "gemma3_text" else PlainLayer
    assert {type(layer) for layer in stack._body.layers} == {kind}
    assert [note.split(":")[0] for note in said] == ["Layers keep their own forward, which sums and norms one after another"] * (
        kind is OwnLayer
    )
    norms, rotations, gates = (
        [module for module in stack._body.modules() if isinstance(module, its)] for its in (TritonNorm, TritonRotation, TritonGating)
    )
    a_layer = 4 if kind is OwnLayer else 2
    assert (len(norms), len(rotations), len(gates)) == (a_layer * stack.num_layers + 1, stack.num_layers, stack.num_layers)
    assert all((rotation.weights is not None) == (architecture in ("qwen3", "gemma3_text")) for rotation in rotations)
    assert not [module for module in stack._body.modules() if type(module).__name__.endswith("RMSNorm")]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_are_those_of_torchs_operations(architecture: str) -> None:
    model = target_model(torch.float32, architecture=architecture)
    torch.testing.assert_close(logits(model, math(list[str]().append)), logits(model, TORCH), rtol=1e-5, atol=1e-5)


def test_weights_of_eight_bits_run_behind_them() -> None:
    torch.manual_seed(0)
    config = tiny_config(hidden_size=128, intermediate_size=192, initializer_range=0.1)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval().requires_grad_(False)
    kind = LinearKind(lambda own, _: WeightInt8Linear(own), 0.1, "test")
    ours, theirs = (logits(model, by, kind).float() for by in (math(), TORCH))
    assert float((ours - theirs).norm() / theirs.norm()) < 0.03


@pytest.mark.parametrize("drafter", ["none", "model"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_text_is_that_of_the_naive_loop(architecture: str, drafter: str) -> None:
    requests, want = asked_of(architecture)
    attention = TritonAttention(2, keys=16) if architecture == "qwen3" else GATHER
    setup = replace(tight(architecture, drafter, requests), attention=attention, math=math(list[str]().append))
    outcome = drive(make_core(setup), requests)
    assert outcome.tokens == want
    assert sum(step.num_preemptions for step in outcome.steps) > 0


def test_kernels_that_are_wrong_are_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TritonRotation, "forward", lambda _, heads, rotary: heads)
    with pytest.raises(UnsupportedModel, match="two packed sequences get other logits"):
        logits(target_model(torch.float32), math())


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
def test_a_gpu_gets_them_unasked() -> None:
    said: list[str] = []
    assert isinstance(choose_layer_math(torch.bfloat16, DEVICE, said.append), TritonMath)
    assert said == ["Norms, rotation and gating by kernels of our own"]
    assert choose_layer_math(torch.float64, DEVICE, said.append) is TORCH
    assert "too little for float64" in said[1]


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_pass_is_launched_without_waiting_for_the_device(architecture: str) -> None:
    own = copy.deepcopy(target_model(torch.float32, architecture=architecture)).to(DEVICE)
    model = PagedModel(DecoderStack(own, choose_attention=lambda _: TritonAttention(), math=math(list[str]().append)), 16, 4)
    for mode in ("default", "error"):  # the first compiles and allocates
        torch.cuda.set_sync_debug_mode(mode)
        try:
            model.forward(SEGMENTS, to_device([1] * 13, DEVICE, torch.long), [8, 9, 12])
        finally:
            torch.cuda.set_sync_debug_mode("default")
