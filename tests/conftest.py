"""What all tests share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator

import pytest

from engine.threads import set_defaults

set_defaults()  # as the program does, before torch is loaded


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Tiny models run faster on one thread than on two; tests of real ones set their own."""
    import torch  # here, so that a run of torch-free tests alone stays torch-free

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_temporary_folder() -> Iterator[None]:
    """So that a test can see what its engine left behind, whatever else runs. Short: paths of sockets have a limit of 107 bytes."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tempfile.mkdtemp(prefix="cascade-test-")
        patch.setenv("TMPDIR", folder)
        patch.setattr(tempfile, "tempdir", None)  # it is looked up once
        yield
    shutil.rmtree(folder, ignore_errors=True)
