"""Predicted outputs: the client sends what the answer is likely to be, and as long as the answer follows it, it is drafted from there.

The answer is read along the prediction, token by token. Where it leaves it, its last few tokens are looked for: at the nearest place behind
the one that was left, else in front of it. So whether a token is foreseen, and which one, follows from the answer alone, however the steps
were aligned.

Source of the request's field: OpenAI's predicted outputs. How it is followed is prompt lookup (Saxena 2023) over one text, with a memory of
where it stood.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from functools import lru_cache

from engine.plan import Foreseen
from engine.sequence import Sequence

_LENGTHS = (3, 2)  # tokens that are looked for anywhere, the longest run first
_NEAR = 16  # so far behind the place that was left, one token is enough: a name was changed, and the text goes on


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an answer stands in its prediction."""

    index: int = 0  # of what comes next, or would have come where it was left
    is_lost: bool = False


@lru_cache(8)
def _places(ids: tuple[int, ...]) -> Mapping[tuple[int, ...], list[int]]:
    """Where something follows each run of a few tokens. The choices of a request share it."""
    places: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for n in (*_LENGTHS, 1):
        for end in range(n, len(ids)):
            places[ids[end - n : end]].append(end)
    return places


@dataclass(slots=True)
class _Reading:
    """A prediction, and how far an answer has been read along it."""

    ids: tuple[int, ...]
    places: Mapping[tuple[int, ...], list[int]]
    num_read: int = 0
    place: _Place = _Place()

    def behind(self, place: _Place, text: ListLike[int]) -> _Place:
        """From `place`, which is that in front of the last token of `text`, to that behind it."""
        if not place.is_lost and place.index < len(self.ids) and self.ids[place.index] == text[-1]:
            return _Place(place.index + 1)
        for n in _LENGTHS:
            if len(text) >= n and (found := self.places.get(tuple(text[-n:]))):
                at = bisect_left(found, place.index)
                return _Place(found[at] if at < len(found) else found[-1])
        near = self.places.get((text[-1],), [])
        at = bisect_left(near, place.index)
        if at < len(near) and near[at] <= place.index + _NEAR:
            return _Place(near[at])
        return _Place(place.index, is_lost=True)


class Prediction:
    """Foresees what the client did."""

    def __init__(self) -> None:
        self._readings: dict[Sequence, _Reading] = {}

    def applies(self, seq: Sequence) -> bool:
        return bool(seq.request.prediction_ids)

    def next(self, seq: Sequence, drafts: ListLike[int]) -> Foreseen | None:
        reading = self._readings.get(seq)
        if reading is None:
            reading = self._readings[seq] = _Reading(seq.request.prediction_ids, _places(seq.request.prediction_ids))
        first, longest = len(seq.request.prompt_ids), _LENGTHS[0]
        for end in range(first + reading.num_read + 1, len(seq.tokens) + 1):
            reading.place = reading.behind(reading.place, seq.tokens[max(first, end - longest) : end])
        reading.num_read = len(seq.tokens) - first
        place, text = reading.place, seq.tokens[max(first, len(seq.tokens) - longest) :]
        for token_id in drafts:
            text.append(token_id)
            place = reading.behind(place, text)
        if place.is_lost or place.index >= len(reading.ids):
            return None
        return Foreseen(reading.ids[place.index], is_predicted=True)

    def forget(self, seq: Sequence) -> None:
        self._readings.pop(seq, None)
