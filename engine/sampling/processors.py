"""What a request changes about logits before they become probabilities: least lengths, biases, penalties.

Each works on rows of the target and of the drafter alike, and sees for every row the text in front of it, drafts included. So a draft is
penalised as the token that it may become, and rows are those of a text without drafts. A batch of which no request wants anything is
handed through untouched.

Sources: the penalties are OpenAI's (frequency and presence, over what was emitted) and those of Keskar et al., "CTRL" (2019), equation 4
(repetition, over prompt and what was emitted). Order as in vLLM: masks, bias, repetition, then frequency and presence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence as ListLike

import torch
from torch import Tensor

from engine.plan import LogitsProcessor, RowBatch
from engine.request import SamplingParams
from engine.sequence import Sequence


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
        return logits.index_put(_at(logits, at_rows, tokens), logits.new_tensor(-torch.inf))


class LogitBias:
    """Adds a number to the logits of some tokens."""

    is_mask = False

    def apply(self, logits: Tensor, rows: RowBatch) -> Tensor:
        entries = [(row, token, bias) for row, seq in enumerate(rows.seqs) for token, bias in seq.request.sampling.logit_bias.items()]
        if not entries:
            return logits
        at_rows, tokens, biases = zip(*entries, strict=True)
        return logits.index_put(_at(logits, at_rows, tokens), logits.new_tensor(biases), accumulate=True)


class Penalties:
    """Makes tokens that the text has already less likely, or likelier."""

    is_mask = False

    def apply(self, logits: Tensor, rows: RowBatch) -> Tensor:
        by_repetition, by_count = (
            [row for row, seq in enumerate(rows.seqs) if has(seq.request.sampling)] for has in (_repetition, _counting)
        )
        if not by_repetition and not by_count:
            return logits
        texts = _Texts(rows)
        logits = logits.clone()
        if by_repetition:
            _repeat(logits, texts, by_repetition)
        if by_count:
            _count(logits, texts, by_count)
        return logits


STANDARD: tuple[LogitsProcessor, ...] = (MinTokens(), LogitBias(), Penalties())


class _Texts:
    """The text in front of each row. What its rows have in common is counted once for each sequence."""

    def __init__(self, rows: RowBatch):
        self._rows = rows
        self._drafts: list[list[int]] = rows.draft_ids.tolist()
        self._emitted: dict[Sequence, Counter[int]] = {}
        self._prompts: dict[Sequence, set[int]] = {}

    def sampling(self, row: int) -> SamplingParams:
        return self._rows.seqs[row].request.sampling

    def emitted(self, row: int) -> Counter[int]:
        """How often each token stands between the prompt and the row."""
        seq = self._rows.seqs[row]
        if seq not in self._emitted:
            self._emitted[seq] = Counter(seq.tokens[len(seq.request.prompt_ids) :])
        return self._emitted[seq] + Counter(self._drafts[self._rows.draft_index[row]][: self._rows.offsets[row]])

    def seen(self, row: int) -> set[int]:
        """The tokens of the prompt and behind it."""
        seq = self._rows.seqs[row]
        if seq not in self._prompts:
            self._prompts[seq] = set(seq.request.prompt_ids)
        return self._prompts[seq] | self.emitted(row).keys()


def _repetition(sampling: SamplingParams) -> bool:
    return sampling.repetition_penalty != 1


def _counting(sampling: SamplingParams) -> bool:
    return bool(sampling.frequency_penalty or sampling.presence_penalty)


def _repeat(logits: Tensor, texts: _Texts, rows: list[int]) -> None:
    """In place: divided by the penalty where positive, else multiplied by it."""
    entries = [(row, token, texts.sampling(row).repetition_penalty) for row in rows for token in texts.seen(row)]
    at_rows, tokens, factors = zip(*entries, strict=True)  # never empty: a prompt has tokens
    at, penalty = _at(logits, at_rows, tokens), logits.new_tensor(factors)
    found = logits[at]
    logits[at] = torch.where(found > 0, found / penalty, found * penalty)


def _count(logits: Tensor, texts: _Texts, rows: list[int]) -> None:
    """In place: less frequency_penalty for each time, and presence_penalty for any."""
    entries = [
        (row, token, count * sampling.frequency_penalty + sampling.presence_penalty)
        for row in rows
        if (sampling := texts.sampling(row))
        for token, count in texts.emitted(row).items()
    ]
    if entries:
        at_rows, tokens, penalties = zip(*entries, strict=True)
        logits[_at(logits, at_rows, tokens)] -= logits.new_tensor(penalties)


def _at(logits: Tensor, rows: ListLike[int], tokens: ListLike[int]) -> tuple[Tensor, Tensor]:
    return torch.tensor(rows, device=logits.device), torch.tensor(tokens, device=logits.device)
