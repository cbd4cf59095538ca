"""Linear layers with weights of 8 bits for GPUs, by torch's own operators. Half the memory of bfloat16; how much time is saved, a run says.

int8    weights alone: integers with a scale per output. A few rows go through one operator that reads the integers; more are multiplied
        by a copy in the dtype of the activations, made for the call.
fp8     weights and activations, e4m3 with a scale per row of either, in the tensor cores that have such numbers (Micikevicius et al.,
        "FP8 Formats for Deep Learning", 2022).

torchao, the library for this, calls the very same products where nothing is compiled (0.18: `torch.mm` with a copy, `torch._scaled_mm`),
so it would bring nothing but itself. The operators are private. Whether a device has them and they are right is found out by trying.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn

from engine.errors import UnsupportedModel

_FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FP8).max
_LEAST = torch.finfo(torch.float32).tiny  # no scale is zero
_FEW_ROWS = 16  # beyond, reading the integers again for every row costs more than a copy
_MULTIPLE = 16  # inputs and outputs of a product of e4m3 numbers


class WeightInt8Linear(nn.Module):
    """Weights of 8 bits, activations as they are."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.out_features = linear.out_features
        weight = linear.weight.detach()
        scales = _largest(weight) / 127
        self.weight = nn.Buffer((weight / scales).round().to(torch.int8), persistent=False)
        self.scales = nn.Buffer(scales.squeeze(-1).to(weight.dtype), persistent=False)
        self.bias = None if linear.bias is None else nn.Buffer(linear.bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out]."""
        rows = x.reshape(-1, x.shape[-1])
        product = _int8_product if len(rows) <= _FEW_ROWS else _product_of_a_copy
        return _finished(product(rows, self.weight, self.scales), self.bias, x, self.out_features)


class Fp8Linear(nn.Module):
    """Weights and activations of 8 bits, sums in float32."""

    def __init__(self, linear: nn.Linear):
        """Raises UnsupportedModel for a width that such products do not have."""
        super().__init__()
        if linear.in_features % _MULTIPLE:
            raise UnsupportedModel(
                f"quantization: 'fp8' needs layers whose inputs are a multiple of {_MULTIPLE}, not {linear.in_features}."
            )
        self.out_features = linear.out_features
        filling = -linear.out_features % _MULTIPLE
        weight, scales = _to_fp8(nn.functional.pad(linear.weight.detach(), (0, 0, 0, filling)))
        self.weight = nn.Buffer(weight, persistent=False)
        self.scales = nn.Buffer(scales.T.contiguous(), persistent=False)  # [1, out]
        self.bias = None if linear.bias is None else nn.Buffer(linear.bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out]."""
        rows, scales = _to_fp8(x.reshape(-1, x.shape[-1]))
        return _finished(_fp8_product(rows, scales, self.weight, self.scales), self.bias, x, self.out_features)


def _finished(y: Tensor, bias: Tensor | None, x: Tensor, out_features: int) -> Tensor:
    """y [rows, out and more] as what is wanted for x [..., in]."""
    y = y[:, :out_features].to(x.dtype)
    return (y if bias is None else y + bias).reshape(*x.shape[:-1], out_features)


# ---------------------------------------------------------------------- products
def _largest(rows: Tensor) -> Tensor:
    """Of each row, as float32 [rows, 1]."""
    return rows.abs().amax(-1, keepdim=True).float().clamp_min(_LEAST)


def _to_fp8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [N, in] as e4m3, the largest of each as the largest that there is; and what that takes away again [N, 1]."""
    scales = _largest(rows) / _LARGEST
    return (rows / scales).clamp(-_LARGEST, _LARGEST).to(_FP8), scales


def _int8_product(rows: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    y: Tensor = torch._weight_int8pack_mm(rows, weight, scales)
    return y


def _product_of_a_copy(rows: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    return rows @ (weight * scales.unsqueeze(-1)).T


def _fp8_product(rows: Tensor, row_scales: Tensor, weight: Tensor, scales: Tensor) -> Tensor:
    y: Tensor = torch._scaled_mm(rows, weight.T, scale_a=row_scales, scale_b=scales, out_dtype=torch.bfloat16)
    return y


# ---------------------------------------------------------------------- whether there are such products
@cache
def why_not_int8(dtype: torch.dtype, device: torch.device) -> str:
    """Why weights of 8 bits cannot be multiplied here; empty where they can."""
    return _why_not(WeightInt8Linear, dtype, device)


@cache
def why_not_fp8(dtype: torch.dtype, device: torch.device) -> str:
    """Why e4m3 numbers cannot be multiplied here; empty where they can."""
    if dtype is not torch.bfloat16:
        return f"8-bit floating point needs dtype bfloat16 beside it, not {str(dtype).removeprefix('torch.')}"
    return _why_not(Fp8Linear, dtype, device)


@torch.inference_mode()
def _why_not(kind: type[WeightInt8Linear] | type[Fp8Linear], dtype: torch.dtype, device: torch.device) -> str:
    try:
        linear = nn.Linear(64, 48, bias=False, dtype=dtype, device=device).requires_grad_(False)
        linear.weight.copy_(torch.arange(48 * 64, device=device).sin().view(48, 64))
        quantised = kind(linear)
        for num_rows in (1, 2 * _FEW_ROWS):
            x = torch.arange(64 * num_rows, device=device).cos().view(num_rows, 64).to(dtype)
            got, wanted = quantised(x).float(), linear(x).float()
            if not (got - wanted).norm() < 0.1 * wanted.norm():
                return "products of 8-bit numbers are wrong on this device"
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:  # another torch, or none for this device
        return f"this device or this torch has no such products ({str(error).strip().splitlines()[0]})"
    return ""
