"""From logits to the distributions that tokens are drawn from: processors, temperature, top-k, top-p, min-p.

One object serves runner and drafter, so that p and q are made in the same way. Temperature 0 is a one-hot distribution, and
nothing further down knows about it.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike

import torch
from torch import Tensor

from engine.plan import LogitsProcessor, RowBatch, Rows
from engine.request import SamplingParams
from engine.sampling.draws import favourites
from engine.transfer import to_device

# top-p looks at this many tokens first: a full sort of 49,152 costs ten times as much, and few rows need it
_NUM_TOP = 1024


class Distributions:
    """Turns logits [N, V] into Rows, each row by its own request's parameters."""

    def __init__(self, processors: ListLike[LogitsProcessor] = ()):
        self._masks = tuple(p for p in processors if p.is_mask)
        self._others = tuple(p for p in processors if not p.is_mask)

    def of(self, logits: Tensor, rows: RowBatch) -> Rows:
        """`logits` [N, V] in any floating dtype; the result is in float32 or wider."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        masked = logits
        for processor in self._masks:
            masked = processor.apply(masked, rows)
        allowed = None if masked is logits else masked > -torch.inf
        processed = masked
        for processor in self._others:
            processed = processor.apply(processed, rows)
        params = [seq.request.sampling for seq in rows.seqs]
        if all(s.is_greedy for s in params):
            only = favourites(processed)
            return Rows(_one_hot(processed, only), masked, allowed, only.squeeze(-1))
        return Rows(probabilities(processed, params), masked, allowed)


def probabilities(logits: Tensor, params: ListLike[SamplingParams]) -> Tensor:
    """Processed distributions [N, V] of logits [N, V]."""
    greedy = [i for i, s in enumerate(params) if s.is_greedy]
    temperatures = to_device([1.0 if s.is_greedy else s.temperature for s in params], logits.device, logits.dtype)
    probs = torch.softmax(logits / temperatures.unsqueeze(-1), dim=-1)
    cut = [i for i, s in enumerate(params) if not s.is_greedy and (s.top_k or s.top_p < 1 or s.min_p)]
    if cut:
        at = to_device(cut, probs.device)
        probs[at] = _truncated(probs[at], [params[i] for i in cut])
    if greedy:
        at = to_device(greedy, probs.device)
        own = logits[at]
        probs[at] = _one_hot(own, favourites(own))
    return probs


def _one_hot(logits: Tensor, chosen: Tensor) -> Tensor:
    """[N, V], of the token [N, 1] of each row."""
    return torch.zeros_like(logits).scatter_(-1, chosen, 1.0)


def _truncated(probs: Tensor, params: ListLike[SamplingParams]) -> Tensor:
    """Keep the tokens that pass top-k, top-p (of what top-k left) and min-p, and renormalise.

    Each is a threshold on the probability, so tokens of equal probability stand or fall together and the result does not depend
    on how a sort breaks ties, nor on which other rows are in the batch.
    """
    vocab = probs.shape[-1]
    top_k = to_device([min(s.top_k or vocab, vocab) for s in params], probs.device)
    top_p = to_device([s.top_p for s in params], probs.device, torch.float64)
    min_p = to_device([s.min_p for s in params], probs.device, probs.dtype)
    num_top = min(vocab, max(_NUM_TOP, *(s.top_k for s in params)))
    threshold, is_covered = _threshold(probs, top_k, top_p, num_top)
    if num_top < vocab and not bool(is_covered.all()):
        threshold, _ = _threshold(probs, top_k, top_p, vocab)
    threshold = torch.maximum(threshold, probs.amax(-1) * min_p)
    kept = torch.where(probs >= threshold.unsqueeze(-1), probs, 0)
    return kept / kept.sum(-1, keepdim=True)


def _threshold(probs: Tensor, top_k: Tensor, top_p: Tensor, num_top: int) -> tuple[Tensor, Tensor]:
    """The least probability that top-k and top-p keep [N], and whether the `num_top` most likely tokens were enough to tell [N]."""
    values = probs.topk(num_top, dim=-1).values  # [N, num_top], descending
    is_limited = top_k < probs.shape[-1]
    at_k = values.gather(-1, (top_k.clamp(max=num_top) - 1).unsqueeze(-1))
    at_k = torch.where(is_limited.unsqueeze(-1), at_k, 0)
    cumulative = torch.where(values >= at_k, values, 0).cumsum(-1, dtype=torch.float64)
    total = torch.where(is_limited, cumulative[:, -1], probs.sum(-1, dtype=torch.float64))
    goal = (top_p * total).unsqueeze(-1)
    crossing = torch.searchsorted(cumulative, goal)  # first index whose cumulative mass reaches the goal
    is_covered = (crossing.squeeze(-1) < num_top) | (top_p >= 1)
    at_p = values.gather(-1, crossing.clamp(max=num_top - 1))
    at_p = torch.where(top_p.unsqueeze(-1) < 1, at_p, 0)
    return torch.maximum(at_k, at_p).squeeze(-1), is_covered
