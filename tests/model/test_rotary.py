"""Rotary tables give the bits that the model computes."""

from __future__ import annotations

import pytest
import torch

from engine.model import rotary
from engine.model.layer_math import signed
from engine.model.rotary import RotaryTables
from tests.tiny import target_model


@pytest.mark.parametrize("most_bytes", [0, 1 << 20])
@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
def test_looked_up_or_computed_they_are_the_model_s(architecture: str, most_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotary, "_MOST_BYTES", most_bytes)
    model = target_model(architecture=architecture)
    tables = RotaryTables(model, model.model.embed_tokens.weight[None, :1], signed)
    positions = torch.tensor([7, 0, 3, 3, 12])
    found = tables.at(positions, tables.kinds)
    assert len(tables.kinds) == len(model.model.layers)
    assert len(found) == (2 if architecture == "gemma3_text" else 1)
    assert all((whole is None) == (most_bytes == 0) for whole in tables._whole.values())
    for kind, (cosines, sines) in found.items():
        wanted = signed(*model.model.rotary_emb(torch.zeros(1, 5, 8, dtype=torch.float64), positions.unsqueeze(0), *kind))
        assert torch.equal(cosines, wanted[0])
        assert torch.equal(sines, wanted[1])
