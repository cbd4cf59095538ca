"""How much the KV cache gets where the deployment leaves it to the engine, and what is said where memory is short at the start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ByteSize

from engine.build import build
from engine.config import EngineConfig, FixedLengthConfig, ModelPair, ModelSource, RuntimeConfig, SpeculationConfig
from engine.errors import ConfigError
from engine.model.budget import LIBRARIES, ON_CPU, Footprint, kv_budget, reserve_bytes
from engine.model.loader import quiet_transformers
from engine.model.paged import PagedModel
from tests.tiny import target_model

GIB = 1 << 30
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
LLAMA = Footprint(hidden_size=4096, intermediate_size=14_336, vocab_size=128_256, num_layers=32, itemsize=2, kv_bytes_per_token=131_072)
LAYER = Footprint(hidden_size=4096, intermediate_size=14_336, vocab_size=128_256, num_layers=1, itemsize=2, kv_bytes_per_token=4096)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 GiB, of which weights take 16."""
    monkeypatch.setattr("engine.model.budget.gpu_memory", lambda device: (64 * GIB, 80 * GIB))


@pytest.mark.usefixtures("gpu")
def test_a_gpu_gives_what_weights_and_steps_leave() -> None:
    runtime = RuntimeConfig(max_sequences=32, max_step_tokens=1024)
    reserve = reserve_bytes(runtime, 8, [LLAMA, LAYER])
    assert 2.5 * GIB < reserve < 4 * GIB
    found = kv_budget(runtime, CUDA, 8, [LLAMA, LAYER])
    assert found == (int(0.9 * 80 * GIB) - 16 * GIB - reserve) * 32 // 34
    recorded = runtime.model_copy(update={"cuda_graph_memory": ByteSize(3 * GIB)})
    assert found - kv_budget(recorded, CUDA, 8, [LLAMA, LAYER]) == pytest.approx(2 * GIB * 32 / 34, abs=2), (
        "recorded passes come behind the cache"
    )
    launched = recorded.model_copy(update={"cuda_graphs": "off"})
    assert kv_budget(launched, CUDA, 8, [LLAMA, LAYER]) - found == pytest.approx(GIB * 32 / 34, abs=2)
    launching = [replace(model, is_recordable=False) for model in (LLAMA, LAYER)]
    assert kv_budget(runtime, CUDA, 8, launching) == kv_budget(launched, CUDA, 8, [LLAMA, LAYER])
    assert kv_budget(runtime.model_copy(update={"gpu_memory_fraction": 0.5}), CUDA, 8, [LLAMA, LAYER]) < 0.5 * found
    assert kv_budget(runtime, CUDA, 8, [LLAMA, LAYER], weight_bytes=GIB) == found - GIB * 32 // 34, "what is still to be loaded"


@pytest.mark.usefixtures("gpu")
def test_the_reserve_grows_with_what_a_step_holds() -> None:
    def reserve(max_draft: int = 4, **changes: int) -> int:
        return reserve_bytes(RuntimeConfig(**{"max_sequences": 8, "max_step_tokens": 512, **changes}), max_draft, [LLAMA])

    assert reserve() > LIBRARIES
    assert reserve(max_step_tokens=4096) > reserve()
    assert reserve(max_sequences=64) > reserve(max_draft=8) > reserve()
    assert reserve(max_sequences=4096) == reserve(max_sequences=512), "a step has no more rows than tokens"
    logits = 128_256 * 2
    assert reserve(max_step_tokens=1024) - reserve() > 512 * logits, "a scored prompt wants those of all rows"


@pytest.mark.usefixtures("gpu")
def test_a_size_that_was_asked_for_is_that_size_and_a_cpu_gets_a_little() -> None:
    assert kv_budget(RuntimeConfig(kv_cache=ByteSize(5)), CUDA, 8, [LLAMA]) == 5
    assert kv_budget(RuntimeConfig(max_model_len=99), CPU, 8, [LLAMA]) == ON_CPU
    assert kv_budget(RuntimeConfig(max_model_len=16_383), CPU, 8, [LLAMA]) == 2 * GIB, "what one answer takes"
    for said in ("auto", None):
        assert RuntimeConfig.model_validate({"kv_cache": said}).kv_cache is None
    assert RuntimeConfig.model_validate(RuntimeConfig().model_dump(mode="json")) == RuntimeConfig(), "as it crosses the processes"


@pytest.mark.usefixtures("gpu")
def test_what_leaves_nothing_is_refused_with_the_keys_to_turn() -> None:
    runtime = RuntimeConfig(gpu_memory_fraction=0.2)
    with pytest.raises(ConfigError, match=r"gpu_memory_fraction: 0\.2 - leaves nothing .* 80\.0 GiB .* 16\.0 are in use") as caught:
        kv_budget(runtime, CUDA, 8, [LLAMA])
    for key in ("engine.kv_cache", "engine.max_step_tokens", "engine.max_sequences", "dtype", "quantization"):
        assert key in str(caught.value)


# ---------------------------------------------------------------------- at the start
@pytest.fixture
def config(tmp_path: Path) -> EngineConfig:
    with quiet_transformers():
        target_model().save_pretrained(tmp_path / "target")
    return EngineConfig(
        model=ModelPair(name="tiny", target=ModelSource(source=str(tmp_path / "target"), dtype="float64")),
        speculation=SpeculationConfig(draft_length=FixedLengthConfig(max=4)),
        engine=RuntimeConfig(device="cpu", kv_cache=ByteSize(1 << 18), block_size=4),
    )


def full(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


@pytest.mark.parametrize("place", ["engine.model.member.DecoderStack", "engine.model.paged.KVCache", "engine.build._measured"])
def test_memory_that_runs_out_while_loading_is_one_line_with_the_keys_to_turn(
    place: str, config: EngineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, full)
    with pytest.raises(ConfigError, match=r"does not fit into the memory .* lower engine\.kv_cache, engine\.max_step_tokens"):
        build(config)


def test_no_memory_for_one_step_is_said_at_the_start(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    own = PagedModel.states

    def states(self: PagedModel, segments: Any, input_ids: torch.Tensor, rows: Any) -> torch.Tensor:
        return full() if segments else own(self, segments, input_ids, rows)

    monkeypatch.setattr(PagedModel, "states", states)
    with pytest.raises(ConfigError, match=r"leave no memory for a step: lower engine\.kv_cache"):
        build(config)


def test_another_error_while_loading_stays_what_it_is(config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr("engine.model.member.DecoderStack", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        build(config)
