"""Copying: a part of a drafter's distribution goes to what followed the last few tokens when they last occurred in the text.

A drafter that is cheap enough cannot look back: names, lines of code, quotations and the loops of a small target are beyond it. A table
knows those and nothing else. Mixed, at every position,

    q'(x) = (1 - w) q(x) + w [x = c],    w = L / (L + doubt)

where c followed the longest of the last 4 and 2 tokens that occurred before, and L is how far back that occurrence and the end of the text
are the same. q' depends on the text alone, so it is a row like any other: drafts are drawn from it, rules read it, and a seed fixes the
text whatever the steps were. Sources: the mixture is that of cache language models (Kuhn and De Mori 1990) and of pointer networks (See
et al. 2017, equation 9), the weight that of prediction by partial matching (Cleary and Witten 1984), which trusts long contexts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as ListLike

import torch
from torch import Tensor

from engine.draft.lookup import SuffixIndex
from engine.sequence import Sequence
from engine.transfer import to_device

LENGTHS = (4, 2)  # a run of one token is followed by the same one in every eighth to fifth place only
LONGEST = 16  # tokens that are compared


class Copying:
    """Mixes rows of a drafter with what its sequences' own texts suggest."""

    def __init__(self, doubt: float):
        """`doubt` is positive: how long a run must be to be trusted half."""
        self._doubt = doubt
        self._indexes: dict[Sequence, SuffixIndex] = {}

    def mixed(self, logits: Tensor, seqs: ListLike[Sequence], drafts: ListLike[ListLike[int]]) -> tuple[Tensor, Tensor | None]:
        """Logits [N, V] of the rows behind N sequences and the drafts of each; changed in place where they are float32 or wider.

        And the logarithm of the sum of exponentials of each of these rows [N], if it had to be found out for all.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        found = [(row, *copy) for row, (seq, ids) in enumerate(zip(seqs, drafts, strict=True)) if (copy := self._copy(seq, ids))]
        if not found:
            return logits, None
        rows, tokens, odds = zip(*found, strict=True)
        at = tuple(to_device([rows, tokens], logits.device).unbind())
        chosen = logits if len(rows) == len(logits) else logits[at[0]]
        total = chosen.amax(-1) - chosen.softmax(-1).amax(-1).log()  # torch's logsumexp takes ten times as long where most are absent
        added = to_device([math.log(odd) for odd in odds], logits.device, logits.dtype) + total
        logits[at] = torch.logaddexp(logits[at], added)
        return logits, torch.logaddexp(total, added) if len(rows) == len(logits) else None

    def forget(self, seq: Sequence) -> None:
        """The sequence has left the engine."""
        self._indexes.pop(seq, None)

    def _copy(self, seq: Sequence, drafts: ListLike[int]) -> tuple[int, float] | None:
        """What is to be copied, and w / (1 - w)."""
        index = self._indexes.setdefault(seq, SuffixIndex(LENGTHS))
        index.extend(seq.tokens)
        position = index.follower(seq.tokens, drafts)
        if position is None:
            return None
        length = len(seq.tokens) + len(drafts)

        def token(i: int) -> int:
            return seq.tokens[i] if i < len(seq.tokens) else drafts[i - len(seq.tokens)]

        same = 1
        while same < min(LONGEST, position) and token(position - same - 1) == token(length - same - 1):
            same += 1
        return token(position), same / self._doubt
