"""What is passed to libraries of kernels: stand-ins that do what their documentation says must give what the gather gives."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kv.cache import KVCache
from engine.model.attention import AttentionKind, AttentionShape, LayerAttention, Segment
from engine.model.attention_choice import KINDS, mistake_of
from engine.model.flashinfer_attention import FlashInferAttention
from engine.model.gather_attention import GATHER
from engine.model.varlen_attention import VarlenAttention

SHAPE = AttentionShape(4, 2, 16, (None, 6), torch.float32, torch.device("cpu"))


def causal(query: Tensor, keys: Tensor, values: Tensor, scale: float, left: int) -> Tensor:
    """One sequence, aligned at its end: [n, heads, d] over [L, kv_heads, d]; `left` keys in front of a query's own are seen, -1 for all."""
    group = query.shape[1] // keys.shape[1]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    distance = torch.arange(len(keys) - len(query), len(keys))[:, None] - torch.arange(len(keys))
    hidden = (distance < 0) | (distance > left if left >= 0 else torch.zeros_like(distance, dtype=torch.bool))
    scores = torch.einsum("nhd,lhd->hnl", query, keys) * scale
    return torch.einsum("hnl,lhd->nhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)


def stand_in_for_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: None, max_q: int, max_k: int, **options: Any
) -> Tensor:
    (left, right), table, used = options["window_size"], options["block_table"], options["seqused_k"]
    assert options["enable_gqa"]
    assert right == 0
    assert cu_seq_q.dtype == table.dtype == used.dtype == torch.int32
    assert key.stride(-1) == value.stride(-1) == 1
    assert len(query) == cu_seq_q[-1]
    found = []
    for i, num_keys in enumerate(used.tolist()):
        own = query[cu_seq_q[i] : cu_seq_q[i + 1]]
        assert len(own) <= max_q
        assert num_keys <= max_k
        blocks = table[i, : -(-num_keys // key.shape[1])].long()
        keys, values = (x[blocks].flatten(0, 1)[:num_keys] for x in (key, value))
        found.append(causal(own, keys, values, options["scale"], left))
    return torch.cat(found)


class StandInForFlashInfer:
    """BatchPrefillWithPagedKVCacheWrapper."""

    def __init__(self, workspace: Tensor, layout: str):
        assert layout == "NHD"
        assert workspace.dtype == torch.uint8

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        **options: Any,
    ) -> None:
        assert options["causal"]
        self._queries, self._pages, self._indices, self._last = qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        assert all(x.dtype == torch.int32 for x in (self._queries, self._pages, self._indices, self._last))
        self._shape, self._page_size, self._options = (num_qo_heads, num_kv_heads, head_dim_qk), page_size, options

    def run(self, query: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        keys, values = paged_kv_cache
        assert keys.stride() == values.stride()
        assert (query.shape[1], *keys.shape[2:]) == self._shape
        assert keys.shape[1] == self._page_size
        assert query.dtype == self._options["q_data_type"]
        found = []
        for i, last in enumerate(self._last.tolist()):
            pages = self._indices[self._pages[i] : self._pages[i + 1]].long()
            num_keys = (len(pages) - 1) * self._page_size + last
            own = query[self._queries[i] : self._queries[i + 1]]
            seen_keys, seen_values = (x[pages].flatten(0, 1)[:num_keys] for x in (keys, values))
            found.append(causal(own, seen_keys, seen_values, self._options["sm_scale"], self._options["window_left"]))
        return torch.cat(found)


@pytest.fixture(params=["varlen", "flashinfer"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> AttentionKind:
    """With a stand-in behind it; only where it would run is not asked."""
    if request.param == "varlen":
        monkeypatch.setattr("engine.model.varlen_attention._varlen_attn", lambda: stand_in_for_varlen)
        return VarlenAttention()
    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(BatchPrefillWithPagedKVCacheWrapper=StandInForFlashInfer))
    monkeypatch.setattr("engine.model.flashinfer_attention._WORKSPACE_BYTES", 1)
    return FlashInferAttention()


@pytest.mark.parametrize("block_size", [4, 16])
def test_it_is_told_what_the_gather_does(kind: AttentionKind, block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(kind), "lacks", lambda self, shape: None)
    assert mistake_of(kind, SHAPE, block_size) is None


def test_filling_is_left_out_and_the_next_pass_is_another(kind: AttentionKind) -> None:
    generator = torch.Generator().manual_seed(3)
    caches = [KVCache(2, 12 * 4, (2, 16), torch.float32, SHAPE.device) for _ in range(2)]
    paged = [own.over(cache, 4, SHAPE) for own, cache in zip((GATHER, kind), caches, strict=True)]
    tables = ([3, 9, 1], [4, 0])
    for runs, num_rows in (((0, 5), (0, 3)), 9), (((5, 1), (3, 4)), 5), (((6, 4), (7, 1)), 8):
        segments = [Segment(table, *run) for table, run in zip(tables, runs, strict=True)]
        contexts = [own.context(segments, num_rows) for own in paged]
        assert contexts[0].positions.tolist() == contexts[1].positions.tolist()
        for layer, window in enumerate(SHAPE.windows):
            packed = torch.randn(num_rows, 8, 16, generator=generator)
            want, got = (own.attend(LayerAttention(layer, window, 0.3), packed[:, :4], packed[:, 4:]) for own in contexts)
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    for layer in range(2):
        assert torch.equal(caches[0].layers[layer], caches[1].layers[layer])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["triton", "varlen", "flashinfer"])
def test_on_a_gpu_each_kind_that_is_there_is_right(name: str, dtype: torch.dtype) -> None:
    kind = next(kind for kind in KINDS if kind.name == name)
    shape = replace(SHAPE, num_heads=32, num_kv_heads=8, head_dim=128, windows=(None, 64), dtype=dtype, device=torch.device("cuda"))
    if (lacking := kind.lacks(shape)) is not None:
        pytest.skip(lacking)
    assert mistake_of(kind, shape, 16) is None
