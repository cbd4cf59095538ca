"""Recording with torch's CUDA graphs. The only file that names torch's classes for it, and a private function beside them."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress

import torch

from engine.config import CudaGraphs
from engine.model.graphs import Recorder
from engine.model.memory import gpu_memory

_WARM_UPS = 2  # compile kernels, choose algorithms and allocate workspaces, none of which may happen while a stream is recorded


_failed: list[torch.cuda.CUDAGraph] = []


class CudaRecorder:
    """All that it records shares memory, so one recording is to be repeated at a time, and what it leaves is to be read before the next."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        self.begin()

    def begin(self) -> None:
        gc.collect()  # nothing that CUDA is to destroy is left for the time in which a stream is recorded
        self._pool = torch.cuda.graph_pool_handle()  # memory of a pool comes back when nothing is left in it
        self._is_spoilt = False

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        if self._is_spoilt:
            raise RuntimeError("an earlier recording could not be ended")
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):
                    run()
            current.wait_stream(self._stream)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # what only warming up needed
            with torch.cuda.stream(self._stream):
                return self._recorded(run).replay

    def _recorded(self, run: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Not by torch.cuda.graph(): where ending fails, that leaves its own stream current."""
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")  # other threads may do what they like
        try:
            run()
        finally:
            self._end(graph)
        return graph

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        try:
            graph.capture_end()
        except RuntimeError:
            # torch 2.13 leaves its allocators as they are while something is recorded: the device's would give nothing back any more, the
            # host's goes on asking this graph whose memory is whose, and neither can begin once more with this pool
            self._is_spoilt = True
            _failed.append(graph)
            with suppress(RuntimeError):  # the allocator was told already where what came after it failed
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
            raise

    def free_bytes(self) -> int:
        return gpu_memory(self._device)[0]


def recorder_of(asked: CudaGraphs, device: torch.device) -> Recorder | None:
    """None where passes are launched kernel by kernel."""
    return CudaRecorder(device) if asked == "auto" and device.type == "cuda" else None
