"""What the start does about recorded passes: it measures them, records them, says so, and leaves it where the deployment says off."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ByteSize, ValidationError

from engine.build import build
from engine.config import AdaptiveLengthConfig, CudaGraphs, EngineConfig, ModelPair, ModelSource, NGramDrafterConfig, RuntimeConfig
from engine.config import SpeculationConfig as Speculation
from engine.model.cuda_graphs import recorder_of
from engine.model.loader import quiet_transformers
from tests.recording import CallingRecorder, FixedGather
from tests.reference import answer
from tests.tiny import drive, naive_target, target_model
from tests.verify.requests import greedy


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> CallingRecorder:
    """A device on which passes can be recorded."""
    found = CallingRecorder()
    monkeypatch.setattr("engine.build.recorder_of", lambda asked, device: found if asked == "auto" else None)
    monkeypatch.setattr("engine.model.member.choose_attention", lambda *_, **__: FixedGather())
    return found


def config(folder: Path, cuda_graphs: CudaGraphs) -> EngineConfig:
    with quiet_transformers():
        target_model().save_pretrained(folder)
    return EngineConfig(
        model=ModelPair(name="tiny", target=ModelSource(source=str(folder), dtype="float64"), drafter=NGramDrafterConfig()),
        speculation=Speculation(draft_length=AdaptiveLengthConfig(max=3)),
        engine=RuntimeConfig(device="cpu", kv_cache=ByteSize(1 << 18), block_size=4, max_sequences=4, cuda_graphs=cuda_graphs),
    )


def test_passes_are_measured_recorded_and_repeated(tmp_path: Path, recorder: CallingRecorder) -> None:
    said = list[str]()
    core = build(config(tmp_path, "auto"), said.append)
    buckets = core._parts.runner._target._graphs.buckets
    assert [line for line in said if line.startswith("Recording CUDA graphs of the target [")]
    assert any(line.startswith(f"CUDA graphs of the target: {len(buckets)} of {len(buckets)} in ") for line in said)
    assert recorder.num_recorded > len(buckets), "those that are timed, too"
    assert len(recorder.alive) == len(buckets), "which are let go again"
    requests = greedy(4)
    assert drive(core, requests).tokens == {(r.id, 0): answer(r, naive_target()) for r in requests}
    assert recorder.num_repeated > recorder.num_recorded


def test_off_is_off(tmp_path: Path, recorder: CallingRecorder) -> None:
    said = list[str]()
    build(config(tmp_path, "off"), said.append)
    assert recorder.num_recorded == 0
    assert not any("CUDA graphs" in line for line in said)
    assert recorder_of("off", torch.device("cuda")) is None


def test_keys_are_checked() -> None:
    assert RuntimeConfig.model_validate({"cuda_graph_memory": "512MiB"}).cuda_graph_memory == 512 << 20
    for wrong in ({"cuda_graphs": "on"}, {"cuda_graphs": True}, {"cuda_graph_memory": 0}, {"cuda_graph_memory": "much"}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            RuntimeConfig.model_validate(wrong)
