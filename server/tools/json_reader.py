"""JSON that comes a character at a time: is it still JSON, and where does it end? Keeps nothing of what it reads."""

from __future__ import annotations

import re
from collections.abc import Callable

SPACE = " \t\n\r"

_WORDS = ("true", "false", "null")
_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
_NUMBER_SO_FAR = re.compile(r"-?((0|[1-9]\d*)(\.\d*|(\.\d+)?[eE][+-]?\d*)?)?", re.ASCII)
_LONGEST_WORD = 400  # characters of a number


class Malformed(Exception):
    """What was read cannot become what it was to be."""


class JsonReader:
    """Reads one value, as strictly as RFC 8259."""

    def __init__(self) -> None:
        self.is_done = False
        self._awaited: list[str] = []  # closing brackets, the innermost last
        self._is_key = False
        self._word = ""
        self._num_hex = 0
        self._step: Callable[[str], bool] = self._value

    def push(self, char: str) -> bool:
        """Whether the character belongs to the value. The end of a number is known by what follows. Raises Malformed."""
        return not self.is_done and self._step(char)

    def _value(self, char: str) -> bool:
        if char in SPACE:
            return True
        if char in "{[":
            self._awaited.append("}" if char == "{" else "]")
            self._step = self._first_key if char == "{" else self._first_item
        elif char == '"':
            self._step = self._string
        elif char in "-0123456789tfn":
            self._word, self._step = char, self._scalar
        else:
            raise Malformed
        return True

    def _first_key(self, char: str) -> bool:
        return self._close() if char == "}" else self._key(char)

    def _key(self, char: str) -> bool:
        if char == '"':
            self._is_key, self._step = True, self._string
        elif char not in SPACE:
            raise Malformed
        return True

    def _first_item(self, char: str) -> bool:
        if char == "]":
            return self._close()
        if char not in SPACE:
            self._step = self._value
        return self._value(char)

    def _string(self, char: str) -> bool:
        if char == '"':
            self._end_string()
        elif char == "\\":
            self._step = self._escape
        elif ord(char) < 0x20:
            raise Malformed
        return True

    def _end_string(self) -> None:
        if self._is_key:
            self._is_key, self._step = False, self._colon
        else:
            self._end()

    def _escape(self, char: str) -> bool:
        if char == "u":
            self._num_hex, self._step = 4, self._hex
        elif char in '"\\/bfnrt':
            self._step = self._string
        else:
            raise Malformed
        return True

    def _hex(self, char: str) -> bool:
        if char not in "0123456789abcdefABCDEF":
            raise Malformed
        self._num_hex -= 1
        if not self._num_hex:
            self._step = self._string
        return True

    def _colon(self, char: str) -> bool:
        if char == ":":
            self._step = self._value
        elif char not in SPACE:
            raise Malformed
        return True

    def _scalar(self, char: str) -> bool:
        """A number, true, false or null."""
        if char.isascii() and (char.isalnum() or char in "+-."):
            self._word += char
            if len(self._word) > _LONGEST_WORD or not self._is_word_so_far():
                raise Malformed
            return True
        if self._word not in _WORDS and not _NUMBER.fullmatch(self._word):
            raise Malformed
        self._end()
        return self.push(char)

    def _is_word_so_far(self) -> bool:
        return any(word.startswith(self._word) for word in _WORDS) or _NUMBER_SO_FAR.fullmatch(self._word) is not None

    def _behind(self, char: str) -> bool:
        """Behind a value within an object or an array."""
        if char == ",":
            self._step = self._key if self._awaited[-1] == "}" else self._value
        elif char == self._awaited[-1]:
            self._close()
        elif char not in SPACE:
            raise Malformed
        return True

    def _close(self) -> bool:
        self._awaited.pop()
        self._end()
        return True

    def _end(self) -> None:
        self.is_done = not self._awaited
        self._step = self._behind
