"""In which order torch is asked to record, and what is left where that fails. Its side is a stand-in that writes down what it is asked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from engine.model import cuda_graphs
from engine.model.cuda_graphs import CudaRecorder


class Cuda:
    """Streams by name, and what was asked while which one was current."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.asked: list[str] = []
        self.current = Stream(self, "default")
        self.fails_to_end = False
        for name, stand_in in {
            "graph_pool_handle": lambda: (0, 7),
            "Stream": lambda device: Stream(self, "side"),
            "current_stream": lambda: self.current,
            "current_device": lambda: 0,
            "device": lambda device: self.on(self.current),
            "stream": self.on,
            "synchronize": lambda: self.note("synchronize"),
            "empty_cache": lambda: self.note("empty"),
            "CUDAGraph": lambda: Graph(self),
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)
        monkeypatch.setattr(
            torch._C, "_cuda_endAllocateToPool", lambda device, pool: self.note(f"end pool {pool[1]} of {device}"), raising=False
        )
        monkeypatch.setattr(cuda_graphs, "_failed", [])

    def note(self, what: str) -> None:
        self.asked.append(f"{self.current.name}: {what}")

    @contextmanager
    def on(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before


class Stream:
    def __init__(self, cuda: Cuda, name: str):
        self._cuda, self.name = cuda, name

    def wait_stream(self, other: Stream) -> None:
        self._cuda.asked.append(f"{self.name} waits for {other.name}")


class Graph:
    def __init__(self, cuda: Cuda):
        self._cuda = cuda

    def capture_begin(self, pool: tuple[int, int], **_: Any) -> None:
        self._cuda.note(f"begin in pool {pool[1]}")

    def capture_end(self) -> None:
        self._cuda.note("end")
        if self._cuda.fails_to_end:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self) -> None:
        self._cuda.note("replay")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    return Cuda(monkeypatch)


WARMED_UP = ["side waits for default", "side: run", "side: run", "default waits for side", "default: synchronize", "default: empty"]


def test_it_warms_up_beside_records_and_repeats_where_it_is_asked(cuda: Cuda) -> None:
    repeat = CudaRecorder(torch.device("cuda")).record(lambda: cuda.note("run"))
    assert cuda.asked == [*WARMED_UP, "side: begin in pool 7", "side: run", "side: end"]
    repeat()
    assert cuda.asked[-1] == "default: replay"
    assert cuda.current.name == "default"


def test_memory_that_runs_out_spoils_nothing(cuda: Cuda) -> None:
    recorder, is_full = CudaRecorder(torch.device("cuda")), True

    def run() -> None:
        cuda.note("run")
        if is_full and cuda.asked[-2].endswith("begin in pool 7"):
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        recorder.record(run)
    assert cuda.asked[-1] == "side: end"
    assert cuda.current.name == "default"
    is_full = False
    recorder.record(run)()


def test_a_recording_that_cannot_be_ended_is_the_last(cuda: Cuda) -> None:
    recorder = CudaRecorder(torch.device("cuda"))
    cuda.fails_to_end = True
    with pytest.raises(RuntimeError, match="previous error"):
        recorder.record(lambda: cuda.note("run"))
    assert cuda.asked[-2:] == ["side: end", "side: end pool 7 of 0"]
    assert cuda.current.name == "default"
    assert len(cuda_graphs._failed) == 1, "torch's allocator still asks it"
    cuda.asked.clear()
    with pytest.raises(RuntimeError, match="an earlier recording could not be ended"):
        recorder.record(lambda: cuda.note("run"))
    assert cuda.asked == []
