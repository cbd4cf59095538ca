"""Norms as one operation: only where the bits stay."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from engine.model.layer_math import OwnNorm, QuickNorm, quick_norm


@pytest.mark.parametrize("own", [LlamaRMSNorm(24, 1e-5), Gemma3RMSNorm(24, 1e-6)], ids=["llama", "gemma"])
@torch.inference_mode()
def test_a_known_norm_becomes_one_operation_with_the_same_bits(own: nn.Module) -> None:
    generator = torch.Generator().manual_seed(3)
    own.load_state_dict({"weight": torch.randn(24, generator=generator)})
    quick = quick_norm(own)
    assert isinstance(quick, QuickNorm)
    x = 50 * torch.randn(5, 7, 24, generator=generator)
    assert torch.equal(quick(x), own(x))


class _Centred(nn.Module):
    """A norm of another kind with the same attributes."""

    variance_epsilon = 1e-5

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (8,), self.weight)


@pytest.mark.parametrize("own", [_Centred(), nn.LayerNorm(8), nn.Identity()], ids=["centred", "layer norm", "none"])
@torch.inference_mode()
def test_another_module_stays_as_it_is(own: nn.Module) -> None:
    quick = quick_norm(own)
    assert isinstance(quick, OwnNorm)
    assert quick.own is own


@torch.inference_mode()
def test_a_norm_that_rounds_in_between_stays_as_it_is() -> None:
    own = LlamaRMSNorm(64, 1e-5).to(torch.bfloat16)
    own.weight.data.copy_(torch.randn(64, generator=torch.Generator().manual_seed(3)))
    quick = quick_norm(own)
    x = 3 * torch.randn(64, 64, generator=torch.Generator().manual_seed(4)).to(torch.bfloat16)
    assert torch.equal(quick(x), own(x))
