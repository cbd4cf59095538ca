"""What a request changes about logits before they become probabilities: least lengths, biases, penalties.

Each works on rows of the target and of the drafter alike, and sees for every row the text in front of it, drafts included. So a draft is
penalised as the token that it may become, and rows are those of a text without drafts. A batch of which no request wants anything is
handed through untouched.

Sources: the penalties are OpenAI's (frequency and presence, over what was emitted) and those of Keskar et al., "CTRL" (2019), equation 4
(repetition, over prompt and what was emitted). Order as in vLLM: masks, bias, repetition, then frequency and presence.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence as ListLike

import torch
from torch import Tensor

from engine.plan import LogitsProcessor, RowBatch
from engine.request import SamplingParams
from engine.sequence import Sequence
from engine.transfer import to_device


class MinTokens:
    """Masks the tokens that would end an answer until `min_tokens` are emitted."""

    is_mask = True

    def apply(self, logits: Tensor, rows: RowBatch) -> Tensor:
        at_rows, tokens = list[int](), list[int]()
        for row, (seq, offset) in enumerate(zip(rows.seqs, rows.offsets, strict=True)):
            sampling = seq.request.sampling
            if len(seq.tokens) - len(seq.request.prompt_ids) + offset < sampling.min_tokens:
                ends = [
                    token for token in sampling.stop_token_ids if token < logits.shape[-1]
                ]  # a pair may share less than an own vocabulary
                at_rows += [row] * len(ends)
                tokens += ends
        if not tokens:
            return logits
        return logits.index_put(_at(logits, at_rows, tokens), logits.new_full((), -torch.inf))


class LogitBias:
    """Adds a number to the logits of some tokens."""

    is_mask = False

    def apply(self, logits: Tensor, rows: RowBatch) -> Tensor:
        entries = [(row, token, bias) for row, seq in enumerate(rows.seqs) for token, bias in seq.request.sampling.logit_bias.items()]
        if not entries:
            return logits
        at_rows, tokens, biases = zip(*entries, strict=True)
        return logits.index_put(_at(logits, at_rows, tokens), to_device(biases, logits.device, logits.dtype), accumulate=True)


class Penalties:
    """Makes tokens that the text has already less likely, or likelier."""

    is_mask = False

    def apply(self, logits: Tensor, rows: RowBatch) -> Tensor:
        members: dict[Sequence, list[int]] = defaultdict(list)
        for row, seq in enumerate(rows.seqs):
            if has_penalty(seq.request.sampling):
                members[seq].append(row)
        if not members:
            return logits
        logits, drafts = logits.clone(), rows.draft_ids.tolist()
        for seq, own in members.items():
            in_front = [drafts[rows.draft_index[row]][: rows.offsets[row]] for row in own]
            if seq.request.sampling.repetition_penalty != 1:
                _repeat(logits, seq, own, in_front)
            _count(logits, seq, own, in_front)
        return logits


STANDARD: tuple[LogitsProcessor, ...] = (MinTokens(), LogitBias(), Penalties())


def has_penalty(sampling: SamplingParams) -> bool:
    return sampling.repetition_penalty != 1 or bool(sampling.frequency_penalty or sampling.presence_penalty)


def _repeat(logits: Tensor, seq: Sequence, rows: list[int], drafts: list[list[int]]) -> None:
    """In place: divided by the penalty where positive, else multiplied by it. What rows have in common is done for all of them at once."""
    seen = set(seq.tokens)
    new = [(row, token) for row, ids in zip(rows, drafts, strict=True) for token in set(ids) - seen]
    pairs = _at(logits, [row for row, _ in new], [token for _, token in new])
    for at in (_at(logits, rows, list(seen), crosswise=True), *([pairs] if new else [])):
        found, penalty = logits[at], seq.request.sampling.repetition_penalty
        logits[at] = torch.where(found > 0, found / penalty, found * penalty)


def _count(logits: Tensor, seq: Sequence, rows: list[int], drafts: list[list[int]]) -> None:
    """In place: less frequency_penalty for each time, and presence_penalty for any. Likewise."""
    sampling = seq.request.sampling
    if not sampling.frequency_penalty and not sampling.presence_penalty:
        return
    emitted = Counter(seq.tokens[len(seq.request.prompt_ids) :])
    if emitted:
        penalties = [count * sampling.frequency_penalty + sampling.presence_penalty for count in emitted.values()]
        logits[_at(logits, rows, list(emitted), crosswise=True)] -= to_device(penalties, logits.device, logits.dtype)
    new = [
        (row, token, count * sampling.frequency_penalty + (0.0 if token in emitted else sampling.presence_penalty))
        for row, ids in zip(rows, drafts, strict=True)
        for token, count in Counter(ids).items()
    ]
    if new:
        at_rows, tokens, more = zip(*new, strict=True)
        logits[_at(logits, at_rows, tokens)] -= to_device(more, logits.device, logits.dtype)


def _at(logits: Tensor, rows: ListLike[int], tokens: ListLike[int], crosswise: bool = False) -> tuple[Tensor, Tensor]:
    """An index: pair by pair, or every row with every token."""
    found = to_device(rows, logits.device), to_device(tokens, logits.device)
    return (found[0].unsqueeze(-1), found[1]) if crosswise else found
