"""Token ids back to text while they come: the incremental detokeniser and the search for stop strings.

The pieces that go out are, put together, the text of all tokens up to the stop; nothing that went out is ever taken back.
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol


class TokenTexts(Protocol):
    """What a Detokenizer needs of a tokenizer."""

    @property
    def special_ids(self) -> frozenset[int]: ...

    def raw_bytes(self, token_id: int) -> bytes | None: ...

    def decode(self, ids: Sequence[int]) -> str: ...


class Detokenizer:
    """Token ids of one answer to text, piece by piece. The pieces together are the text.

    Tokens that stand for bytes go through an incremental UTF-8 decoder, which holds back at most the three bytes of an unfinished
    character; what turns out not to be UTF-8 becomes U+FFFD. Other tokens are decoded behind a few of their predecessors, since
    some decoders treat the first token of a text differently. The cost of a token does not depend on how many came before.
    Special tokens have no text, but for `literals`.
    """

    CONTEXT = 6  # tokens

    def __init__(self, tokenizer: TokenTexts, literals: Mapping[int, str] = MappingProxyType({})):
        self._tokenizer = tokenizer
        self._literals = literals
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._context: deque[int] = deque(maxlen=self.CONTEXT)

    def push(self, token_id: int) -> str:
        """The text that this token completes."""
        if token_id in self._tokenizer.special_ids:
            return self.flush() + self._literals[token_id] if token_id in self._literals else ""
        raw = self._tokenizer.raw_bytes(token_id)
        text = self._utf8.decode(raw) if raw is not None else self.flush() + self._behind_context(token_id)
        self._context.append(token_id)
        return text

    def flush(self) -> str:
        """What is held back, when nothing follows."""
        return self._utf8.decode(b"", final=True)

    def _behind_context(self, token_id: int) -> str:
        before = self._tokenizer.decode(self._context) if self._context else ""
        return self._tokenizer.decode([*self._context, token_id])[len(before) :]


class NumberWriter:
    """In place of a Detokenizer for a model without a tokenizer: an answer is the decimal token ids, each with a space before it."""

    def push(self, token_id: int) -> str:
        return f" {token_id}"

    def flush(self) -> str:
        return ""


class StopStrings:
    """Stop strings, ready to be searched for. Made once for all answers of a request: the tables cost a step of Python a character."""

    def __init__(self, stops: Sequence[str] = (), are_shown: bool = False):
        """`are_shown`: the stop string that was found is part of the text."""
        self.tables = tuple((stop, _borders(stop)) for stop in stops)
        self.are_shown = are_shown


class StopScanner:
    """Finds the first stop string to be completed in a text that comes in pieces, and never lets a part of it out.

    One Knuth-Morris-Pratt automaton a stop string: its state is how many characters of the string the text ends with, which is also
    what must be held back. If two strings end at the same character, the longer one counts.
    """

    def __init__(self, stops: StopStrings):
        self._stops, self._are_shown = stops.tables, stops.are_shown
        self._matched = [0] * len(self._stops)
        self._held = ""
        self.is_stopped = False

    def push(self, text: str, may_stop: bool = True) -> str:
        """The text that may go out. After a stop was found, what stood before it (or up to its end), and then nothing more.

        One that is completed while it must not stop is text; one that only begins there counts.
        """
        if self.is_stopped or not self._stops:
            return "" if self.is_stopped else text
        text, begin = self._held + text, len(self._held)
        for end in range(begin, len(text)):
            found = self._advance(text[end])
            if not found:
                continue
            if may_stop:
                self.is_stopped, self._held = True, ""
                return text[: end + 1 - (0 if self._are_shown else found)]
            self._pass_over()
        kept = len(text) - max(self._matched)
        self._held = text[kept:]
        return text[:kept]

    def flush(self) -> str:
        """What is held back, when nothing follows."""
        text, self._held = self._held, ""
        return text

    def _pass_over(self) -> None:
        """Go on behind a match that does not count, with what may still be the beginning of another."""
        for i, (stop, borders) in enumerate(self._stops):
            if self._matched[i] == len(stop):
                self._matched[i] = borders[-1]

    def _advance(self, char: str) -> int:
        """Feed one character; length of the longest stop string that it completes."""
        found = 0
        for i, (stop, borders) in enumerate(self._stops):
            matched = self._matched[i]
            while matched and stop[matched] != char:
                matched = borders[matched - 1]
            matched += stop[matched] == char
            self._matched[i] = matched
            if matched == len(stop):
                found = max(found, matched)
        return found


def _borders(pattern: str) -> list[int]:
    """For each prefix, the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = borders[length - 1]
        length += pattern[i] == pattern[length]
        borders[i] = length
    return borders


_SPARE = 8  # characters that a token may stand behind the end of the one before


def beginnings(text: str, pieces: Sequence[str]) -> list[int]:
    """Where in a text each token begins, given the texts of the tokens by themselves.

    Each is looked for behind the one before, but not far: a token that is not in the text, such as a BOS that the tokenizer adds, a part of
    a character, or one whose text was normalised, begins where the one before has ended. The first begins with the text.
    """
    found: list[int] = []
    end, slack = 0, _SPARE
    for piece in pieces:
        begin = text.find(piece, end, end + slack + len(piece))
        if begin < 0 and (bare := piece.lstrip()):  # the first word of a text may have lost its space
            piece, begin = bare, text.find(bare, end, end + slack + len(bare))
        if begin < 0:
            slack += len(piece)
        else:
            end, slack = begin + len(piece), _SPARE
        found.append(end if begin < 0 else begin)
    return [0, *found[1:]]
