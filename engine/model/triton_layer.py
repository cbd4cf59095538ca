"""The mathematics of a layer by our own Triton kernels: residual sum and norm in one, norms of heads and rotation in one, gating in one.

Which of its forms a norm or an activation has is found out by trying them against the model's own module, and what is none of them stays
with torch's operations, which is said. Refused altogether are float64, which sums in float32 would spoil, and where kernels do not run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from engine.model.layer_math import TORCH, LayerMath, Rotary, RotatedHeads, weight_and_epsilon
from engine.model.ragged import power_of_two

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MOST_WIDTH = 1 << 15  # of a norm: its program holds the row
_HALVES = 256  # numbers of the first halves of the heads that a program rotates: whole vectors for each thread of a warp, and shared sines
_COLUMNS = 1024  # of a row that one program gates
_NUMBERS_A_WARP = 512  # few, so that one row of a decoding batch is a matter of microseconds
_SCALES = (1e-3, 0.3, 3.0, 30.0)  # of trial rows; in the first one a norm's epsilon counts


@dataclass(frozen=True, slots=True)
class NormForm:
    """How a norm of root mean squares treats its weights."""

    offset: float  # added to them
    rounds_first: bool  # what is normed is rounded before it is multiplied by them, and then once more


_FORMS = (NormForm(0.0, True), NormForm(0.0, False), NormForm(1.0, False))


class TritonNorm(nn.Module):
    """Residual sum and norm."""

    def __init__(self, weight: Tensor, epsilon: float, form: NormForm):
        super().__init__()
        self.weight = nn.Buffer(weight, persistent=False)
        self.form, self.epsilon = form, epsilon
        block = power_of_two(len(weight))
        self._constants = {**_constants(form, epsilon), "WIDTH": len(weight), "BLOCK": block, "num_warps": _num_warps(block)}

    def forward(self, x: Tensor, delta: Tensor | None = None) -> Tensor:
        """x [..., hidden] to [..., hidden]; delta is added to x, which has to be contiguous then."""
        if x.ndim != 2:
            return self(x.reshape(-1, x.shape[-1]), delta).view(x.shape)  # type: ignore[no-any-return]  # modules are untyped
        output = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        other = x if delta is None else delta
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]  # Triton launches on the current device
            _kernels().add_norm[len(x),](
                x,
                other,
                self.weight,
                output,
                X_STRIDE=x.stride(0),
                DELTA_STRIDE=other.stride(0),
                HAS_DELTA=delta is not None,
                **self._constants,
            )
        return output


class TritonRotation(nn.Module):
    """Norms of heads, where there are, and rotation."""

    def __init__(self, of: RotatedHeads, norms: tuple[TritonNorm, TritonNorm] | None):
        super().__init__()
        num_heads, half = of.num_queries + of.num_keys, of.head_dim // 2
        self.weights = nn.Buffer(torch.stack([norm.weight for norm in norms]), persistent=False) if norms else None
        block = power_of_two(half)
        heads = max(1, _HALVES // block)
        self._blocks = -(-num_heads // heads)
        self._constants = {
            **_constants(*((norms[0].form, norms[0].epsilon) if norms else (_FORMS[0], 0.0))),
            "NUM_QUERIES": of.num_queries,
            "NUM_HEADS": num_heads,
            "HALF": half,
            "HAS_NORM": norms is not None,
            "BLOCK_H": heads,
            "BLOCK_D": block,
            "num_warps": _num_warps(2 * heads * block),
        }

    def forward(self, heads: Tensor, rotary: Rotary) -> Tensor:
        """Heads [N, H, head_dim], a row's numbers one after another; the same ones."""
        cosines, sines = rotary
        with torch.cuda.device_of(heads):  # type: ignore[no-untyped-call]  # Triton launches on the current device
            _kernels().rotate[len(heads), self._blocks](
                heads,
                heads if self.weights is None else self.weights,
                cosines,
                sines,
                ROW_STRIDE=heads.stride(0),
                TABLE_STRIDE=cosines.stride(0),
                **self._constants,
            )
        return heads


class TritonGating(nn.Module):
    """act(gate) * up."""

    def __init__(self, is_gelu: bool):
        super().__init__()
        self.is_gelu = is_gelu

    def forward(self, joint: Tensor) -> Tensor:
        """Joint [..., 2 * width], its rows at the same distance from each other, to [..., width]."""
        width = joint.shape[-1] // 2
        output = torch.empty((*joint.shape[:-1], width), dtype=joint.dtype, device=joint.device)
        grid = (output.numel() // width, -(-width // _COLUMNS))
        with torch.cuda.device_of(joint):  # type: ignore[no-untyped-call]  # Triton launches on the current device
            _kernels().gate_up[grid](
                joint,
                output,
                STRIDE=joint.stride(-2),
                WIDTH=width,
                IS_GELU=self.is_gelu,
                BLOCK=_COLUMNS,
                num_warps=_num_warps(_COLUMNS),
            )
        return output


class _NormedRotation(nn.Module):
    """Norms that are not ours, and rotation that is."""

    def __init__(self, of: RotatedHeads, norms: tuple[nn.Module, nn.Module]):
        super().__init__()
        self._of = of
        self.norms = nn.ModuleList(norms)
        self.rotation = TritonRotation(of, None)

    def forward(self, heads: Tensor, rotary: Rotary) -> Tensor:
        queries, keys, values = self._of.parts(heads)
        heads = torch.cat((self.norms[0](queries), self.norms[1](keys), values), 1)
        rotated: Tensor = self.rotation(heads, rotary)
        return rotated


class TritonMath:
    """By our kernels, where they compute what the model's own modules do."""

    def __init__(self, device: torch.device, say: Callable[[str], None]):
        self._device, self._say, self._said = device, say, set[str]()

    def say(self, note: str) -> None:
        """Once, however many layers have it."""
        if note not in self._said:
            self._said.add(note)
            self._say(note)

    def tables(self, cosines: Tensor, sines: Tensor) -> Rotary:
        return cosines[0].contiguous(), sines[0].contiguous()

    def norm(self, own: nn.Module) -> nn.Module:
        if (norm := triton_norm(own)) is not None:
            return norm
        self.say(f"{type(own).__name__} is none of the norms that our kernels compute: it stays with torch's operations")
        return TORCH.norm(own)

    def rotation(self, of: RotatedHeads) -> nn.Module:
        if of.q_norm is None or of.k_norm is None:
            return TritonRotation(of, None)
        queries, keys = self.norm(of.q_norm), self.norm(of.k_norm)
        if isinstance(queries, TritonNorm) and isinstance(keys, TritonNorm) and _of_a_kind(queries, keys, of.head_dim):
            return TritonRotation(of, (queries, keys))
        self.say("Norms of queries and of keys are not of one kind that our kernels compute: they run one by one in front of the rotation")
        return _NormedRotation(of, (queries, keys))

    def gating(self, act_fn: nn.Module) -> nn.Module:
        if (gating := triton_gating(act_fn, self._device)) is not None:
            return gating
        self.say(f"{type(act_fn).__name__} is none of the activations that our kernels compute: it stays with torch's operations")
        return TORCH.gating(act_fn)


# ---------------------------------------------------------------------- what a module computes
@torch.inference_mode()
def triton_norm(own: nn.Module) -> TritonNorm | None:
    """The form that agrees with `own` in most bits and nowhere differs by more than rounding; None where none does."""
    if (parts := weight_and_epsilon(own)) is None:
        return None
    weight, epsilon = parts
    if weight.ndim != 1 or len(weight) > _MOST_WIDTH or weight.dtype not in _DTYPES:
        return None
    scales = torch.tensor(_SCALES, device=weight.device).unsqueeze(-1)
    sample = torch.linspace(-3, 3, len(_SCALES) * len(weight), device=weight.device).sin().view(len(_SCALES), -1) + 0.3
    sample = (sample * scales).to(weight.dtype)
    wanted = own(sample)
    norms = [TritonNorm(weight, epsilon, form) for form in _FORMS]
    results = [norm(sample) for norm in norms]
    num_equal = [int((result == wanted).sum()) for result in results]
    best = max(range(len(_FORMS)), key=num_equal.__getitem__)
    return norms[best] if _is_rounding(results[best], wanted) else None


@torch.inference_mode()
def triton_gating(act_fn: nn.Module, device: torch.device) -> TritonGating | None:
    """The one that `act_fn` computes, tried in float32, where rounding does not hide which it is; None where there is none."""
    sample = torch.linspace(-12, 12, 4096, device=device).view(4, -1)
    wanted = act_fn(sample.clone())
    for gating in (TritonGating(is_gelu=False), TritonGating(is_gelu=True)):
        if _is_rounding(gating(torch.cat((sample, torch.ones_like(sample)), -1)), wanted):
            return gating
    return None


def _is_rounding(got: Tensor, wanted: Tensor) -> bool:
    """Within what another order of sums makes of float32, and two roundings of 16 bits."""
    unit = torch.finfo(wanted.dtype).eps * (16 if wanted.dtype is torch.float32 else 2)
    return bool(((got - wanted).abs().float() <= unit * wanted.abs().float() + 1e-6).all())


def _of_a_kind(one: TritonNorm, other: TritonNorm, head_dim: int) -> bool:
    return (one.form, one.epsilon, len(one.weight)) == (other.form, other.epsilon, head_dim) and len(other.weight) == head_dim


# ---------------------------------------------------------------------- whether there are kernels here
def choose_layer_math(dtype: torch.dtype, device: torch.device, say: Callable[[str], None]) -> LayerMath:
    """Our kernels on a CUDA device where they run and are right, else torch's operations; on a CPU always these, which goes unsaid."""
    if device.type != "cuda":
        return TORCH
    if (reason := why_not(dtype, device)) is not None:
        say(f"Norms, rotation and gating by torch's operations, one after another: {reason}")
        return TORCH
    say("Norms, rotation and gating by kernels of our own")
    return TritonMath(device, say)


def why_not(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why kernels cannot do it here; None if they can."""
    if find_spec("triton") is None:
        return "Triton is not installed here; torch's builds for CUDA bring it"
    if dtype not in _DTYPES:
        return f"our kernels compute in float32, which is too little for {str(dtype).removeprefix('torch.')}"
    if device.type != "cuda" and not _kernels().IS_INTERPRETED:
        return "our kernels run on a CUDA device; on a CPU only step by step, with TRITON_INTERPRET=1, for tests"
    try:
        is_right = _are_right(dtype, device)
    except Exception as error:  # noqa: BLE001  # what a compiler of kernels raises is of no class that it documents; it is said, and not served
        return f"our kernels fail here ({type(error).__name__}: {(str(error).splitlines() or [''])[0]:.200})"
    return None if is_right else "our kernels are wrong here"


@torch.inference_mode()
def _are_right(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a small layer's worth of them gives what torch's operations give."""
    norm = nn.RMSNorm(48, eps=1e-5, device=device, dtype=dtype)
    head_norm = nn.RMSNorm(16, eps=1e-5, device=device, dtype=dtype)
    heads = torch.linspace(-3, 3, 5 * 8 * 16, device=device).sin().view(5, 8, 16).to(dtype)
    tables = [torch.linspace(0, 9, 5 * 8, device=device).view(1, 5, 8).cos().repeat(1, 1, 2).to(dtype) for _ in range(2)]
    of, said = RotatedHeads(4, 2, 16, head_norm, head_norm), list[str]()
    maths: tuple[LayerMath, ...] = (TritonMath(device, said.append), TORCH)
    results = [math.rotation(of)(heads.clone(), math.tables(tables[0], tables[1])) for math in maths]
    is_known = not said and None not in (triton_norm(norm), triton_gating(nn.SiLU(), device))
    unit = 4 * torch.finfo(dtype).eps
    return is_known and bool(((results[0] - results[1]).abs() <= unit * (1 + results[1].abs())).all())


def _constants(form: NormForm, epsilon: float) -> dict[str, Any]:
    return {"EPSILON": epsilon, "OFFSET": form.offset, "ROUNDS_FIRST": form.rounds_first}


def _num_warps(numbers: int) -> int:
    return max(1, min(16, power_of_two(numbers // _NUMBERS_A_WARP)))


def _kernels() -> Any:
    """The module, not before it is needed: Triton is not everywhere, and takes half a second to import."""
    from engine.model import layer_kernels

    return layer_kernels
