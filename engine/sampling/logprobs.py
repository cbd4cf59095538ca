"""Log-probabilities of what is emitted, for requests that ask for them.

They are those of the target's own row, at temperature 1 and in front of masks, biases and penalties: how likely the model itself finds a
token, whatever was asked of the sampler. So they say the same of a token that was drafted and stood, that was recovered, or that is the
bonus, under every rule: the row of a position is a function of the text in front of it.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike

import torch
from torch import Tensor

from engine.plan import RowBatch, Verdict
from engine.request import TokenLogprobs
from engine.transfer import to_device


def logprobs_of(logits: Tensor, rows: RowBatch, verdict: Verdict) -> list[tuple[TokenLogprobs, ...]]:
    """Of each of the B windows, one for each token that it emits; none for a request that wants none.

    `logits` [R, V] are the target's, `rows` says whose. Nothing is read from the device where nobody asks.
    """
    first = [row for row, offset in enumerate(rows.offsets) if offset == 0]  # of each window
    wanted = [rows.seqs[row].request.sampling.num_logprobs for row in first]
    chosen = [
        (window, begin + i, token)
        for window, begin in enumerate(first)
        if wanted[window] is not None
        for i, token in enumerate(verdict.token_ids[window])
    ]
    found: list[list[TokenLogprobs]] = [[] for _ in first]
    if not chosen:
        return [()] * len(first)
    windows, places, tokens = zip(*chosen, strict=True)
    for window, token in zip(
        windows, _of_rows(logits[to_device(places, logits.device)], tokens, max(num for num in wanted if num is not None)), strict=True
    ):
        found[window].append(_cut(token, wanted[window] or 0))
    return [tuple(tokens) for tokens in found]


def _of_rows(logits: Tensor, tokens: ListLike[int], num_top: int) -> list[TokenLogprobs]:
    """One token of each row of logits [N, V], with the `num_top` likeliest of the row."""
    log_p = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    own = log_p.gather(-1, to_device(tokens, logits.device).unsqueeze(-1))
    top = log_p.topk(min(num_top, log_p.shape[-1]), dim=-1)
    values, ids = torch.cat([own, top.values], dim=-1).tolist(), top.indices.tolist()
    return [TokenLogprobs(value, tuple(zip(row_ids, row, strict=True))) for (value, *row), row_ids in zip(values, ids, strict=True)]


def _cut(token: TokenLogprobs, num_top: int) -> TokenLogprobs:
    return token if len(token.top) <= num_top else TokenLogprobs(token.logprob, token.top[:num_top])
