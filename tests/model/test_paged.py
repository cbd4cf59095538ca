"""The packed layer loop over the paged cache equals the model's own forward; what would be wrong is refused."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from pydantic import ByteSize

from engine.build import assemble
from engine.config import EngineConfig, ModelDrafterConfig, ModelPair, ModelSource, RuntimeConfig
from engine.draft.ngram import NoDrafter
from engine.errors import ConfigError, UnsupportedModel
from engine.model.attention import Segment
from engine.model.budget import MemoryPlan, plan_memory, require_memory
from engine.model.member import Member
from engine.model.memory import available_bytes
from engine.model.paged import PagedModel, kv_bytes_per_token, rows_run
from engine.model.runner import ModelRunner
from engine.model.stack import DecoderStack
from engine.plan import Chunk, RowsWanted, StepPlan
from tests.tiny import ARCHITECTURES, VOCAB, target_model
from tests.unit.factories import make_drafts, make_sequence


@torch.inference_mode()
def own(tokens: list[int], architecture: str = "llama") -> torch.Tensor:
    return target_model(architecture=architecture)(torch.tensor([tokens]), use_cache=False).logits[0]  # type: ignore[no-any-return]


def stack(architecture: str = "llama") -> DecoderStack:
    return DecoderStack(copy.deepcopy(target_model(architecture=architecture)))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ragged_chunks_in_any_blocks_equal_the_own_forward(architecture: str) -> None:
    """Twelve sequences of random length, run in random chunks, several in a pass, blocks scattered over the pool."""
    rng, model, size = random.Random(3), PagedModel(stack(architecture), 96, 4), 4
    free = rng.sample(range(96), 96)
    texts = [[rng.randrange(VOCAB) for _ in range(rng.randint(1, 30))] for _ in range(12)]
    tables = [[free.pop() for _ in range(-(-len(text) // size))] for text in texts]
    done = [0] * len(texts)
    while any(d < len(t) for d, t in zip(done, texts, strict=True)):
        running = [i for i in range(len(texts)) if done[i] < len(texts[i]) and rng.random() < 0.7]
        lengths = [rng.randint(1, len(texts[i]) - done[i]) for i in running]
        segments = [Segment(tables[i], done[i], n) for i, n in zip(running, lengths, strict=True)]
        ids = [token for i, n in zip(running, lengths, strict=True) for token in texts[i][done[i] : done[i] + n]]
        got = model.forward(segments, torch.tensor(ids, dtype=torch.long), range(len(ids)))
        offset = 0
        for i, n in zip(running, lengths, strict=True):
            want = own(texts[i][: done[i] + n], architecture)[done[i] :]
            torch.testing.assert_close(got[offset : offset + n], want, rtol=0, atol=1e-10)
            offset += n
            done[i] += n


def test_only_wanted_rows_are_computed() -> None:
    model = PagedModel(stack(), 8, 4)
    text = [3, 1, 4, 1, 5]
    got = model.forward([Segment([2, 5], 0, 5)], torch.tensor(text), [1, 4])
    torch.testing.assert_close(got, own(text)[[1, 4]], rtol=0, atol=1e-10)
    assert model.forward([], torch.zeros(0, dtype=torch.long), []).shape == (0, VOCAB)


def test_all_rows_of_a_chunk_on_request() -> None:
    """Prompt log-probabilities: rows of every token, in front of the verify window."""
    runner = ModelRunner(PagedModel(stack(), 8, 4))
    seq = make_sequence((3, 1, 4, 1, 5))
    seq.block_table = [0, 1]
    for wanted, offsets in ((RowsWanted.ALL, (-4, -3, -2, -1, 0, 1, 2)), (RowsWanted.WINDOW, (0, 1, 2))):
        plan = StepPlan((Chunk(seq, 5, True, 2, wanted),))
        logits, rows, _ = runner.forward(plan, make_drafts(plan, [2]))
        assert rows.offsets == offsets
        torch.testing.assert_close(logits, own([3, 1, 4, 1, 5, 9, 9])[-len(offsets) :], rtol=0, atol=1e-10)
        assert rows.windows() == [offsets.index(i) for i in (0, 1, 2)]
    partial = StepPlan((Chunk(seq, 3, False),))
    logits, rows, _ = runner.forward(partial, NoDrafter().propose(partial, 9))
    assert logits.shape == (0, VOCAB)
    assert rows.seqs == ()


def test_a_stack_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(target_model())
    monkeypatch.setattr("engine.model.layer_math.signed", lambda cosines, sines: (cosines[0].unsqueeze(1), sines[0].unsqueeze(1)))
    with pytest.raises(UnsupportedModel, match="llama: two packed sequences get other logits"):
        DecoderStack(model)


def test_a_padded_vocabulary_is_cut_to_what_the_pair_has_in_common() -> None:
    padded = copy.deepcopy(target_model())
    padded.resize_token_embeddings(VOCAB + 8)
    target, drafter = Member(DecoderStack(padded), 64, Path("t")), Member(stack(), 64, Path("d"))
    config = EngineConfig(
        model=ModelPair(name="x", target=ModelSource(source="t"), drafter=ModelDrafterConfig(source="d")),
        engine=RuntimeConfig(kv_cache=ByteSize(1 << 20), device="cpu"),
    )
    assert assemble(config, target, drafter).info.vocab_size == VOCAB


def test_the_served_context_is_the_smaller_of_model_and_pool() -> None:
    def plan(kv_bytes: int, asked: int | None = None) -> MemoryPlan:
        return plan_memory(RuntimeConfig(block_size=16, max_model_len=asked), 100, 64, kv_bytes)

    assert plan(16 * 100 * 10).max_model_len == 64
    assert plan(16 * 100 * 3).max_model_len == 48
    assert plan(16 * 100 * 10, asked=40).max_model_len == 40
    with pytest.raises(ConfigError, match=r"max_model_len: 65 - must be at most 64: the model's context is 64"):
        plan(16 * 100 * 10, asked=65)
    with pytest.raises(ConfigError, match=r"max_model_len: 60 - must be at most 48: engine.kv_cache"):
        plan(16 * 100 * 3, asked=60)
    with pytest.raises(ConfigError, match=r"kv_cache: 1599 bytes - must be at least 1600"):
        plan(1599)


def test_a_cache_that_does_not_fit_is_refused_instead_of_being_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    meminfo, cgroup = tmp_path / "meminfo", tmp_path / "cgroup"
    meminfo.write_text("MemTotal: 9000000 kB\nMemAvailable: 4194304 kB\n")
    monkeypatch.setattr("engine.model.memory._MEMINFO", meminfo)
    monkeypatch.setattr("engine.model.memory._CGROUP", cgroup)
    cpu = torch.device("cpu")
    require_memory(4 << 30, cpu)
    with pytest.raises(ConfigError, match=r"kv_cache: 500\.0 GiB - must be at most 4\.0 GiB, what cpu has free"):
        require_memory(500 << 30, cpu)
    cgroup.mkdir()
    (cgroup / "memory.current").write_text("1073741824\n")
    (cgroup / "memory.max").write_text("max\n")
    assert available_bytes(cpu) == 4 << 30
    (cgroup / "memory.max").write_text("3221225472\n")
    assert available_bytes(cpu) == 2 << 30
    (cgroup / "memory.stat").write_text("anon 536870912\ninactive_file 402653184\nactive_file 134217728\n")
    assert available_bytes(cpu) == 5 << 29, "half a GiB is of files that were read, and is let go when it is needed"
    meminfo.unlink()
    (cgroup / "memory.max").unlink()
    assert available_bytes(cpu) is None


def test_kv_bytes() -> None:
    assert kv_bytes_per_token(stack()) == 2 * 2 * 2 * 4 * 8  # keys and values, layers, heads, head dimension, float64


def test_passes_of_few_different_sizes_are_run() -> None:
    sizes = [rows_run(num) for num in range(1, 257)]
    assert all(num <= size <= max(4, 1.5 * num) for num, size in enumerate(sizes, 1))
    assert sizes[3:16] == list(range(4, 17)), "what decoding runs is not filled up"
    assert sizes[255] == 256
    assert len(set(sizes)) < 40
