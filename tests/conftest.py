"""What all tests share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from engine.config import ModelSource
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


@pytest.fixture(scope="session", autouse=True)
def _own_cache(request: pytest.FixtureRequest, _own_temporary_folder: None) -> Iterator[None]:
    """What passes cost is measured anew and forgotten, since a machine that runs tests is busy. Converted models are the user's."""
    from engine.model.source import EMBEDDED_MODULE, default_cache_dir, resolve

    if any(item.get_closest_marker("embedded") for item in request.session.items) and find_spec(EMBEDDED_MODULE) is not None:
        resolve(ModelSource(source=f"package:{EMBEDDED_MODULE}/SmolLM2-135M-Instruct.Q4_1.gguf"))  # once, where it is found again
    theirs, ours = default_cache_dir(), Path(tempfile.mkdtemp(prefix="cache-"))
    for entry in theirs.iterdir() if theirs.is_dir() else ():
        if entry.name != "costs":
            (ours / entry.name).symlink_to(entry)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CASCADE_CACHE_DIR", str(ours))
        yield
