"""Log-probabilities of what is emitted and of prompts, for requests that ask for them.

They are those of the target's own row, at temperature 1 and in front of masks, biases and penalties: how likely the model itself finds a
token, whatever was asked of the sampler. So they say the same of a token that was drafted and stood, that was recovered, that is the
bonus, or that a client wrote, under every rule: the row of a position is a function of the text in front of it.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from itertools import chain, islice
from typing import NamedTuple

import torch
from torch import Tensor

from engine.plan import Logprobs, RowBatch, Verdict
from engine.request import TokenLogprobs
from engine.sequence import Sequence
from engine.transfer import to_device

_MAX_ROWS = 64  # that are there in full precision at once, beside the logits that the pass has left


class _Wanted(NamedTuple):
    """A token that somebody asks about."""

    row: int  # of the logits: the one that chooses it
    token_id: int
    num_top: int


def logprobs_of(logits: Tensor, rows: RowBatch, verdict: Verdict) -> Logprobs:
    """Of each of the B windows, one for each token that it emits, and those of prompt tokens that other rows choose.

    `logits` [R, V] are all that the target gave, `rows` says whose. Nothing is read from the device where nobody asks.
    """
    first = [row for row, offset in enumerate(rows.offsets) if offset == 0]  # of each window
    emitted = [_of_window(rows, row, token_ids) for row, token_ids in zip(first, verdict.token_ids, strict=True)]
    prompts = _of_prompts(rows)
    found = iter(_found(logits, [*chain(*emitted, *prompts.values())]))
    return Logprobs(
        emitted=tuple(tuple(islice(found, len(wanted))) for wanted in emitted),
        prompts={seq: tuple(islice(found, len(wanted))) for seq, wanted in prompts.items()},
    )


def _of_window(rows: RowBatch, first: int, token_ids: ListLike[int]) -> list[_Wanted]:
    num_top = rows.seqs[first].request.sampling.num_logprobs
    return [] if num_top is None else [_Wanted(first + i, token_id, num_top) for i, token_id in enumerate(token_ids)]


def _of_prompts(rows: RowBatch) -> dict[Sequence, list[_Wanted]]:
    """The prompt tokens that rows in front of the windows choose. After a preemption some are run again that are known."""
    wanted: dict[Sequence, list[_Wanted]] = {}
    for row, (seq, offset) in enumerate(zip(rows.seqs, rows.offsets, strict=True)):
        if offset < 0 and seq.num_scored <= (position := len(seq.tokens) + offset) < len(seq.request.prompt_ids):
            wanted.setdefault(seq, []).append(_Wanted(row, seq.tokens[position], seq.request.sampling.num_prompt_logprobs or 0))
    return wanted


def _found(logits: Tensor, wanted: ListLike[_Wanted]) -> list[TokenLogprobs]:
    return [token for start in range(0, len(wanted), _MAX_ROWS) for token in _of_rows(logits, wanted[start : start + _MAX_ROWS])]


def _of_rows(logits: Tensor, wanted: ListLike[_Wanted]) -> list[TokenLogprobs]:
    """One token of each of some rows of logits [R, V], with the likeliest of the row."""
    rows, tokens, nums = (list(column) for column in zip(*wanted, strict=True))
    chosen = logits[to_device(rows, logits.device)]
    log_p = torch.log_softmax(chosen.to(torch.promote_types(chosen.dtype, torch.float32)), dim=-1)
    own = log_p.gather(-1, to_device(tokens, logits.device).unsqueeze(-1))
    top = log_p.topk(min(max(nums), log_p.shape[-1]), dim=-1)
    values, ids = torch.cat([own, top.values], dim=-1).tolist(), top.indices.tolist()
    return [
        TokenLogprobs(value, tuple(zip(row_ids[:num], row[:num], strict=True)))
        for (value, *row), row_ids, num in zip(values, ids, nums, strict=True)
    ]
