"""Kinds of linear layers: as the model has them, packed once for the CPU, or with 8-bit weights; and who gets which.

Each computes what the layer that it is made from computes, quantised ones nearly. Weights are held as buffers, so that a module's size
can be summed as for any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as ListLike
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.config import Quantization
from engine.errors import ConfigError, UnsupportedModel
from engine.model import eight_bits, onednn

# Below four rows the library takes other kernels: slower (1 row by a sixth, 2 by a third, measured on Zen 4), and one of them adds in
# another order. With zero rows beneath, a product has the same bits at any number of rows.
_MIN_ROWS = 4


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is known of a layer's inputs."""

    largest: Tensor | None = None  # [in] of each its largest magnitude over some text
    has_heavy_tails: bool = False  # a few of each row are far larger than the rest, and not the same ones in every row


UNKNOWN = Inputs()


class PackedLinear(nn.Module):
    """A linear layer whose weight was laid out once. The same bits for a row at any number of rows beside it."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.packed = nn.Buffer(onednn.pack(linear.weight.detach()), persistent=False)
        self.bias = None if linear.bias is None else nn.Buffer(linear.bias.detach(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out]."""
        num_rows = x.numel() // self.in_features
        if num_rows >= _MIN_ROWS:
            return onednn.linear(x, self.packed, self.bias)
        rows = nn.functional.pad(x.reshape(num_rows, self.in_features), (0, 0, 0, _MIN_ROWS - num_rows))
        return onednn.linear(rows, self.packed, self.bias)[:num_rows].view(*x.shape[:-1], self.out_features)


class Int8Linear(nn.Module):
    """Weights of 8 bits with a scale per output, activations of 8 bits with a scale per row, sums in 32-bit integers.

    Some inputs of a layer are many times larger than others, in every row, and would leave these a handful of steps. So each input j is
    divided by s_j and its weights multiplied by it, s_j = sqrt(max |x_j| / max |w_j|), which shares the range out evenly between both
    sides (SmoothQuant, Xiao et al. 2022, equation 4 with alpha 0.5). Where they differ from row to row, what rounding leaves of a row is
    rounded in its turn and runs as a second row: activations of nearly 16 bits, for weights that are read once.

    The same bits for a row at any number of rows beside it.
    """

    def __init__(self, linear: nn.Linear, inputs: Inputs = UNKNOWN):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight, shrink = linear.weight.detach().float(), None
        if inputs.largest is not None:
            shares = (_no_less(inputs.largest.float()) / _no_less(weight.abs().amax(0))).sqrt()  # [in]
            weight, shrink = weight * shares, nn.Buffer(1 / shares, persistent=False)
        steps = weight.abs().amax(-1).clamp_min(torch.finfo(torch.float32).tiny) / 127  # [out]
        self.packed = nn.Buffer(onednn.pack_int8((weight / steps.unsqueeze(-1)).round().to(torch.int8)), persistent=False)
        self.scales = nn.Buffer(steps / 127, persistent=False)  # of weight and activation together
        self.bias = None if linear.bias is None else nn.Buffer(linear.bias.detach(), persistent=False)
        self.shrink = shrink
        self.has_remainders = inputs.has_heavy_tails

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] to [..., out]."""
        if self.shrink is not None:
            x = x * self.shrink
        if self.has_remainders:
            quantised, largest = onednn.to_uint8_twice(x)
            rounded, remainders = onednn.linear_int8(quantised, self.packed, self.scales)
            y: Tensor = rounded.add_(remainders, alpha=1 / onednn.REMAINDER_STEPS).mul_(largest)
        else:
            quantised, largest = onednn.to_uint8(x)
            y = onednn.linear_int8(quantised, self.packed, self.scales).mul_(largest)
        return y if self.bias is None else y + self.bias


def _no_less(largest: Tensor) -> Tensor:
    """[in], none far below the mean: an input that was hardly seen may still come, and one that is hardly read is not to be blown up."""
    return largest.clamp_min(max(float(largest.mean()) / 20, torch.finfo(torch.float32).tiny))


def joined(linears: ListLike[nn.Linear]) -> nn.Linear:
    """One layer whose outputs are those of all, one after another. Raises UnsupportedModel where inputs or biases differ in kind."""
    if len({(linear.in_features, linear.weight.dtype, linear.bias is None) for linear in linears}) != 1:
        raise UnsupportedModel("Layers that read the same input differ in its width, their dtype or whether they have a bias.")
    with torch.device("meta"):
        joint = nn.Linear(linears[0].in_features, sum(linear.out_features for linear in linears), bias=linears[0].bias is not None)
    joint.weight = nn.Parameter(torch.cat([linear.weight for linear in linears]), requires_grad=False)
    if joint.bias is not None:
        joint.bias = nn.Parameter(torch.cat([linear.bias for linear in linears]), requires_grad=False)
    return joint


def joined_inputs(linear: nn.Linear, other: nn.Linear) -> nn.Linear:
    """One layer that reads the inputs of both, one behind the other, and gives the sum of their outputs. The bias is that of the first."""
    with torch.device("meta"):
        joint = nn.Linear(linear.in_features + other.in_features, linear.out_features, bias=linear.bias is not None)
    joint.weight = nn.Parameter(torch.cat((linear.weight, other.weight), -1).detach(), requires_grad=False)
    if joint.bias is not None:
        joint.bias = nn.Parameter(linear.bias.detach(), requires_grad=False)
    return joint


def some_outputs(linear: nn.Linear, outputs: Tensor) -> nn.Linear:
    """A layer of the `outputs` [N] of another one, in their order."""
    with torch.device("meta"):
        part = nn.Linear(linear.in_features, len(outputs), bias=linear.bias is not None)
    part.weight = nn.Parameter(linear.weight[outputs], requires_grad=False)
    if part.bias is not None:
        part.bias = nn.Parameter(linear.bias[outputs], requires_grad=False)
    return part


@dataclass(frozen=True, slots=True)
class LinearKind:
    """What a model's linear layers are replaced by."""

    make: Callable[[nn.Linear, Inputs], nn.Module]
    rounding: float  # how far logits may be off for it, relative to the largest; beside what the dtype allows
    note: str  # for the log
    reads_inputs: bool = False  # whether `make` makes use of `Inputs.largest`


AS_THEY_ARE = LinearKind(lambda linear, _: linear, 0.0, "linear layers as they are")


def choose(quantization: Quantization, dtype: torch.dtype, device: torch.device) -> LinearKind:
    """The fastest that computes what is asked for. Raises ConfigError where the quantisation is not to be had."""
    if quantization != "none":
        kind = _QUANTISED.get((quantization, device.type))
        reason = kind.why_not(dtype, device) if kind else f"there is none for {device.type} so far"
        if kind is None or reason:
            raise ConfigError(f"quantization: {quantization!r} - {reason}; take none.")
        return kind.kind
    reason = f"packing is for CPUs, not for {device.type}" if device.type != "cpu" else onednn.why_not_float(dtype)
    if reason:
        return LinearKind(AS_THEY_ARE.make, AS_THEY_ARE.rounding, f"{AS_THEY_ARE.note} ({reason})")
    return LinearKind(lambda linear, _: PackedLinear(linear), 0.0, "linear layers packed for this CPU")


def _why_not_int8_on_a_cpu(dtype: torch.dtype, device: torch.device) -> str:
    if dtype is not torch.float32:
        return f"8-bit weights need dtype float32 beside them, not {str(dtype).removeprefix('torch.')}"
    return onednn.why_not_int8()


@dataclass(frozen=True, slots=True)
class _Quantised:
    """Linear layers with fewer bits, and who cannot have them."""

    kind: LinearKind
    why_not: Callable[[torch.dtype, torch.device], str]


_QUANTISED: Mapping[tuple[str, str], _Quantised] = {
    ("int8", "cpu"): _Quantised(LinearKind(Int8Linear, 0.2, "linear layers with 8-bit weights", reads_inputs=True), _why_not_int8_on_a_cpu),
    ("int8", "cuda"): _Quantised(
        LinearKind(lambda linear, _: eight_bits.WeightInt8Linear(linear), 0.1, "linear layers with 8-bit weights"), eight_bits.why_not_int8
    ),
    ("fp8", "cuda"): _Quantised(
        LinearKind(lambda linear, _: eight_bits.Fp8Linear(linear), 0.3, "linear layers in 8-bit floating point"), eight_bits.why_not_fp8
    ),
}
