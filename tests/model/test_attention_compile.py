"""Our kernels compile for GPUs, also where there is none: Triton brings its compiler along."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from engine.model.attention import AttentionShape
from engine.model.ragged import power_of_two
from engine.model.triton_attention import TritonAttention, launch_options

pytestmark = [
    pytest.mark.skipif(
        find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1", reason="needs Triton, without TRITON_INTERPRET"
    ),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning"),  # Triton 3.9 announces what 3.10 does
]

NAMES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
SHARED_BYTES = 99 << 10  # of a program, on devices of compute capability 8.6, 8.9 and 12.0; larger ones have 163 KiB and more


def compiled(kernel: Any, capability: int, types: dict[str, str], constants: dict[str, Any], **options: int) -> Any:
    """As a launch with addresses and strides that are multiples of 16 would have it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    aligned = [name for name, kind in types.items() if kind.startswith("*") or name.endswith("stride")]
    source = ASTSource(
        fn=kernel,
        signature={name: "constexpr" if name in constants else types[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.mark.parametrize("rows", [16, 64])
@pytest.mark.parametrize(
    ("head_dim", "dtype", "capability"),
    [
        *((head_dim, torch.bfloat16, 90) for head_dim in (16, 64, 80, 128, 256)),
        (128, torch.float16, 80),
        (128, torch.float32, 90),
    ],
)
def test_attention_compiles(head_dim: int, dtype: torch.dtype, capability: int, rows: int) -> None:
    from engine.model import kernels

    shape = AttentionShape(32, 8, head_dim, (None,), dtype, torch.device("cpu"))
    pointers = dict.fromkeys(("query", "cache", "output", "levels"), NAMES[dtype]) | dict.fromkeys(("tables", "tiles", "num_parts"), "*i32")
    numbers = dict.fromkeys(("query_stride", "cache_stride", "table_stride", "window"), "i32") | {"scale": "fp32"}
    constants = {"NUM_KV_HEADS": 8, "GROUP": 4, "HEAD_DIM": head_dim, "BLOCK_SIZE": 16, "BLOCK_M": rows, "BLOCK_D": power_of_two(head_dim)}
    for is_split, has_window in ((True, False), (False, True)):
        own = pointers | ({"output": "*fp32", "levels": "*fp32"} if is_split else {})
        block = {"BLOCK_N": TritonAttention().num_keys(rows, shape), "HAS_WINDOW": has_window, "IS_SPLIT": is_split}
        made = compiled(kernels.attend, capability, own | numbers, constants | block, **launch_options(rows, head_dim))
        assert made.metadata.shared <= (SHARED_BYTES if dtype.itemsize == 2 else 163 << 10)


@pytest.mark.parametrize("dtype", NAMES)
def test_writing_and_joining_compile(dtype: torch.dtype) -> None:
    from engine.model import kernels

    types = {"kv": NAMES[dtype], "cache": NAMES[dtype], "slots": "*i32", "kv_stride": "i32", "cache_stride": "i32"}
    assert compiled(kernels.write_kv, 90, types, {"WIDTH": 2048, "BLOCK": 1024}).asm["cubin"]
    types = {"parts": "*fp32", "levels": "*fp32", "tiles": "*i32", "num_parts": "*i32", "output": NAMES[dtype]}
    constants = {"NUM_KV_HEADS": 8, "GROUP": 4, "HEAD_DIM": 128, "BLOCK_M": 64, "BLOCK_D": 128}
    assert compiled(kernels.join, 90, types, constants).asm["cubin"]
