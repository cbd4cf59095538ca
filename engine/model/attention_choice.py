"""Which kind of attention a model gets: the fastest of those that are right, found out on this device at the start.

A kind is right when it gives what GATHER gives in float32, within the rounding of its dtype, for a ragged batch of random numbers: pieces
of prompts, verify windows and single tokens, in every window that the model has. One that is asked for by name and cannot serve is
refused; `auto` says what each of the others lacks. On a CPU `auto` is GATHER.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.kv.cache import KVCache
from engine.model.attention import AttentionKind, AttentionShape, LayerAttention, Segment
from engine.model.flashinfer_attention import FlashInferAttention
from engine.model.gather_attention import GATHER
from engine.model.triton_attention import TritonAttention
from engine.model.varlen_attention import VarlenAttention

KINDS: tuple[AttentionKind, ...] = (GATHER, TritonAttention(), VarlenAttention(), FlashInferAttention())

# largest difference from float32 that is rounding and not a mistake; what is attended to is of the size of one
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 4e-2}

# start and tokens of each segment
_RIGHT = ((0, 1), (37, 1), (150, 1), (0, 70), (61, 5), (5, 19))
_DECODING = tuple((600 + 100 * i, 1) for i in range(8))
_PROMPT = ((512, 256),)

_WARM_UPS, _REPETITIONS = 3, 20


@dataclass(frozen=True, slots=True)
class Trial:
    """What came of trying a kind out."""

    kind: AttentionKind
    mistake: str | None = None  # why it cannot serve
    seconds: tuple[float, float] = (0.0, 0.0)  # of a layer: decoding, and a chunk of a prompt

    @property
    def said(self) -> str:
        if self.mistake is not None:
            return f"{self.kind.name}: {self.mistake}"
        return f"{self.kind.name}: {' + '.join(f'{1e6 * seconds:.0f}' for seconds in self.seconds)} us"


def choose_attention(
    asked: str,
    shape: AttentionShape,
    block_size: int,
    say: Callable[[str], None],
    kinds: ListLike[AttentionKind] = KINDS,
    seconds_of: Callable[[AttentionKind, AttentionShape, int], tuple[float, float]] | None = None,
    is_recording: bool = False,
) -> AttentionKind:
    """The kind of that name, or for `auto` the one that takes least time. Raises ConfigError where the one asked for cannot serve.

    `is_recording`: small passes will be recorded if they can be, so that what decoding takes here, which is launches, does not count.
    """
    if asked == "gather" or (asked == "auto" and shape.device.type != "cuda"):
        return GATHER
    if asked != "auto":
        kind = next(kind for kind in kinds if kind.name == asked)
        if (mistake := mistake_of(kind, shape, block_size)) is not None:
            raise ConfigError(f"engine.attention: {asked} - {mistake}. auto takes what is there")
        return kind
    trials = [_tried(kind, shape, block_size, seconds_of or measured) for kind in kinds]
    right = [trial for trial in trials if trial.mistake is None]
    best = min(right, key=lambda trial: trial.seconds[1] if is_recording and trial.kind.is_recordable else sum(trial.seconds))
    others = "; ".join(trial.said for trial in trials if trial is not best)
    say(f"Attention by {best.said} a layer, decoding and a piece of a prompt ({others})")
    return best.kind


def _tried(
    kind: AttentionKind,
    shape: AttentionShape,
    block_size: int,
    seconds_of: Callable[[AttentionKind, AttentionShape, int], tuple[float, float]],
) -> Trial:
    if kind is not GATHER and (mistake := mistake_of(kind, shape, block_size)) is not None:
        return Trial(kind, mistake)
    return Trial(kind, None, seconds_of(kind, shape, block_size))


def mistake_of(kind: AttentionKind, shape: AttentionShape, block_size: int) -> str | None:
    """Why a kind cannot serve attention of this shape here; None if it can."""
    try:
        if (lacking := kind.lacks(shape)) is not None:
            return lacking
        difference = max(largest_difference(form, shape, block_size) for form in kind.forms)
    except Exception as error:  # noqa: BLE001  # what a library of kernels raises is of no class that it documents; it is said, and not served
        return f"it fails here ({type(error).__name__}: {(str(error).splitlines() or [''])[0]:.200})"
    if not difference <= _TOLERANCE[shape.dtype]:
        return f"it is off by {difference:.1e} here, where {_TOLERANCE[shape.dtype]:.0e} is rounding in {shape.dtype}"
    return None


@torch.inference_mode()
def largest_difference(kind: AttentionKind, shape: AttentionShape, block_size: int) -> float:
    """From GATHER in float32, over random numbers of the model's dtype; infinite where there is something that is no number."""
    batch = _Batch.random(_RIGHT, shape, block_size)
    exact = replace(shape, dtype=torch.promote_types(shape.dtype, torch.float32))
    own, reference = batch.over(kind, shape), batch.over(GATHER, exact)
    found = [float((own(window).to(exact.dtype) - reference(window)).abs().max()) for window in shape.windows]
    return max(value if value == value else float("inf") for value in found)


@torch.inference_mode()
def measured(kind: AttentionKind, shape: AttentionShape, block_size: int) -> tuple[float, float]:
    """Seconds that the layers take on average for some sequences that decode, and for a chunk of a prompt. Their pass is prepared."""
    decoding, prompt = (_mean_seconds(_Batch.random(segments, shape, block_size), kind, shape) for segments in (_DECODING, _PROMPT))
    return decoding, prompt


def _mean_seconds(batch: _Batch, kind: AttentionKind, shape: AttentionShape) -> float:
    run = batch.over(kind, shape)
    for _ in range(_WARM_UPS):
        _run_all(run, shape.windows)
    _wait(shape.device)
    began = time.perf_counter()
    for _ in range(_REPETITIONS):
        _run_all(run, shape.windows)
    _wait(shape.device)
    return (time.perf_counter() - began) / _REPETITIONS / len(shape.windows)


def _run_all(run: Callable[[int | None], Tensor], windows: Iterable[int | None]) -> None:
    for window in windows:
        run(window)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True, slots=True)
class _Batch:
    """Segments over a cache of random numbers, their blocks scattered over it."""

    segments: tuple[Segment, ...]
    block_size: int
    store: Tensor  # [slots, 2 * kv_heads, head_dim]
    packed: Tensor  # [N, heads + 2 * kv_heads, head_dim] queries, keys and values of the row, as a layer's one product gives them

    @classmethod
    def random(cls, segments: ListLike[tuple[int, int]], shape: AttentionShape, block_size: int) -> _Batch:
        generator = torch.Generator().manual_seed(7)
        nums = [-(-(start + num) // block_size) for start, num in segments]
        blocks = torch.split(torch.randperm(sum(nums) + 3, generator=generator)[: sum(nums)], nums)
        num_heads = 2 * shape.num_kv_heads

        def numbers(rows: int, heads: int) -> Tensor:
            return torch.randn(rows, heads, shape.head_dim, generator=generator).to(shape.device, shape.dtype)

        return cls(
            segments=tuple(Segment(own.tolist(), start, num) for own, (start, num) in zip(blocks, segments, strict=True)),
            block_size=block_size,
            store=numbers((sum(nums) + 3) * block_size, num_heads),
            packed=numbers(sum(num for _, num in segments), shape.num_heads + num_heads),
        )

    def over(self, kind: AttentionKind, shape: AttentionShape) -> Callable[[int | None], Tensor]:
        """What a layer of some window makes of it: [N, heads, head_dim]."""
        cache = KVCache(1, len(self.store), (shape.num_kv_heads, shape.head_dim), shape.dtype, shape.device)
        cache.layers[0].copy_(self.store)
        packed = self.packed.to(shape.dtype)
        context = kind.over(cache, self.block_size, shape).context(self.segments)

        def attended(window: int | None) -> Tensor:
            asked = LayerAttention(0, window, shape.head_dim**-0.5)
            return context.attend(asked, packed[:, : shape.num_heads], packed[:, shape.num_heads :])

        return attended
