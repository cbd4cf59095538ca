"""The calls in an answer, and the text around them, while it comes.

Decides character by character, so that how a text was cut into pieces changes nothing. Text that begins like a call and is none, or calls a
function that the request does not have, is text as it stands. White space that touches a call belongs to nobody.
"""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable
from dataclasses import dataclass

from server.tools.calls import CallReader, NamedCall, ObjectCall
from server.tools.formats import ToolFormat
from server.tools.json_reader import Malformed


@dataclass(frozen=True, slots=True)
class Text:
    """Text that is no call."""

    text: str


@dataclass(frozen=True, slots=True)
class CallBegun:
    """A call begins: the how-manieth of the answer, and of which function."""

    index: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    """A piece of a call's arguments, which are JSON."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnded:
    """Nothing more comes for this call."""

    index: int


Event = Text | CallBegun | Arguments | CallEnded


class CallParser:
    """Reads one answer.

    An eager one gives a call out as soon as its arguments begin; where these turn out to be no JSON, the rest up to the call's end is part
    of them all the same, since nothing can be taken back. One that is not eager gives out whole calls, and what is malformed as text.
    """

    def __init__(self, form: ToolFormat, names: frozenset[str], is_eager: bool = True):
        self._form, self._names, self._is_eager = form, names, is_eager
        self._events: list[Event] = []
        self._kept: list[Event] = []  # of a call that may still turn out to be text
        self._space = ""  # white space that may touch a call
        self._held = ""  # may be the beginning of a mark
        self._raw: list[str] = []  # what seems to be a call, from its mark on
        self._reader: CallReader = ObjectCall()
        self._is_begun = False  # a call was given out, or would have been by an eager parser, and has not ended
        self._is_behind_call = False
        self._is_in_array = False
        self._step: Callable[[str], None] = self._at_start if form.bare else self._in_text
        self.num_calls = 0

    def push(self, text: str) -> list[Event]:
        """What this piece completes."""
        for char in text:
            self._step(char)
        return self._taken()

    def flush(self, is_cut: bool = False) -> list[Event]:
        """What is held back, when nothing follows. `is_cut`: the model would have gone on, so that a call without an end is no mistake."""
        if self._step in (self._at_body, self._in_body):
            self._flush_body(is_cut)
        elif self._step == self._in_spoiled:
            self._add(Arguments(self.num_calls, self._held))
            self._end()
        elif self._step == self._behind_call:
            self._held = ""  # the beginning of a mark
        elif self._held or not self._is_behind_call:
            self._say(self._space + self._held)
        self._space = self._held = ""
        return self._taken()

    def _flush_body(self, is_cut: bool) -> None:
        if self._is_begun and (self._is_eager or is_cut or self._reader.has_arguments):
            self._end()
        else:
            self._take_back()
            self._say(self._space + "".join(self._raw))

    # ------------------------------------------------------------------ text
    def _at_start(self, char: str) -> None:
        """Nothing but white space so far."""
        if char.isspace():
            self._space += char
        elif char in self._form.bare:
            self._open("")
            self._at_body(char)
        else:
            self._step = self._in_text
            self._in_text(char)

    def _in_text(self, char: str) -> None:
        opening = self._form.opening
        held = self._held + char
        while held and not opening.startswith(held):
            if held[0].isspace():
                self._space += held[0]
            else:
                self._say(self._space + held[0])
                self._space, self._is_behind_call = "", False
            held = held[1:]
        self._held = held
        if opening and held == opening:
            self._open(held)

    def _open(self, mark: str) -> None:
        self._held, self._raw = "", [mark]
        self._is_in_array = False
        self._step = self._at_body

    # ------------------------------------------------------------------ calls
    def _at_body(self, char: str) -> None:
        """In front of a call's first character."""
        if char.isspace():
            self._raw.append(char)
        elif char == "[" and not self._is_in_array:
            self._is_in_array = True
            self._raw.append(char)
        elif char == "{" or (self._form.has_names and not self._is_in_array):
            self._reader = ObjectCall() if char == "{" else NamedCall()
            self._step = self._in_body
            self._in_body(char)
        else:
            self._spoilt(char)

    def _in_body(self, char: str) -> None:
        try:
            self._reader.push(char)
            if self._reader.has_begun and not self._is_begun:
                self._begin(self._reader.name)
        except Malformed:
            self._spoilt(char)
            return
        self._raw.append(char)
        if self._is_begun and (text := self._reader.take()):
            self._add(Arguments(self.num_calls, text))
        if self._reader.is_done:
            self._end()

    def _begin(self, name: str | None) -> None:
        if name is None or name not in self._names:
            raise Malformed
        self._is_begun = True
        self._add(CallBegun(self.num_calls, _new_id(self._form.id_length), name))

    def _end(self) -> None:
        """The call is complete, and no text any more."""
        self._add(CallEnded(self.num_calls))
        self._events += self._kept
        self._kept, self._space, self._raw = [], "", [""]
        self.num_calls += 1
        self._is_begun, self._is_behind_call = False, True
        self._step = self._behind_call

    def _spoilt(self, char: str) -> None:
        """Not what a call goes on with."""
        if self._is_begun and self._reader.has_arguments:  # all that matters is there: brackets are missing behind it
            self._end()
            self._behind_call(char)
        elif self._is_begun and self._is_eager:
            self._step = self._in_spoiled
            self._in_spoiled(char)
        else:
            self._take_back()
            self._say(self._space + "".join(self._raw))
            self._space, self._is_behind_call, self._step = "", False, self._in_text
            self._in_text(char)

    def _take_back(self) -> None:
        self._kept, self._is_begun = [], False

    def _in_spoiled(self, char: str) -> None:
        """Arguments that are no JSON, up to the mark behind them."""
        held, closing = self._held + char, self._form.closing
        while held and not closing.startswith(held):
            self._add(Arguments(self.num_calls, held[0]))
            held = held[1:]
        self._held = held
        if closing and held == closing:
            self._held = ""
            self._end()
            self._step = self._in_text

    def _behind_call(self, char: str) -> None:
        """Until it is clear whether another call follows."""
        self._held += char
        mark, closing = self._held.lstrip(), self._form.closing
        if not mark:
            return
        if self._is_in_array:
            if mark == ",":
                self._raw, self._held, self._step = [mark], "", self._at_body
                return
            if mark == "]":
                self._is_in_array, self._held = False, ""
                return
        elif closing and closing.startswith(mark):
            if mark == closing:
                self._held, self._step = "", self._in_text
            return
        elif self._form.separators:
            if not mark.strip(self._form.separators + string.whitespace):
                return
            if char == "{":
                self._raw, self._held, self._step = [self._held[:-1]], "", self._at_body
                self._at_body(char)
                return
        held, self._held, self._step = self._held, "", self._in_text
        for one in held:
            self._step(one)

    # ------------------------------------------------------------------ what goes out
    def _add(self, event: Event) -> None:
        events = self._events if self._is_eager else self._kept
        last = events[-1] if events else None
        if isinstance(event, Arguments) and isinstance(last, Arguments):
            events[-1] = Arguments(event.index, last.text + event.text)
        else:
            events.append(event)

    def _say(self, text: str) -> None:
        if not text:
            return
        last = self._events[-1] if self._events else None
        if isinstance(last, Text):
            self._events[-1] = Text(last.text + text)
        else:
            self._events.append(Text(text))

    def _taken(self) -> list[Event]:
        events, self._events = self._events, []
        return events


def _new_id(length: int | None) -> str:
    alphabet = string.ascii_letters + string.digits
    name = "".join(secrets.choice(alphabet) for _ in range(length or 24))
    return name if length else f"call_{name}"
