"""Our kernels between products compute what float64 says, to the rounding of torch's own operations, and a row the same in any batch.

They run compiled where there is a CUDA device, else step by step where TRITON_INTERPRET=1 says so (CONTRIBUTING.md).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from engine.model import triton_layer
from engine.model.layer_math import TORCH, RotatedHeads
from engine.model.triton_layer import (
    TritonGating,
    TritonMath,
    TritonNorm,
    TritonRotation,
    choose_layer_math,
    triton_gating,
    triton_norm,
    why_not,
)
from tests.triton_device import DEVICE, IS_INTERPRETED, NEEDS_TRITON

pytestmark = NEEDS_TRITON

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
NORMS = {"llama": LlamaRMSNorm, "gemma": Gemma3RMSNorm, "torch": nn.RMSNorm}


@pytest.fixture(autouse=IS_INTERPRETED)
def interpreter_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9's interpreter cuts float32 off where it becomes bfloat16; GPUs round."""
    from triton.runtime import interpreter

    own = interpreter._convert_float

    def convert(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if (str(source), str(target)) == ("fp32", "bf16"):
            return torch.from_numpy(values.astype("float32")).to(torch.bfloat16).view(torch.uint16).numpy()
        return own(values, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", convert)


def numbers(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def strided(rows: Tensor, more: int = 3) -> Tensor:
    """The same rows, further apart than they are long."""
    return torch.cat((rows, rows[:, :more]), 1)[:, : rows.shape[1]]


def require_near(got: Tensor, exact: Tensor, roundings: float) -> None:
    """`exact` is float64; `roundings` is how many units of got's dtype it may be off, of its own size or of one's."""
    unit = torch.finfo(got.dtype).eps * roundings * (8 if got.dtype is torch.float32 else 1)
    distance = (got.double() - exact).abs() / (1e-3 + exact.abs())
    assert float(distance.max()) <= unit


def norm_of(kind: str, width: int, dtype: torch.dtype) -> nn.Module:
    norm: nn.Module = NORMS[kind](width, eps=1e-5)
    weight = numbers(width, seed=2) + (kind != "gemma")
    norm.load_state_dict({"weight": weight})
    return norm.to(DEVICE, dtype).requires_grad_(False)


def ours(norm: nn.Module) -> TritonNorm:
    found = triton_norm(norm)
    assert found is not None
    return found


# ---------------------------------------------------------------------- residual sum and norm
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 577, 4096])
@pytest.mark.parametrize("kind", NORMS)
@torch.inference_mode()
def test_a_norm_is_the_models_own_behind_a_sum(kind: str, width: int, dtype: torch.dtype) -> None:
    own = norm_of(kind, width, dtype)
    norm = ours(own)
    for rows in (1, 3, 8):
        h, delta = numbers(rows, width, seed=3, dtype=dtype), strided(2 * numbers(rows, width, seed=4, dtype=dtype))
        total = h + delta
        got = norm(h, delta)
        assert torch.equal(h, total), "the sum has torch's bits"
        assert got.dtype is dtype
        assert got.is_contiguous()
        own_in_64 = type(own)(width, eps=1e-5).to(DEVICE, torch.float64)
        own_in_64.load_state_dict(own.state_dict())
        if kind != "gemma":  # which computes in float32 whatever it gets
            require_near(got, own_in_64(total.double()), 1.5)
        require_near(got, own(total).double(), 1.5 if dtype is not torch.float32 else 2)
        assert torch.equal(norm(total), got), "and without a sum it is the same"


@pytest.mark.parametrize(("kind", "dtype"), [("llama", torch.float16), ("llama", torch.bfloat16), ("gemma", torch.bfloat16)])
@torch.inference_mode()
def test_a_norm_rounds_where_the_models_own_does(kind: str, dtype: torch.dtype) -> None:
    own = norm_of(kind, 256, dtype)
    x = numbers(64, 256, seed=5, dtype=dtype)
    assert float((ours(own)(x) == own(x)).double().mean()) > 0.999, "all but where the order of a sum tips a rounding"


@torch.inference_mode()
def test_a_norm_of_states_of_any_shape() -> None:
    own = norm_of("llama", 24, torch.float32)
    x = numbers(2, 3, 24)
    require_near(ours(own)(x), own(x).double(), 2)
    require_near(ours(own)(x.transpose(0, 1)), own(x.transpose(0, 1)).double(), 2)


class _Centred(nn.Module):
    """A norm of another kind with the same attributes."""

    variance_epsilon = 1e-5

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (64,), self.weight)


@pytest.mark.parametrize("own", [_Centred(), nn.LayerNorm(64), nn.Identity(), nn.RMSNorm(64, eps=1e-5).double()])
def test_another_norm_is_left_to_torch_and_it_is_said(own: nn.Module) -> None:
    said: list[str] = []
    math = TritonMath(DEVICE, said.append)
    own = own.to(DEVICE).requires_grad_(False)
    for _ in range(2):
        assert type(math.norm(own)) is type(TORCH.norm(own))
    assert said == [f"{type(own).__name__} is none of the norms that our kernels compute: it stays with torch's operations"]


@torch.inference_mode()
def test_an_epsilon_that_is_not_the_one_it_says_shows() -> None:
    own = norm_of("llama", 64, torch.bfloat16)
    own.forward = lambda x: LlamaRMSNorm.forward(own, 2 * x)  # root of mean square forgets a factor, epsilon does not
    assert triton_norm(own) is None


# ---------------------------------------------------------------------- rotation
def tables(rows: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    angles = torch.arange(rows, device=DEVICE).unsqueeze(1) * 100.0 ** -torch.linspace(0, 1, head_dim // 2, device=DEVICE)
    both = torch.cat((angles, angles), -1).unsqueeze(0)
    return both.cos().to(dtype), both.sin().to(dtype)


def rotated_by_transformers(heads: Tensor, of: RotatedHeads, cosines: Tensor, sines: Tensor) -> Tensor:
    """In float64 but for norms that compute in float32."""
    queries, keys, values = heads.split((of.num_queries, of.num_keys, of.num_keys), 1)
    if of.q_norm is not None and of.k_norm is not None:
        queries, keys = of.q_norm(queries), of.k_norm(keys)
    turned = apply_rotary_pos_emb(queries.double()[None], keys.double()[None], cosines.double(), sines.double(), unsqueeze_dim=2)
    return torch.cat((turned[0][0], turned[1][0], values.double()), 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [None, "llama", "gemma"])
@pytest.mark.parametrize(("num_queries", "num_keys", "head_dim"), [(3, 1, 6), (9, 3, 64), (5, 2, 80), (16, 8, 128)])
@torch.inference_mode()
def test_queries_and_keys_are_normed_and_rotated_in_place(
    num_queries: int, num_keys: int, head_dim: int, kind: str | None, dtype: torch.dtype
) -> None:
    norms = () if kind is None else (norm_of(kind, head_dim, dtype), norm_of(kind, head_dim, dtype))
    for norm in norms[1:]:
        norm.get_parameter("weight").mul_(-0.7)
    of = RotatedHeads(num_queries, num_keys, head_dim, *norms)
    rotation = TritonMath(DEVICE, pytest.fail).rotation(of)
    assert isinstance(rotation, TritonRotation)
    cosines, sines = tables(7, head_dim, dtype)
    own = numbers(7, (num_queries + 2 * num_keys) * head_dim, dtype=dtype)
    exact = rotated_by_transformers(own.view(7, -1, head_dim), of, cosines, sines)
    for joint in (own.clone(), strided(own, 8)):
        heads = joint.view(7, -1, head_dim)
        got = rotation(heads, TritonMath(DEVICE, pytest.fail).tables(cosines, sines))
        assert got.data_ptr() == heads.data_ptr()
        assert torch.equal(got[:, num_queries + num_keys :], own.view(7, -1, head_dim)[:, num_queries + num_keys :]), "values stay"
        unit = torch.finfo(dtype).eps * (8 if dtype is torch.float32 else 1.5)
        assert float(((got.double() - exact).abs() / (1 + exact.abs())).max()) <= unit
        torch_way = TORCH.rotation(of)(own.view(7, -1, head_dim).clone(), TORCH.tables(cosines, sines))
        if dtype is not torch.float32:
            assert float((got == torch_way).double().mean()) > 0.99, "nearly all bits are those of torch's operations"


def test_norms_of_heads_that_are_not_ours_stay_beside_a_rotation_that_is() -> None:
    said: list[str] = []
    of = RotatedHeads(2, 1, 64, _Centred().to(DEVICE), _Centred().to(DEVICE))
    cosines, sines = tables(3, 64, torch.float32)
    heads = numbers(3, 4, 64)
    math = TritonMath(DEVICE, said.append)
    with torch.inference_mode():
        got = math.rotation(of)(heads.clone(), math.tables(cosines, sines))
        torch.testing.assert_close(got, TORCH.rotation(of)(heads, TORCH.tables(cosines, sines)))
    assert [note.split(" ")[0] for note in said] == ["_Centred", "Norms"]


def test_norms_of_two_kinds_stay_in_front_of_the_rotation() -> None:
    said: list[str] = []
    of = RotatedHeads(2, 1, 64, norm_of("llama", 64, torch.float32), norm_of("gemma", 64, torch.float32))
    cosines, sines = tables(3, 64, torch.float32)
    heads, math = numbers(3, 4, 64), TritonMath(DEVICE, said.append)
    with torch.inference_mode():
        got = math.rotation(of)(heads.clone(), math.tables(cosines, sines))
        torch.testing.assert_close(got, TORCH.rotation(of)(heads, TORCH.tables(cosines, sines)))
    assert [note.split(" ")[0] for note in said] == ["Norms"]


# ---------------------------------------------------------------------- gating
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act_fn", [nn.SiLU(), nn.GELU(approximate="tanh")], ids=["silu", "gelu"])
@pytest.mark.parametrize("width", [1, 49, 1536, 2050])
@torch.inference_mode()
def test_gating_is_the_activations_own(width: int, act_fn: nn.Module, dtype: torch.dtype) -> None:
    gating = TritonMath(DEVICE, pytest.fail).gating(act_fn)
    assert isinstance(gating, TritonGating)
    for rows in (1, 5):
        joint = 3 * numbers(rows, 2 * width, dtype=dtype)
        gate, up = joint.double().chunk(2, -1)
        exact = act_fn(gate) * up
        for own in (joint, strided(joint), joint.unsqueeze(0)):
            got = gating(own)
            assert got.shape == (*own.shape[:-1], width)
            require_near(got.view(rows, width), exact, 1.5)


def test_a_gate_far_from_zero_is_shut_or_open() -> None:
    gate = torch.tensor([[-1e4, -200.0, 200.0, 1e4]], device=DEVICE)
    for is_gelu in (False, True):
        got = TritonGating(is_gelu)(torch.cat((gate, torch.full_like(gate, 2.0)), -1))
        assert got.tolist() == [[0.0, 0.0, 400.0, 2e4]]


@pytest.mark.parametrize("act_fn", [nn.GELU(), nn.ReLU(), nn.Identity(), nn.Sigmoid()])
def test_another_activation_is_left_to_torch_and_it_is_said(act_fn: nn.Module) -> None:
    said: list[str] = []
    assert type(TritonMath(DEVICE, said.append).gating(act_fn)) is type(TORCH.gating(act_fn))
    assert said == [f"{type(act_fn).__name__} is none of the activations that our kernels compute: it stays with torch's operations"]
    assert triton_gating(act_fn, DEVICE) is None


# ---------------------------------------------------------------------- all of them
@pytest.mark.parametrize("rows", [2, 31, 130])
@torch.inference_mode()
def test_a_row_has_the_same_bits_in_any_batch(rows: int) -> None:
    dtype, math = torch.bfloat16, TritonMath(DEVICE, pytest.fail)
    norm, gating = math.norm(norm_of("llama", 577, dtype)), math.gating(nn.SiLU())
    rotation = math.rotation(RotatedHeads(3, 1, 16, norm_of("llama", 16, dtype), norm_of("llama", 16, dtype)))
    h, delta, joint, heads = (numbers(rows, *shape, seed=seed, dtype=dtype) for seed, shape in enumerate(((577,), (577,), (98,), (5, 16))))
    rotary = math.tables(*tables(rows, 16, dtype))

    def computed(part: slice) -> list[Tensor]:
        own = h[part].clone()
        turned = rotation(heads[part].clone(), (rotary[0][part], rotary[1][part]))
        return [norm(own, delta[part].clone()), own, gating(joint[part].clone()), turned]

    whole = computed(slice(None))
    for row in (0, rows // 2, rows - 1):
        alone = computed(slice(row, row + 1))
        assert all(torch.equal(one[0], of_all[row]) for one, of_all in zip(alone, whole, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_they_pass_their_own_trial(dtype: torch.dtype) -> None:
    assert why_not(dtype, DEVICE) is None


def test_float64_is_left_to_torch() -> None:
    assert why_not(torch.float64, DEVICE) == "our kernels compute in float32, which is too little for float64"


def test_a_cpu_has_torchs_operations_and_it_goes_unsaid() -> None:
    assert choose_layer_math(torch.float32, torch.device("cpu"), pytest.fail) is TORCH


def test_a_device_without_them_has_torchs_operations_and_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(triton_layer, "find_spec", lambda _: None)
    assert choose_layer_math(torch.float32, torch.device("cuda"), said.append) is TORCH
    assert said == [
        "Norms, rotation and gating by torch's operations, one after another: "
        "Triton is not installed here; torch's builds for CUDA bring it"
    ]


def test_kernels_that_fail_or_are_wrong_are_not_served(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise OSError("no compiler\nhere")

    monkeypatch.setattr(TritonGating, "forward", lambda _, joint: joint[..., : joint.shape[-1] // 2])
    assert why_not(torch.float32, DEVICE) == "our kernels are wrong here"
    monkeypatch.setattr(TritonGating, "forward", fail)
    assert why_not(torch.float32, DEVICE) == "our kernels fail here (OSError: no compiler)"


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device")
@torch.inference_mode()
def test_what_a_graph_recorded_of_them_it_computes_again() -> None:
    dtype, math = torch.bfloat16, TritonMath(DEVICE, pytest.fail)
    norm, gating = math.norm(norm_of("llama", 576, dtype)), math.gating(nn.SiLU())
    rotation = math.rotation(RotatedHeads(3, 1, 16, norm_of("llama", 16, dtype), norm_of("llama", 16, dtype)))
    rotary = math.tables(*tables(4, 16, dtype))

    def inputs(seed: int) -> list[Tensor]:
        return [numbers(4, *shape, seed=seed, dtype=dtype) for shape in ((576,), (576,), (96,), (5, 16))]

    def computed(h: Tensor, delta: Tensor, joint: Tensor, heads: Tensor) -> list[Tensor]:
        return [norm(h, delta), gating(joint), rotation(heads, rotary)]

    computed(*inputs(1))  # compiles
    recorded, graph = inputs(2), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = computed(*recorded)
    for place, new in zip(recorded, inputs(3), strict=True):
        place.copy_(new)
    graph.replay()
    for got, want in zip(found, computed(*inputs(3)), strict=True):
        assert torch.equal(got, want)
