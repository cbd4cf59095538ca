"""Our kernels between products compile for GPUs, also where there is none, and read and write whole vectors."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn

from engine.model.layer_math import RotatedHeads
from engine.model.triton_layer import NormForm, TritonGating, TritonNorm, TritonRotation
from tests.model.test_attention_compile import NAMES, compiled

pytestmark = [
    pytest.mark.skipif(
        find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1", reason="needs Triton, without TRITON_INTERPRET"
    ),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning"),  # Triton 3.9 announces what 3.10 does
]

LLAMA_8B = (4096, 14_336, 32, 8, 128)  # hidden, intermediate, heads of queries and of keys, head dimension
QWEN3_SMALL = (1024, 3072, 16, 8, 128)
SMOLLM2 = (576, 1536, 9, 3, 64)
PHI_LIKE = (2560, 10_240, 32, 8, 80)
TARGETS = [(90, torch.bfloat16), (80, torch.bfloat16), (80, torch.float16), (90, torch.float32)]


class Launches:
    """In the place of the module of kernels: compiles what is launched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capability: int):
        from engine.model import layer_kernels

        self.capability, self.made = capability, list[Any]()
        monkeypatch.setattr("engine.model.triton_layer._kernels", lambda: self)
        self._kernels = layer_kernels

    def __getattr__(self, name: str) -> Any:
        kernel = getattr(self._kernels, name)

        class Grids:
            def __getitem__(_, grid: tuple[int, ...]) -> Any:
                return lambda *tensors, **constants: self._compile(kernel, tensors, constants)

        return Grids()

    def _compile(self, kernel: Any, tensors: tuple[torch.Tensor, ...], constants: dict[str, Any]) -> None:
        options = {"num_warps": constants.pop("num_warps")}
        pointers = {name: NAMES[tensor.dtype] for name, tensor in zip(kernel.arg_names, tensors, strict=False)}
        self.made.append(compiled(kernel, self.capability, pointers, constants, **options))

    def require_vectors(self) -> None:
        made = self.made.pop()
        assert made.asm["cubin"]
        for one in ("ld.global", "st.global"):
            assert any(one in line and (".v4.b32" in line or ".v2.b64" in line) for line in made.asm["ptx"].splitlines()), one
        assert made.metadata.shared <= 48 << 10


@pytest.mark.parametrize(("capability", "dtype"), TARGETS)
@pytest.mark.parametrize("shape", [LLAMA_8B, QWEN3_SMALL, SMOLLM2, PHI_LIKE], ids=["llama", "qwen3", "smollm2", "80 a head"])
def test_they_compile(shape: tuple[int, ...], capability: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, intermediate, num_queries, num_keys, head_dim = shape
    launches = Launches(monkeypatch, capability)
    x, form = torch.zeros(2, hidden, dtype=dtype), NormForm(0.0, rounds_first=True)
    norm, head_norm = (TritonNorm(torch.ones(width, dtype=dtype), 1e-5, form) for width in (hidden, head_dim))
    for delta in (None, x):
        norm(x, delta)
        launches.require_vectors()
    heads, table = torch.zeros(2, num_queries + 2 * num_keys, head_dim, dtype=dtype), torch.zeros(2, head_dim, dtype=dtype)
    for norms in (None, (head_norm, head_norm)):
        TritonRotation(RotatedHeads(num_queries, num_keys, head_dim, nn.Identity(), nn.Identity()), norms)(heads, (table, table))
        launches.require_vectors()
    for is_gelu in (False, True):
        TritonGating(is_gelu)(torch.zeros(2, 2 * intermediate, dtype=dtype))
        launches.require_vectors()
