"""What all tests share."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the program does, before torch is loaded


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny models run faster on one thread than on two; tests of real ones set their own."""
    import torch  # here, so that a run of torch-free tests alone stays torch-free

    torch.set_num_threads(1)
