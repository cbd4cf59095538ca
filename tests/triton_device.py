"""Where Triton's kernels run in tests, on a CUDA device or step by step on a CPU, and what whole engines are asked there."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from importlib.util import find_spec

import pytest
import torch

from engine.config import FixedLengthConfig
from engine.request import Request
from tests.reference import NaiveModel, answer
from tests.tiny import VOCAB, Setup, target_model
from tests.verify.requests import greedy

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not IS_INTERPRETED else "cpu")

NEEDS_TRITON = [
    pytest.mark.skipif(
        find_spec("triton") is None or (DEVICE.type == "cpu" and not IS_INTERPRETED),
        reason="needs Triton, and a CUDA device or TRITON_INTERPRET=1",
    ),
    *([pytest.mark.gpu] if DEVICE.type == "cuda" else []),
    pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning"),  # Triton 3.9 announces what 3.10 does
]


def needs_triton(test: Callable[..., None]) -> Callable[..., None]:
    """The same for one test of a file."""
    for mark in NEEDS_TRITON:
        test = mark(test)
    return test


def asked_of(architecture: str) -> tuple[list[Request], dict[tuple[str, int], tuple[int, ...]]]:
    """Greedy requests, and the naive loop's text for them in float64, over the weights that float32 has."""
    requests = greedy(3)
    naive = NaiveModel(copy.deepcopy(target_model(torch.float32, VOCAB, architecture)).to(torch.float64))
    return requests, {(r.id, 0): answer(r, naive) for r in requests}


def tight(architecture: str, drafter: str, requests: list[Request]) -> Setup:
    """A small pool, so that sequences are preempted and blocks used again; prompts in pieces, beside verify windows and single tokens."""
    longest = max(len(r.prompt_ids) + r.sampling.max_tokens for r in requests)
    return Setup(
        architecture=architecture,
        drafter=drafter,
        policy=FixedLengthConfig(max=3),
        block_size=2,
        num_blocks=-(-longest // 2),
        max_step_tokens=7,
        device=str(DEVICE),
        dtype=torch.float32,
    )
