"""Products whose weights are laid out once for oneDNN, the library behind torch's linear algebra on x86 CPUs.

torch lays a weight out anew in every call of `linear`; its compiler does it once, through the operators wrapped here. They are private,
have no public twin, and no other file names them. Whether they are there and do what is expected is found out by trying,
never from the processor's name: `why_not_*` says what is missing, and tests/model/test_linear.py pins the behaviour.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

_UINT8_ZERO = 128  # activations are unsigned with this zero: products of signed ones have no fast kernel here
REMAINDER_STEPS = 254  # of a remainder, within one step of what it remained of
_HALF_UP = torch.tensor(_UINT8_ZERO + 0.5)  # conversion to integers cuts off
_REMAINDER_ZERO = _HALF_UP - REMAINDER_STEPS / 2


# ---------------------------------------------------------------------- floating point
@cache
def why_not_float(dtype: torch.dtype) -> str:
    """Why weights of `dtype` cannot be packed on this CPU; empty where they can."""
    no_faster = f"{str(dtype).removeprefix('torch.')} products are not faster packed"
    if dtype not in (torch.float32, torch.bfloat16):
        return no_faster
    if reason := _why_no_library():  # before anything else is asked: without the library there is no operator to ask
        return reason
    weight, x = _sample((5, 8), dtype), _sample((3, 8), dtype)
    try:
        if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return no_faster
        got = linear(x, pack(weight), None)
    except (AttributeError, RuntimeError, TypeError) as error:  # another torch: other names, other arguments
        return f"this torch cannot pack weights ({error})"
    return "" if torch.allclose(got, x @ weight.T, rtol=1e-2) else "packed products are wrong here"


def pack(weight: Tensor) -> Tensor:
    """An opaque copy of `weight` [out, in]."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight.default(weight.contiguous())
    return packed


def linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., in] times the packed weight, plus bias [out]: [..., out]."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, packed, bias, "none", [], "")
    return y


# ---------------------------------------------------------------------- 8 bits
@cache
def why_not_int8() -> str:
    """Why 8-bit weights have no fast and exact product on this CPU; empty where they have."""
    if reason := _why_no_library():
        return reason
    weight = torch.full((4, 64), 127, dtype=torch.int8)
    weight[1] = -127
    x = torch.full((2, 64), 255, dtype=torch.uint8)  # the largest sums: processors without VNNI saturate on the way
    try:
        got = linear_int8(x, pack_int8(weight), torch.ones(4))
    except (AttributeError, RuntimeError, TypeError) as error:
        return f"this torch has no 8-bit products ({error})"
    return "" if torch.equal(got[0, :2], torch.tensor([1.0, -1.0]) * 127 * 127 * 64) else "8-bit products saturate on this processor"


def pack_int8(weight: Tensor) -> Tensor:
    """An opaque copy of `weight` [out, in] of int8."""
    packed: Tensor = torch.ops.onednn.qlinear_prepack.default(weight.contiguous(), None)
    return packed


def to_uint8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of x [..., in], float32, scaled by its largest magnitude to 127 steps either way of 128; and that magnitude [..., 1].

    A row by itself, so that what it becomes does not depend on its neighbours. A row of zeros becomes anything, and its magnitude is 0.
    """
    steps, largest = _steps(x)
    return steps.to(torch.uint8), largest


def to_uint8_twice(x: Tensor) -> tuple[Tensor, Tensor]:
    """`to_uint8` of x [..., in], and likewise around 128 what that leaves over, REMAINDER_STEPS to one step of the first: [2, ..., in].

    And the magnitudes [..., 1], which are those of the first.
    """
    steps, largest = _steps(x)
    rounded = steps.to(torch.uint8)
    # the fraction that was cut off lacks the half that was added: -0.5 to 0.5
    remainders = torch.add(_REMAINDER_ZERO, steps.frac_(), alpha=REMAINDER_STEPS).to(torch.uint8)
    return torch.stack((rounded, remainders)), largest


def _steps(x: Tensor) -> tuple[Tensor, Tensor]:
    """What `to_uint8` cuts off to integers, in fresh memory; and magnitudes."""
    largest = x.abs().amax(-1, keepdim=True)  # vector_norm(inf) and aminmax take 3 to 10 times as long
    return torch.addcdiv(_HALF_UP, x, largest, value=127), largest


def linear_int8(x: Tensor, packed: Tensor, scales: Tensor) -> Tensor:
    """(x - 128) [..., in] of uint8 times the packed int8 weight, times scales [out]: float32 [..., out].

    The sums are of integers, so the result is the same bits whatever else is in the batch.
    """
    zeros = _zeros(len(scales))
    y: Tensor = torch.ops.onednn.qlinear_pointwise.default(
        x, 1.0, _UINT8_ZERO, packed, scales, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return y


@cache
def _zeros(num: int) -> Tensor:
    return torch.zeros(num, dtype=torch.int32)


# ---------------------------------------------------------------------- both
def _why_no_library() -> str:
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return "this torch was built without oneDNN"
    capability = torch.backends.cpu.get_cpu_capability()
    return "" if capability.startswith("AVX") else f"packed products are for x86 CPUs with AVX2 or more, this one has {capability}"


def _sample(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    return torch.arange(shape[0] * shape[1], dtype=torch.float32).sin().reshape(shape).to(dtype)
