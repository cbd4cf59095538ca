"""How likely the target finds a text: teacher forcing with the engine's own target, beside its KV cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy

from benchmarks.errors import BenchmarkError
from engine.core import EngineCore
from engine.model.attention import Segment
from engine.model.paged import PagedModel

BLOCK_SIZE = 16
MAX_ROWS = 128  # logits of so many tokens are in memory at once


class Likelihood:
    """The target of an engine as a judge of texts. It has a KV cache of its own: the engine's holds prompts that are asked again."""

    def __init__(self, core: EngineCore, max_tokens: int):
        """`max_tokens` is the longest prompt and answer together."""
        stack = core._parts.runner._target.stack  # the weights that answer; nothing public lends them
        self._device = stack.device
        self._blocks = list(range(-(-max_tokens // BLOCK_SIZE)))
        self._model = PagedModel(stack, len(self._blocks), BLOCK_SIZE)

    def nats(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> float:
        """-log p(token_ids | prompt_ids), at temperature 1 and without truncation. Raises BenchmarkError for a token without a row."""
        if max(token_ids) >= self._model.vocab_size:
            raise BenchmarkError(f"Token {max(token_ids)} was written, and the target has {self._model.vocab_size} only.")
        total = torch.zeros((), dtype=torch.float64)
        inputs = [*prompt_ids, *token_ids[:-1]]
        start = len(prompt_ids) - 1  # its row judges the first token
        self._run(inputs, 0, start, ())
        for begin in range(0, len(token_ids), MAX_ROWS):
            right = torch.tensor(token_ids[begin : begin + MAX_ROWS], device=self._device)
            logits = self._run(inputs, start + begin, start + begin + len(right), range(len(right)))
            total += cross_entropy(logits.float(), right, reduction="sum").cpu()
        return float(total)

    def _run(self, ids: list[int], start: int, end: int, rows: Sequence[int]) -> torch.Tensor:
        """Logits [R, V] of rows of the pass over positions start to end."""
        if end <= start:
            return torch.empty(0)
        segment = Segment(self._blocks, start, end - start)
        return self._model.forward([segment], torch.tensor(ids[start:end], device=self._device), list(rows))
