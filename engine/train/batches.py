"""Which examples go through the models together, and in which order: a function of seed and epoch, so that a run can go on anywhere."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.train.shards import Example

_WINDOW = 512  # examples that are sorted by length together: long enough to pad little, short enough to stay mixed


@dataclass(frozen=True)
class Batch:
    """Examples side by side, filled up to the longest on the right; what is there sees nothing and is seen by nothing."""

    input_ids: Tensor  # [B, T]
    rows: Tensor  # [R], indices in B * T of the positions whose next token is the answer's, one example after another
    examples: tuple[int, ...]  # [B], indices in the list that it was made from
    counts: tuple[int, ...]  # [B], rows of each

    def to(self, device: torch.device) -> Batch:
        return Batch(self.input_ids.to(device), self.rows.to(device), self.examples, self.counts)


def passes(lengths: Sequence[int], pass_tokens: int, seed: int, epoch: int) -> list[tuple[int, ...]]:
    """All examples once, as the passes of an epoch; each has at most `pass_tokens` positions, or one example."""
    draw = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    draw.shuffle(order)
    found: list[tuple[int, ...]] = []
    for begin in range(0, len(order), _WINDOW):
        window = in_passes(order[begin : begin + _WINDOW], lengths, pass_tokens)
        draw.shuffle(window)
        found += window
    return found


def in_passes(examples: Sequence[int], lengths: Sequence[int], pass_tokens: int) -> list[tuple[int, ...]]:
    """Some examples, those of like length together."""
    found: list[tuple[int, ...]] = []
    current: list[int] = []
    for index in sorted(examples, key=lambda i: (lengths[i], i)):
        if current and (len(current) + 1) * lengths[index] > pass_tokens:
            found.append(tuple(current))
            current = []
        current.append(index)
    return [*found, tuple(current)] if current else found


def collate(examples: Sequence[Example], chosen: Sequence[int]) -> Batch:
    """The batch of some examples. Their last tokens predict nothing, and are left out."""
    width = max(len(examples[i]) for i in chosen) - 1
    input_ids = torch.zeros(len(chosen), width, dtype=torch.long)
    rows = []
    for place, index in enumerate(chosen):
        example = examples[index]
        ids = (*example.prompt_ids, *example.answer_ids[:-1])
        input_ids[place, : len(ids)] = torch.tensor(ids)
        begin = place * width + len(example.prompt_ids) - 1
        rows.append(torch.arange(begin, begin + len(example.answer_ids)))
    return Batch(input_ids, torch.cat(rows), tuple(chosen), tuple(len(examples[i].answer_ids) for i in chosen))
