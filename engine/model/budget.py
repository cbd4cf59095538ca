"""How much memory the KV cache gets, and how many blocks and tokens that is.

Where the deployment leaves it to the engine (engine.kv_cache: auto), it is on a GPU `gpu_memory_fraction` of its memory, less what is in
use once the weights are there, less a reserve for what a step takes beside:

    activations     for each row of a pass, what its widest layer holds at once
    distributions   for each row of the verify windows, rows over the vocabulary of both models and of who judges them
    scores          for each row of a pass, the logits of the target, which a prompt that is scored wants all of
    libraries       a GiB: their workspaces, and what lies between allocations
    recorded passes engine.cuda_graph_memory, unless engine.cuda_graphs is off, or the attention chosen cannot be recorded

and, since a step may gather what it attends to, two layers' shares of the cache. On a CPU, whose memory others use as well, it is a
GiB, or what an answer of `max_model_len` takes, if that is more.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import Any

import torch

from engine.config import RuntimeConfig
from engine.errors import ConfigError
from engine.model.memory import ADVICE, available_bytes, gpu_memory

ON_CPU = 1 << 30
LIBRARIES = 1 << 30
_GATHERED_LAYERS = 2
_STATES, _PRODUCTS = 6, 3  # of the width of the model, and of its feed-forward layer: what is alive at once within a layer
_FLOAT32_ROWS = 5  # logits, rows of drafter and target, and two of whoever compares them


@dataclass(frozen=True)
class Footprint:
    """What decides how much a pass of a model takes."""

    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_layers: int
    itemsize: int  # of its dtype
    kv_bytes_per_token: int
    is_recordable: bool = True  # its passes, as far as its attention goes

    @classmethod
    def of(cls, config: Any, dtype: torch.dtype, kv_bytes_per_token: int, is_recordable: bool = True) -> Footprint:
        """By a transformers config."""
        sizes = config.hidden_size, config.intermediate_size, config.vocab_size, config.num_hidden_layers
        return cls(*sizes, dtype.itemsize, kv_bytes_per_token, is_recordable)


def reserve_bytes(runtime: RuntimeConfig, max_draft: int, models: ListLike[Footprint]) -> int:
    """What a step takes at most, about, beside weights and KV. `models` are those of the pair, the target first."""
    num_rows = runtime.max_step_tokens
    num_in_windows = min(num_rows, runtime.max_sequences * (max_draft + 1))
    activations = max(num_rows * m.itemsize * (_STATES * m.hidden_size + _PRODUCTS * m.intermediate_size) for m in models)
    distributions = max(num_in_windows * m.vocab_size * (m.itemsize + 4 * _FLOAT32_ROWS) for m in models)
    scores = num_rows * models[0].vocab_size * models[0].itemsize  # the copy of the windows among them is in the distributions
    is_recorded = runtime.cuda_graphs == "auto" and any(m.is_recordable for m in models)
    recorded = int(runtime.cuda_graph_memory) if is_recorded else 0
    return LIBRARIES + recorded + activations + distributions + scores


def kv_budget(runtime: RuntimeConfig, device: torch.device, max_draft: int, models: ListLike[Footprint], weight_bytes: int = 0) -> int:
    """Bytes for the KV of the pair. `weight_bytes` is what is still to be loaded. Raises ConfigError where nothing is left."""
    if runtime.kv_cache is not None:
        return int(runtime.kv_cache)
    if device.type != "cuda":
        num_blocks = -(-(runtime.max_model_len or 0) // runtime.block_size)
        return max(ON_CPU, num_blocks * runtime.block_size * sum(model.kv_bytes_per_token for model in models))
    free, total = gpu_memory(device)
    in_use, reserve = total - free + weight_bytes, reserve_bytes(runtime, max_draft, models)
    left = int(runtime.gpu_memory_fraction * total) - in_use - reserve
    if left <= 0:
        raise ConfigError(
            f"engine.gpu_memory_fraction: {runtime.gpu_memory_fraction:g} - leaves nothing for the KV cache: of {total / 2**30:.1f} GiB on "
            f"{device} {in_use / 2**30:.1f} are in use with the weights, and a step needs {reserve / 2**30:.1f}. Raise it, or {ADVICE}."
        )
    num_layers = models[0].num_layers
    return left * num_layers // (num_layers + _GATHERED_LAYERS)


@dataclass(frozen=True)
class MemoryPlan:
    """What the KV cache holds."""

    bytes_per_token: int  # in all layers of target and drafter
    num_blocks: int
    max_model_len: int


def plan_memory(config: RuntimeConfig, bytes_per_token: int, model_context: int, kv_bytes: int) -> MemoryPlan:
    """Blocks that fit into `kv_bytes`, and the context that can be served: the smaller of model, pool and `max_model_len`.

    Raises ConfigError where not even one block fits, or where a `max_model_len` was asked for that cannot be served.
    """
    block_bytes = bytes_per_token * config.block_size
    num_blocks = kv_bytes // block_bytes
    if num_blocks < 1:
        raise ConfigError(f"engine.kv_cache: {kv_bytes} bytes - must be at least {block_bytes}, the size of one block")
    served = min(model_context, num_blocks * config.block_size)
    asked = config.max_model_len
    if asked is not None and asked > served:
        why = f"the model's context is {model_context}" if model_context < asked else "engine.kv_cache holds no more; raise it"
        raise ConfigError(f"engine.max_model_len: {asked} - must be at most {served}: {why}")
    return MemoryPlan(bytes_per_token, num_blocks, served if asked is None else asked)


def require_memory(kv_bytes: int, device: torch.device) -> None:
    """Refuse a KV cache that the device has no room for. Raises ConfigError."""
    free = available_bytes(device)
    if free is not None and kv_bytes > free:
        raise ConfigError(
            f"engine.kv_cache: {kv_bytes / 2**30:.1f} GiB - must be at most {free / 2**30:.1f} GiB, "
            f"what {device} has free beside the weights"
        )
