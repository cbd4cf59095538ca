"""Grammars as a hard mask on rows of logits, those of the target and those of the drafter alike."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from engine.grammar.automaton import Automata
from engine.plan import RowBatch
from engine.transfer import to_device


class GrammarMasks:
    """Masks the tokens that a sequence's grammar forbids behind its text and the drafts in front of each row.

    A row behind a draft that cannot stand, or that nothing can follow, is left as it is: what is drawn from it is never emitted.
    """

    is_mask = True

    def __init__(self, automata: Automata):
        self._automata = automata

    def apply(self, logits: Tensor, rows: RowBatch) -> Tensor:
        members = [row for row, seq in enumerate(rows.seqs) if seq.request.grammar is not None]
        if not members:
            return logits
        drafts = rows.draft_ids.tolist()
        found = [(row, self._automata.mask(rows.seqs[row], drafts[rows.draft_index[row]][: rows.offsets[row]])) for row in members]
        known = [(row, mask) for row, mask in found if mask is not None]
        if not known:
            return logits
        at, width = [row for row, _ in known], logits.shape[-1]
        bits = np.stack([np.frombuffer(mask, dtype=np.uint8) for _, mask in known])
        packed = torch.from_numpy(np.unpackbits(bits, axis=-1, count=min(width, 8 * bits.shape[-1]), bitorder="little")).bool()
        allowed = torch.zeros(len(known), width, dtype=torch.bool)  # a model may have more tokens than its tokenizer knows
        allowed[:, : packed.shape[-1]] = packed
        forbidden = ~to_device(allowed, logits.device)
        if len(at) == len(logits):
            return logits.masked_fill(forbidden, -torch.inf)
        place = to_device(at, logits.device)
        return logits.index_copy(0, place, logits[place].masked_fill(forbidden, -torch.inf))
