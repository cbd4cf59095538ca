"""The state adapter: what serves computes what was trained, on disk and off it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import ConfigError, SourceError
from engine.model.linear import choose
from engine.model.state_adapter import FILE, AdapterWeights, StateAdapter, read_adapter, write_adapter
from tests.tiny import Setup, make_core

CPU = torch.device("cpu")


def weights(hidden: int = 12, width: int = 7, of_target: int = 20, is_chained: bool = True) -> AdapterWeights:
    torch.manual_seed(1)
    made = AdapterWeights(hidden, width, of_target, is_chained).requires_grad_(False)
    for weight in made.parameters():
        weight.normal_()
    return made


@pytest.mark.parametrize("is_targets", [True, False])
@pytest.mark.parametrize("kind", ["none", "int8"])
def test_what_serves_computes_what_was_trained(kind: str, is_targets: bool) -> None:
    made, states = weights(64, 48, 96), torch.randn(9, 64)
    before = torch.randn(9, 96 if is_targets else 64)
    want = made(states, before, is_targets)
    got = StateAdapter(made, choose(kind, torch.float32, CPU))(states, before, is_targets)  # type: ignore[arg-type]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 if kind == "none" else 0.05 * float(want.abs().max()))


def test_a_fresh_one_adds_nothing() -> None:
    states = torch.randn(3, 12)
    assert torch.equal(AdapterWeights(12, 7, 20, is_chained=False)(states, torch.randn(3, 20), is_targets=True), states)


@pytest.mark.parametrize("is_chained", [True, False])
def test_it_comes_back_from_disk_as_it_was(is_chained: bool, tmp_path: Path) -> None:
    made = weights(is_chained=is_chained)
    write_adapter(tmp_path, made, torch.float32)
    found = read_adapter(tmp_path, 12, torch.float32, CPU)
    assert found is not None
    assert StateAdapter(found).is_chained is is_chained
    assert found.state_dict().keys() == made.state_dict().keys()
    assert all(torch.equal(own, found.state_dict()[name]) for name, own in made.state_dict().items())
    assert read_adapter(tmp_path / "elsewhere", 12, torch.float32, CPU) is None


def test_a_file_of_another_shape_or_none_at_all_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path, weights(), torch.float32)
    with pytest.raises(SourceError, match="does not hold an adapter of a drafter of width 13"):
        read_adapter(tmp_path, 13, torch.float32, CPU)
    save_file({"own.weight": torch.zeros(2, 12)}, tmp_path / FILE)
    with pytest.raises(SourceError, match="does not hold an adapter"):
        read_adapter(tmp_path, 12, torch.float32, CPU)
    (tmp_path / FILE).write_bytes(b"no tensors")
    with pytest.raises(SourceError, match="cannot be read"):
        read_adapter(tmp_path, 12, torch.float32, CPU)


def test_a_target_of_another_width_is_refused_with_the_key_to_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.tiny.adapter_weights", lambda _: weights(16, 6, 24).double())
    with pytest.raises(ConfigError, match=r"states of width 24, and model\.target has 16; set model\.drafter\.target_states to false"):
        make_core(Setup(drafter="model", reads_states="all"))
