"""Recording with torch's CUDA graphs. The only file that names them."""

from __future__ import annotations

from collections.abc import Callable

import torch

from engine.config import CudaGraphs
from engine.model.graphs import Recorder
from engine.model.memory import gpu_memory

_WARM_UPS = 2  # compile kernels, choose algorithms and allocate workspaces, none of which may happen while a stream is recorded


class CudaRecorder:
    """All that it records shares memory, so one recording is to be repeated at a time, and what it leaves is to be read before the next."""

    def __init__(self, device: torch.device):
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        with torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            with torch.cuda.stream(self._stream):
                for _ in range(_WARM_UPS):
                    run()
            current.wait_stream(self._stream)
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # what only warming up needed
            graph = torch.cuda.CUDAGraph()
            # not torch.cuda.graph(): where ending fails, that leaves its own stream current
            with torch.cuda.stream(self._stream):
                # only this thread is watched: others may allocate
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    run()
                finally:
                    graph.capture_end()
        return graph.replay

    def free_bytes(self) -> int:
        return gpu_memory(self._device)[0]


def recorder_of(asked: CudaGraphs, device: torch.device) -> Recorder | None:
    """None where passes are launched kernel by kernel."""
    return CudaRecorder(device) if asked == "auto" and device.type == "cuda" else None
