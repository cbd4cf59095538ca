"""One call of a function, read a character at a time: {"name": ..., "arguments": {...}}, or NAME[ARGS]{...}.

Both kinds of reader raise Malformed from `push`, and give the arguments out as they are written: `take` has those that were read since the
last time, as soon as the call `has_begun`, which is when the name is known and arguments began or cannot come any more. A call `is_done`
when all of it is there, and `has_arguments` when all that matters is.
"""

from __future__ import annotations

import json
import re

from server.tools.json_reader import SPACE, JsonReader, Malformed

_ARGUMENT_KEYS = ("arguments", "parameters")
_HEADER = re.compile(r"([a-zA-Z0-9_-]{1,64})(?:\[CALL_ID\][\w-]{0,64})?(?:\[ARGS\])?\s*", re.ASCII)
_LONGEST_HEADER = 256


class _Text:
    """A JSON value and its text. The text may be taken before it is complete."""

    def __init__(self, first: str = '"{[-0123456789tfn'):
        self._first = first  # what it may begin with
        self._reader = JsonReader()
        self._text: list[str] = []
        self.has_begun = False

    @property
    def is_done(self) -> bool:
        return self._reader.is_done

    def push(self, char: str) -> bool:
        """Whether the character belongs to it."""
        if not self.has_begun:
            if char in SPACE:
                return True
            if char not in self._first:
                raise Malformed
            self.has_begun = True
        is_part = self._reader.push(char)
        if is_part:
            self._text.append(char)
        return is_part

    def take(self) -> str:
        text = "".join(self._text)
        self._text.clear()
        return text


class ObjectCall:
    """A JSON object with a name and arguments in any order; other keys mean nothing. Arguments that are not there are empty."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.is_done = False
        self._arguments: _Text | None = None
        self._keys: set[str] = set()
        self._key: str | None = None  # whose value comes next, or is being read
        self._part: _Text | None = None  # the key or value that is being read
        self._awaited = "{"  # one of these comes next, where no part is being read; a quote begins a key
        self._is_empty_given = False

    @property
    def has_begun(self) -> bool:
        return self.name is not None and (self.is_done or (self._arguments is not None and self._arguments.has_begun))

    @property
    def has_arguments(self) -> bool:
        return self.is_done or (self.name is not None and self._arguments is not None and self._arguments.is_done)

    def push(self, char: str) -> None:
        if self._part is not None:
            is_part = self._part.push(char)
            if self._part.is_done:
                self._part_done(self._part)
            if is_part:
                return
        if char in SPACE:
            return
        if char not in self._awaited:
            raise Malformed
        self._structure(char)

    def take(self) -> str:
        if not self.has_begun:
            return ""
        if self._arguments is not None:
            return self._arguments.take()
        text, self._is_empty_given = "" if self._is_empty_given else "{}", True
        return text

    def _structure(self, char: str) -> None:
        if char == "{":
            self._awaited = '"}'
        elif char == '"':
            self._part = _Text()
            self._part.push(char)
        elif char == ":":
            self._part = _Text("{") if self._key == "arguments" else _Text()
            if self._key == "arguments":
                self._arguments = self._part
        elif char == ",":
            self._awaited = '"'
        elif self.name is None:
            raise Malformed
        else:
            self.is_done = True

    def _part_done(self, part: _Text) -> None:
        self._part = None
        if self._key is None:
            self._key, self._awaited = self._new_key(part.take()), ":"
            return
        if self._key == "name":
            self.name = _text_of(part.take())
        self._key, self._awaited = None, ",}"

    def _new_key(self, text: str) -> str:
        key = _text_of(text)
        key = "arguments" if key in _ARGUMENT_KEYS else key
        if key in self._keys:
            raise Malformed
        self._keys.add(key)
        return key


def _text_of(value: str) -> str:
    text = json.loads(value)
    if not isinstance(text, str):
        raise Malformed
    return text


class NamedCall:
    """The name, marks that some versions put behind it, and the arguments."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._header = ""
        self._arguments = _Text("{")

    @property
    def is_done(self) -> bool:
        return self._arguments.is_done

    @property
    def has_begun(self) -> bool:
        return self.name is not None

    @property
    def has_arguments(self) -> bool:
        return self.is_done

    def push(self, char: str) -> None:
        if self.name is not None:
            self._arguments.push(char)
            return
        if char != "{":
            self._header += char
            if len(self._header) > _LONGEST_HEADER or char in '"<}':
                raise Malformed
            return
        header = _HEADER.fullmatch(self._header)
        if header is None:
            raise Malformed
        self.name = header[1]
        self._arguments.push(char)

    def take(self) -> str:
        return self._arguments.take() if self.has_begun else ""


CallReader = ObjectCall | NamedCall
