"""Linear layers compute what they replace; a row has the same bits whatever is beside it; the private operators do what we hold."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from engine.errors import ConfigError, UnsupportedModel
from engine.model import onednn
from engine.model.linear import AS_THEY_ARE, UNKNOWN, Inputs, Int8Linear, PackedLinear, choose, joined
from engine.model.stack import DecoderStack
from tests.tiny import ARCHITECTURES, target_model

CPU = torch.device("cpu")
ROWS = (1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 64, 100, 128, 257, 1000, 1024)

needs_packing = pytest.mark.skipif(bool(onednn.why_not_float(torch.float32)), reason=onednn.why_not_float(torch.float32))
needs_int8 = pytest.mark.skipif(bool(onednn.why_not_int8()), reason=onednn.why_not_int8())


def layer(num_in: int, num_out: int, bias: bool = False) -> nn.Linear:
    torch.manual_seed(num_in + num_out)
    return nn.Linear(num_in, num_out, bias=bias).requires_grad_(False)


def rows(num: int, width: int) -> Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(5))


# ---------------------------------------------------------------------- packed
@needs_packing
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1,), (3,), (1, 1), (1, 9), (2, 3)])
def test_a_packed_layer_is_the_layer(shape: tuple[int, ...], bias: bool) -> None:
    own = layer(48, 80, bias)
    x = rows(9, 48)[: torch.Size(shape).numel()].view(*shape, 48)
    torch.testing.assert_close(PackedLinear(own)(x), own(x), rtol=1e-5, atol=1e-6)


@needs_packing
@pytest.mark.parametrize("shape", [(576, 960), (1536, 576), (576, 3072), (24, 40), (64, 7)])
def test_packed_rows_have_the_same_bits_at_any_number_of_rows(shape: tuple[int, int]) -> None:
    packed, x = PackedLinear(layer(*shape)), rows(max(ROWS), shape[0])
    whole = packed(x)
    assert [num for num in ROWS if not torch.equal(packed(x[:num]), whole[:num])] == []


@needs_packing
@pytest.mark.parametrize("num_threads", [2, 3, 8])
@pytest.mark.parametrize("kind", [PackedLinear, pytest.param(Int8Linear, marks=needs_int8)])
def test_rows_have_the_same_bits_however_many_threads_share_the_work(kind: type[nn.Module], num_threads: int) -> None:
    """Other tests run on one. Few outputs of many inputs: threads that shared a sum would add in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        product, x = kind(layer(2048, 48)), rows(64, 2048)
        whole = product(x)
        assert [num for num in (1, 4, 5, 8, 17, 33) if not torch.equal(product(x[:num]), whole[:num])] == []
    finally:
        torch.set_num_threads(before)


@needs_packing
def test_what_is_packed_can_be_weighed() -> None:
    packed = PackedLinear(layer(48, 80, bias=True))
    assert sum(buffer.nbytes for buffer in packed.buffers()) == 4 * (48 * 80 + 80)


# ---------------------------------------------------------------------- 8 bits
@needs_int8
@pytest.mark.parametrize("bias", [False, True])
def test_an_8_bit_layer_is_exact_on_what_8_bits_can_say(bias: bool) -> None:
    """Weights and activations in whole steps, the largest step in each row: nothing is rounded."""
    own, random = layer(64, 32, bias), torch.Generator().manual_seed(1)
    own.weight.copy_(torch.randint(-127, 128, (32, 64), generator=random))
    own.weight[:, 0] = 127
    x = torch.randint(-127, 128, (6, 64), generator=random).float()
    x[:, 1] = -127
    torch.testing.assert_close(Int8Linear(own)(x), own(x), rtol=1e-6, atol=1e-2)


@needs_int8
def test_an_8_bit_layer_is_near_the_layer() -> None:
    own, x = layer(256, 128, bias=True), rows(20, 256)
    error = (Int8Linear(own)(x) - own(x)).norm() / own(x).norm()
    assert 0 < float(error) < 0.01


def error_of(quantised: Int8Linear, own: nn.Linear, x: Tensor) -> float:
    return float((quantised(x) - own(x)).norm() / own(x).norm())


@needs_int8
def test_an_input_that_is_always_large_is_shared_out() -> None:
    own, x = layer(256, 128, bias=True), rows(20, 256)
    x[:, 7] *= 300
    own.weight[:, 7] *= 0.01
    largest = Inputs(largest=x.abs().amax(0))
    assert error_of(Int8Linear(own), own, x) > 0.1
    assert error_of(Int8Linear(own, largest), own, x) < 0.02


@needs_int8
def test_what_rounding_leaves_over_counts() -> None:
    """Each row has an input that is far larger than its others, and not the same one."""
    own, x = layer(256, 128), rows(20, 256)
    x[torch.arange(20), torch.arange(20) * 11] *= 1000
    own.weight[:, torch.arange(20) * 11] *= 1e-3
    own.weight.copy_((own.weight / own.weight.abs().amax(-1, keepdim=True) * 127).round())  # 8 bits say these exactly
    coarse, fine = Int8Linear(own), Int8Linear(own, Inputs(has_heavy_tails=True))
    assert error_of(coarse, own, x) > 0.1
    assert error_of(fine, own, x) < error_of(coarse, own, x) / 50


@needs_int8
@pytest.mark.parametrize("inputs", [UNKNOWN, Inputs(torch.linspace(0, 9, 576), has_heavy_tails=True)], ids=["plain", "shared out, twice"])
def test_8_bit_rows_have_the_same_bits_beside_any_others(inputs: Inputs) -> None:
    quantised, x = Int8Linear(layer(576, 960), inputs), rows(max(ROWS), 576)
    whole = quantised(x)
    assert [num for num in ROWS if not torch.equal(quantised(x[:num]), whole[:num])] == []
    loud = torch.cat((x[:1], 1e6 * x[1:9]))
    assert torch.equal(quantised(loud)[0], whole[0])


@needs_int8
@pytest.mark.parametrize("inputs", [UNKNOWN, Inputs(torch.linspace(0, 9, 32), has_heavy_tails=True)], ids=["plain", "shared out, twice"])
def test_an_empty_row_is_zero(inputs: Inputs) -> None:
    assert torch.equal(Int8Linear(layer(32, 16), inputs)(torch.zeros(2, 32)), torch.zeros(2, 16))


@needs_int8
def test_an_input_that_was_not_seen_may_still_come() -> None:
    own, x = layer(256, 128), rows(20, 256)
    largest = x.abs().amax(0)
    largest[5] = 0
    assert error_of(Int8Linear(own, Inputs(largest, has_heavy_tails=True)), own, x) < 0.03


@needs_int8
def test_all_layers_of_a_model_are_shared_out_and_one_kind_runs_twice() -> None:
    stack = DecoderStack(copy.deepcopy(target_model()).float(), choose("int8", torch.float32, CPU))
    found = {name: module for name, module in stack._model.named_modules() if isinstance(module, Int8Linear)}
    assert {name.rpartition(".")[2] for name in found} == {"qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head"}
    assert all(module.shrink is not None for module in found.values())
    assert all(module.has_remainders == name.endswith("down_proj") for name, module in found.items())


# ---------------------------------------------------------------------- joined
def test_joined_layers_give_each_layers_outputs() -> None:
    layers, x = [layer(24, n, bias=True) for n in (16, 4, 4)], rows(3, 24)
    torch.testing.assert_close(joined(layers)(x), torch.cat([own(x) for own in layers], -1))


@pytest.mark.parametrize("other", [(12, False), (24, True)])
def test_what_does_not_read_the_same_cannot_be_joined(other: tuple[int, bool]) -> None:
    with pytest.raises(UnsupportedModel, match="whether they have a bias"):
        joined([layer(24, 8), layer(other[0], 8, other[1])])


# ---------------------------------------------------------------------- choosing
def test_the_choice_says_what_it_is_and_why_it_is_no_better() -> None:
    assert choose("none", torch.float64, CPU).note == "linear layers as they are (float64 products are not faster packed)"
    assert "not for cuda" in choose("none", torch.float32, torch.device("cuda")).note


@needs_packing
def test_float32_is_packed() -> None:
    assert isinstance(choose("none", torch.float32, CPU).make(layer(8, 8), UNKNOWN), PackedLinear)


@pytest.mark.parametrize(
    ("dtype", "device", "reason"),
    [(torch.bfloat16, "cpu", "dtype float32 beside them, not bfloat16"), (torch.float32, "cuda:99", "no such products")],
)
def test_8_bits_that_are_not_to_be_had_are_refused(dtype: torch.dtype, device: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"quantization: 'int8' - .*{reason}"):
        choose("int8", dtype, torch.device(device))


def test_a_library_that_computes_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "linear", lambda x, packed, bias: x @ torch.ones(8, 5))
    onednn.why_not_float.cache_clear()
    monkeypatch.setattr(onednn, "linear_int8", lambda *_: torch.full((2, 4), 32767.0))
    onednn.why_not_int8.cache_clear()
    try:
        assert onednn.why_not_float(torch.float32)
        with pytest.raises(ConfigError, match="quantization: 'int8' - "):
            choose("int8", torch.float32, CPU)
    finally:
        onednn.why_not_float.cache_clear()
        onednn.why_not_int8.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_torch_without_the_library_is_said_and_its_operators_are_not_asked(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on macOS, where there are none."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    onednn.why_not_float.cache_clear()
    onednn.why_not_int8.cache_clear()
    try:
        assert choose("none", dtype, CPU).note == "linear layers as they are (this torch was built without oneDNN)"
        with pytest.raises(ConfigError, match=r"built without oneDNN|beside them"):
            choose("int8", dtype, CPU)
    finally:
        onednn.why_not_float.cache_clear()
        onednn.why_not_int8.cache_clear()


# ---------------------------------------------------------------------- in a model
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_every_architecture_runs_on_every_kind(architecture: str, quantization: str) -> None:
    """The load check compares with the model's own forward; here, that replaced layers are all of the kind."""
    if quantization == "int8" and onednn.why_not_int8():
        pytest.skip(onednn.why_not_int8())
    model = copy.deepcopy(target_model(architecture=architecture)).float()
    kind = choose("int8" if quantization == "int8" else "none", torch.float32, CPU)
    DecoderStack(model, kind)
    linears = [module for module in model.modules() if type(module) is nn.Linear]
    assert bool(linears) == (kind.make is AS_THEY_ARE.make)
