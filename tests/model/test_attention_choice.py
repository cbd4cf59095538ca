"""The kind of attention is chosen at the start: the fastest of those that are right, or the one that was asked for."""

from __future__ import annotations

import copy
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from engine.errors import ConfigError, UnsupportedModel
from engine.kv.cache import KVCache
from engine.model import attention_choice
from engine.model.attention import (
    Attention,
    AttentionKind,
    AttentionShape,
    LayerAttention,
    PagedContext,
    Room,
    Segment,
)
from engine.model.attention_choice import KINDS, choose_attention, measured, mistake_of
from engine.model.flashinfer_attention import FlashInferAttention
from engine.model.gather_attention import GATHER, GatherAttention
from engine.model.paged import PagedModel
from engine.model.stack import DecoderStack
from engine.model.timing import measure
from engine.model.triton_attention import TritonAttention
from engine.model.varlen_attention import VarlenAttention
from tests.tiny import ARCHITECTURES, target_model

CPU = AttentionShape(4, 2, 16, (None, 5), torch.float32, torch.device("cpu"))


class _Bent:
    """A context that adds something to what the gather gives in some window."""

    def __init__(self, own: PagedContext, error: float, window: int | None):
        self._own, self._error, self._window = own, error, window

    @property
    def positions(self) -> Tensor:
        return self._own.positions

    def attend(self, asked: LayerAttention, query: Tensor, kv: Tensor) -> Tensor:
        attended = self._own.attend(asked, query, kv)
        attended[-1, -1, -1] += self._error if asked.window == self._window else 0.0
        return attended


@dataclass(frozen=True)
class _Fake:
    """A kind that is the gather, but for what is said of it."""

    name: str = "triton"
    lacking: str | None = None
    error: float = 0.0
    window: int | None = None
    failure: Exception | None = None
    bad_form: bool = False
    is_recordable: bool = False

    @property
    def forms(self) -> ListLike[AttentionKind]:
        return (self, replace(self, error=1.0)) if self.bad_form else (self,)

    def lacks(self, shape: AttentionShape) -> str | None:
        return self.lacking

    def over(self, cache: KVCache, block_size: int, shape: AttentionShape) -> Attention:
        if self.failure is not None:
            raise self.failure
        own, error, window = GATHER.over(cache, block_size, shape), self.error, self.window

        class Bending:
            def context(self, segments: ListLike[Segment], num_rows: int = 0) -> PagedContext:
                return _Bent(own.context(segments, num_rows), error, window)

            def fixed(self, room: Room) -> None:
                return None

        return Bending()


def test_on_a_cpu_it_is_the_gather() -> None:
    said: list[str] = []
    assert choose_attention("auto", CPU, 16, said.append) is GATHER
    assert choose_attention("gather", CPU, 16, said.append) is GATHER
    assert said == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_kind_that_is_the_gather_is_right(dtype: torch.dtype) -> None:
    assert mistake_of(_Fake(), replace(CPU, dtype=dtype), 16) is None


@pytest.mark.parametrize(
    ("kind", "mistake"),
    [
        (_Fake(lacking="it is not here"), "it is not here"),
        (_Fake(error=1e-2), "it is off by 1.0e-02 here, where 1e-04 is rounding in torch.float32"),
        (_Fake(error=1e-2, window=5), "it is off by 1.0e-02 here, where 1e-04 is rounding in torch.float32"),
        (_Fake(error=float("nan")), "it is off by inf here, where 1e-04 is rounding in torch.float32"),
        (_Fake(failure=RuntimeError("no kernel\nfor this device")), "it fails here (RuntimeError: no kernel)"),
        (_Fake(failure=AssertionError()), "it fails here (AssertionError: )"),
        (_Fake(bad_form=True), "it is off by 1.0e+00 here, where 1e-04 is rounding in torch.float32"),
    ],
)
def test_one_that_cannot_serve_is_refused_by_name(kind: _Fake, mistake: str) -> None:
    assert mistake_of(kind, CPU, 16) == mistake
    with pytest.raises(ConfigError) as caught:
        choose_attention("triton", CPU, 16, print, (GATHER, kind))
    assert str(caught.value) == f"engine.attention: triton - {mistake}. auto takes what is there"


def test_on_a_gpu_it_is_the_fastest_that_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"gather": (9e-5, 9e-5), "slow": (2e-5, 9e-5), "fast": (3e-5, 4e-5), "wrong": (1e-6, 1e-6)}
    slow, fast, wrong, missing = _Fake("slow"), _Fake("fast"), _Fake("wrong", error=1.0), _Fake("missing", lacking="it is not here")
    monkeypatch.setattr(attention_choice, "mistake_of", lambda kind, shape, block_size: mistake_of(kind, CPU, block_size))
    gpu = replace(CPU, device=torch.device("cuda"))
    said: list[str] = []
    chosen = choose_attention("auto", gpu, 16, said.append, (GATHER, slow, fast, wrong, missing), lambda kind, *_: times[kind.name])
    assert chosen is fast
    assert said == [
        "Attention by fast: 30 + 40 us a layer, decoding and a piece of a prompt (gather: 90 + 90 us; slow: 20 + 90 us; "
        "wrong: it is off by 1.0e+00 here, where 1e-04 is rounding in torch.float32; missing: it is not here)"
    ]
    assert choose_attention("auto", gpu, 16, said.append, (GATHER, wrong), lambda kind, *_: times[kind.name]) is GATHER


def test_launches_that_recording_saves_are_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass of one token is launches alone, and those are replayed."""
    times = {"gather": (9e-5, 9e-5), "quick": (3e-5, 4e-5), "recorded": (8e-5, 6e-5), "slow": (8e-5, 9e-5)}
    quick, recorded, slow = _Fake("quick"), _Fake("recorded", is_recordable=True), _Fake("slow", is_recordable=True)
    monkeypatch.setattr(attention_choice, "mistake_of", lambda kind, shape, block_size: mistake_of(kind, CPU, block_size))
    gpu = replace(CPU, device=torch.device("cuda"))
    for kinds, is_recording, want in (
        ((GATHER, quick, recorded), True, recorded),
        ((GATHER, quick, recorded), False, quick),
        ((GATHER, quick, slow), True, quick),
    ):
        assert choose_attention("auto", gpu, 16, print, kinds, lambda kind, *_: times[kind.name], is_recording) is want


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("block_size", [4, 16])
def test_a_stack_asks_once_and_its_passes_use_what_was_chosen(architecture: str, block_size: int) -> None:
    own, asked, calls = target_model(architecture=architecture), [], []

    class Counted(GatherAttention):
        def over(self, cache: KVCache, block_size: int, shape: AttentionShape) -> Attention:
            calls.append(block_size)
            return super().over(cache, block_size, shape)

    def choose(shape: AttentionShape) -> AttentionKind:
        asked.append(shape)
        return Counted()

    stack = DecoderStack(copy.deepcopy(own), choose_attention=choose, block_size=block_size)
    head_dim = own.model.layers[0].self_attn.head_dim
    assert asked == [AttentionShape(4, 2, head_dim, stack.windows, torch.float64, CPU.device)]
    assert calls == [block_size], "at the load"
    measure(stack, (1,))
    assert calls == 2 * [block_size], "and where its passes are timed"
    PagedModel(stack, 8, 7)
    assert calls == [block_size, block_size, 7]


def test_a_model_whose_attention_is_wrong_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="two packed sequences get other logits"):
        DecoderStack(copy.deepcopy(target_model()), choose_attention=lambda _: _Fake(error=1.0))


def test_time_is_measured() -> None:
    assert all(0 < seconds < 5 for seconds in measured(GATHER, CPU, 16))


def test_what_is_missing_is_said() -> None:
    assert {kind.name for kind in KINDS} == {"gather", "triton", "varlen", "flashinfer"}
    varlen, flashinfer = VarlenAttention(), FlashInferAttention()
    assert varlen.lacks(CPU) == "it runs on a CUDA device"
    gpu = replace(CPU, device=torch.device("cuda"))
    assert varlen.lacks(gpu) == "it computes in float16 and bfloat16, not in float32"
    if flashinfer.lacks(gpu) != "FlashInfer is not installed here (pip install flashinfer-python)":
        assert flashinfer.lacks(replace(gpu, dtype=torch.float16)) == "its heads have 64, 128, 256 dimensions, and these have 16"


def test_varlen_lacks_a_kernel_where_no_flash_attention_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = replace(CPU, device=torch.device("cuda"), dtype=torch.float16)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("engine.model.varlen_attention.find_spec", lambda name: None)
    said = "torch's own kernel takes no block table; FlashAttention 3 or 4 does, where it is installed for this GPU"
    assert VarlenAttention().lacks(gpu) == said
    monkeypatch.setattr("engine.model.varlen_attention.find_spec", lambda name: name)
    assert VarlenAttention().lacks(gpu) is None


def test_what_triton_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    triton, gpu = TritonAttention(), replace(CPU, device=torch.device("cuda"))
    monkeypatch.setattr("engine.model.triton_attention.find_spec", lambda name: None)
    assert triton.lacks(gpu) == "Triton is not installed here; torch's builds for CUDA bring it"
    monkeypatch.setattr("engine.model.triton_attention.find_spec", lambda name: True)
    monkeypatch.setattr("engine.model.triton_attention._kernels", lambda: SimpleNamespace(IS_INTERPRETED=False))
    assert triton.lacks(gpu) is None
    assert triton.lacks(CPU) == "it runs on a CUDA device; on a CPU only step by step, with TRITON_INTERPRET=1, for tests"
    assert triton.lacks(replace(gpu, dtype=torch.float64)) == "its kernels do not compute in float64"
    assert triton.lacks(replace(gpu, head_dim=320)) == "its kernels hold heads of 256 dimensions at most, and these have 320"
    assert triton.lacks(replace(gpu, num_heads=130)) == "its kernels hold 64 query heads a key-value head at most"
