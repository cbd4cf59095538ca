"""Weights of 8 bits for GPUs. torch has the same operators for CPUs, on which quality and shapes are tested; a GPU runs all of it again."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from engine.errors import ConfigError, UnsupportedModel
from engine.model import eight_bits
from engine.model.eight_bits import Fp8Linear, WeightInt8Linear, why_not_fp8, why_not_int8
from engine.model.linear import UNKNOWN, LinearKind, choose
from engine.model.stack import DecoderStack
from tests.tiny import tiny_config

DEVICES = [
    "cpu",
    pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]),
]
on_every_device = pytest.mark.parametrize("device", DEVICES)
KINDS = (WeightInt8Linear, Fp8Linear)
LOSS = {WeightInt8Linear: 0.01, Fp8Linear: 0.05}  # of a product's length
BFLOAT16 = torch.bfloat16


def layer(inputs: int, outputs: int, device: str, bias: bool = False) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs, bias=bias, dtype=BFLOAT16, device=device).requires_grad_(False)


def loss(got: torch.Tensor, wanted: torch.Tensor) -> float:
    assert got.shape == wanted.shape
    assert got.dtype == wanted.dtype
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.fixture(autouse=True)
def _available() -> None:
    for why_not in (why_not_int8, why_not_fp8):
        if reason := why_not(BFLOAT16, torch.device("cpu")):
            pytest.skip(reason)


@on_every_device
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("num_rows", [1, 3, 16, 17, 200])
def test_products_are_nearly_those_of_the_layer(kind: type[nn.Module], num_rows: int, device: str) -> None:
    own = layer(256, 96, device, bias=True)
    x = torch.randn(1, num_rows, 256, dtype=BFLOAT16, device=device)
    assert 0 < loss(kind(own)(x), own(x)) < LOSS[kind]


@on_every_device
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_that_are_no_multiple_and_rows_of_nothing(kind: type[nn.Module], device: str) -> None:
    own = layer(64, 37, device)
    own.weight[5] = 0
    x = torch.randn(4, 64, dtype=BFLOAT16, device=device)
    x[2] = 0
    got = kind(own)(x)
    assert loss(got, own(x)) < LOSS[kind]
    assert not got[2].any()
    assert not got[:, 5].any()


@on_every_device
@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_outputs_have_scales_of_their_own(kind: type[nn.Module], device: str) -> None:
    """A large one beside it costs a small one nothing."""
    own = layer(64, 48, device)
    own.weight[::2] *= 1000
    x = torch.randn(4, 64, dtype=BFLOAT16, device=device)
    x[::2] *= 1000
    got, wanted = kind(own)(x), own(x)
    for rows in (slice(0, None, 2), slice(1, None, 2)):
        for outputs in (slice(0, None, 2), slice(1, None, 2)):
            assert loss(got[rows, outputs], wanted[rows, outputs]) < LOSS[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_weights_take_half_the_memory(kind: type[nn.Module]) -> None:
    own = layer(256, 512, "cpu")
    assert sum(buffer.nbytes for buffer in kind(own).buffers()) < 0.52 * own.weight.nbytes


def test_a_width_that_has_no_such_products_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="inputs are a multiple of 16, not 40"):
        Fp8Linear(layer(40, 16, "cpu"))


@on_every_device
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_runs_and_says_nearly_the_same(kind: type[nn.Module], device: str) -> None:
    """Loading compares it with its own forward, within what its kind may lose."""
    torch.manual_seed(0)
    config = tiny_config(hidden_size=128, intermediate_size=192, initializer_range=0.1, vocab=64)
    model = AutoModelForCausalLM.from_config(config).to(device, BFLOAT16).eval().requires_grad_(False)
    before = sum(weight.nbytes for weight in model.parameters())
    allowed = {WeightInt8Linear: 0.1, Fp8Linear: 0.3}[kind]
    stack = DecoderStack(model, LinearKind(lambda own, _: kind(own), allowed, "test"))
    assert stack.num_weight_bytes < 0.6 * before
    assert not [module for module in model.modules() if type(module) is nn.Linear]


# ---------------------------------------------------------------------- who gets them
def test_what_is_not_to_be_had_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda:99")
    with pytest.raises(ConfigError, match=r"quantization: 'fp8' - there is none for cpu so far; take none"):
        choose("fp8", BFLOAT16, cpu)
    with pytest.raises(ConfigError, match=r"'fp8' - .* needs dtype bfloat16 beside it, not float32"):
        choose("fp8", torch.float32, cuda)
    for quantization in ("int8", "fp8"):
        with pytest.raises(ConfigError, match=f"'{quantization}' - this device or this torch has no such products"):
            choose(quantization, BFLOAT16, cuda)


def test_a_device_that_has_them_gets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eight_bits, "_why_not", lambda *_: "")
    eight_bits.why_not_int8.cache_clear()
    eight_bits.why_not_fp8.cache_clear()
    cuda = torch.device("cuda:98")
    assert isinstance(choose("int8", BFLOAT16, cuda).make(layer(16, 16, "cpu"), UNKNOWN), WeightInt8Linear)
    assert isinstance(choose("fp8", BFLOAT16, cuda).make(layer(16, 16, "cpu"), UNKNOWN), Fp8Linear)
    eight_bits.why_not_int8.cache_clear()
    eight_bits.why_not_fp8.cache_clear()


@pytest.mark.parametrize(("name", "why_not"), [("_int8_product", why_not_int8), ("_fp8_product", why_not_fp8)])
def test_an_operator_that_computes_something_else_is_not_used(name: str, why_not: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eight_bits, name, lambda rows, *_: torch.ones(len(rows), 48, dtype=BFLOAT16))
    uncached = why_not.__wrapped__  # type: ignore[attr-defined]
    assert uncached(BFLOAT16, torch.device("cpu")) == "products of 8-bit numbers are wrong on this device"
