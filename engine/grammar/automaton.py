"""Which tokens may come next, by the grammar of an answer. The engine's only file that knows llguidance, which does the parsing.

A grammar is a text in llguidance's own form; the server makes it out of JSON schemas, expressions and the like, and checks it
(server/structure.py). Knows token ids and bits, no tensors, and nothing of what a client asked.
"""

from __future__ import annotations

from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from weakref import WeakKeyDictionary

import numpy as np
from llguidance import LLMatcher, LLTokenizer
from numpy.typing import NDArray

from engine.sequence import Sequence

Mask = NDArray[np.bool_]  # [tokens]: what may come next

_NUM_COMPILED = 64  # grammars that are kept for the next request that has them


class Vocabulary:
    """The tokens of a model as a grammar sees them: bytes, and ends."""

    def __init__(self, tokenizer: LLTokenizer, end_token_ids: tuple[int, ...]):
        """`tokenizer` has these end tokens."""
        self.tokenizer = tokenizer
        self.end_token_ids = end_token_ids

    @classmethod
    def from_folder(cls, folder: Path, end_token_ids: tuple[int, ...]) -> Vocabulary | None:
        """Of the tokenizer.json in a model's folder; None without one, or where no token ends an answer."""
        path = folder / "tokenizer.json"
        if not path.is_file() or not end_token_ids:
            return None
        return cls(LLTokenizer(path.read_text("utf-8"), eos_token=list(end_token_ids)), end_token_ids)


@dataclass(slots=True)
class _Run:
    """Where a sequence stands in its grammar: behind `num_settled` tokens of its answer and those of `path`."""

    matcher: LLMatcher
    num_settled: int = 0  # tokens of the answer that never come back
    path: list[int] = field(default_factory=list)  # then these: committed ones, and drafts that may still be rejected
    masks: dict[int, Mask] = field(default_factory=dict)  # by the number of tokens in front
    is_broken: bool = False


class Automata:
    """The place of every sequence in its grammar. A place follows from tokens and drafts alone, so nobody reports what became of drafts:
    the next question tells."""

    def __init__(self, vocabulary: Vocabulary | None):
        """Without a vocabulary no request may have a grammar; Admission sees to that."""
        self._vocabulary = vocabulary
        self._runs: WeakKeyDictionary[Sequence, _Run] = WeakKeyDictionary()
        self._compiled = lru_cache(_NUM_COMPILED)(self._compile)

    def mask(self, seq: Sequence, drafts: ListLike[int]) -> Mask | None:
        """What may follow the sequence and these drafts; None where there is no grammar or no telling, since a draft cannot stand."""
        run = self._at(seq, drafts)
        if run is None:
            return None
        place = run.num_settled + len(run.path)
        if place not in run.masks:
            run.masks[place] = self._read(run.matcher, seq)
        if run.matcher.is_error():
            run.is_broken = True
            return None
        return run.masks[place]

    def next(self, seq: Sequence, drafts: ListLike[int]) -> int | None:
        """The one token that may follow, if it is only one."""
        run = self._at(seq, drafts)
        if run is None or run.matcher.is_accepting():
            return None
        forced = run.matcher.compute_ff_tokens()
        return forced[0] if forced else None

    def is_broken(self, seq: Sequence) -> bool:
        """Whether the grammar of a sequence got too complex to follow. Its answer cannot go on."""
        run = self._runs.get(seq)
        return run is not None and run.is_broken

    def _at(self, seq: Sequence, drafts: ListLike[int]) -> _Run | None:
        """The run of a sequence, moved behind these drafts; None where it cannot be."""
        if seq.request.grammar is None:
            return None
        run = self._runs.get(seq)
        if run is None:
            run = self._runs[seq] = _Run(self._compiled(seq.request.grammar).deep_copy())
            run.is_broken = run.matcher.is_error()
        num_answered = len(seq.tokens) - len(seq.request.prompt_ids)
        goal = [*seq.tokens[len(seq.request.prompt_ids) + run.num_settled :], *drafts]
        is_there = not run.is_broken and _move(run, goal, seq.request.sampling.stop_token_ids)
        if not is_there and len(run.path) < num_answered - run.num_settled:
            run.is_broken = True  # not even what was emitted can be read
        _settle(run, num_answered)
        return run if is_there else None

    def _compile(self, grammar: str) -> LLMatcher:
        assert self._vocabulary is not None
        return LLMatcher(self._vocabulary.tokenizer, grammar, log_level=0)

    def _read(self, matcher: LLMatcher, seq: Sequence) -> Mask:
        """The mask at a place. Where an end may come, whatever ends this request's answers may."""
        assert self._vocabulary is not None
        bits = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        mask = np.unpackbits(bits, bitorder="little").view(np.bool_)
        if mask[list(self._vocabulary.end_token_ids)].any():
            mask[[token for token in seq.request.sampling.stop_token_ids if token < len(mask)]] = True
        return mask


def _move(run: _Run, goal: list[int], stops: ListLike[int]) -> bool:
    """Go back to where the path leaves the goal, and on to its end. False where a token of it cannot be read, or ends the answer."""
    num_same = next((i for i, (a, b) in enumerate(zip(run.path, goal, strict=False)) if a != b), min(len(run.path), len(goal)))
    if excess := len(run.path) - num_same:
        run.matcher.rollback(excess)
        del run.path[num_same:]
        run.masks = {place: mask for place, mask in run.masks.items() if place <= run.num_settled + num_same}
    for token in goal[num_same:]:
        if token in stops or not run.matcher.try_consume_tokens([token]):
            return False
        run.path.append(token)
    return True


def _settle(run: _Run, num_answered: int) -> None:
    """Forget how emitted tokens were reached."""
    num_new = min(num_answered - run.num_settled, len(run.path))
    if num_new > 0:
        del run.path[:num_new]
        run.num_settled += num_new
        run.masks = {place: mask for place, mask in run.masks.items() if place >= run.num_settled}
