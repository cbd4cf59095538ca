"""What a request tells about its own answer before any model has run: drafts that cost nothing.

Drafters ask at every position. Nothing here has probabilities, and no rule judges it: such a draft stands if it is what the target draws.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as ListLike

from engine.plan import Foreseen, Foresight
from engine.sequence import Sequence


class NoForesight:
    """Nothing is told."""

    def applies(self, seq: Sequence) -> bool:
        return False

    def next(self, seq: Sequence, drafts: ListLike[int]) -> Foreseen | None:
        return None

    def forget(self, seq: Sequence) -> None:
        """Nothing is remembered."""


class Forced(NoForesight):
    """The one token that may come, where a grammar leaves only one."""

    def __init__(self, only: Callable[[Sequence, ListLike[int]], int | None]):
        """`only` tells it."""
        self._only = only

    def applies(self, seq: Sequence) -> bool:
        return seq.request.grammar is not None

    def next(self, seq: Sequence, drafts: ListLike[int]) -> Foreseen | None:
        token_id = self._only(seq, drafts)
        return None if token_id is None else Foreseen(token_id)


class First:
    """The first of several that can tell."""

    def __init__(self, sources: ListLike[Foresight]):
        self._sources = tuple(sources)

    def applies(self, seq: Sequence) -> bool:
        return any(source.applies(seq) for source in self._sources)

    def next(self, seq: Sequence, drafts: ListLike[int]) -> Foreseen | None:
        for source in self._sources:
            if source.applies(seq) and (foreseen := source.next(seq, drafts)) is not None:
                return foreseen
        return None

    def forget(self, seq: Sequence) -> None:
        for source in self._sources:
            source.forget(seq)
