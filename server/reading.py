"""What an answer's text consists of: thinking, content and calls of functions. There is a reader only where there is more than content."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from server.reasoning import Phase, ReasoningFormat, ThinkingSplitter
from server.tools.formats import ToolFormat
from server.tools.parse import Arguments, CallBegun, CallParser, Event, Text


@dataclass(frozen=True, slots=True)
class CallPiece:
    """News of a call: who it is, in its first piece, or more of its arguments."""

    index: int
    arguments: str = ""
    id: str | None = None
    name: str | None = None


@dataclass(slots=True)
class Pieces:
    """What was read since the last delivery."""

    reasoning: str = ""
    content: str = ""
    calls: list[CallPiece] = field(default_factory=list)


@dataclass(frozen=True)
class Reading:
    """How the answers to a request are read. None of both formats would be no reading at all."""

    reasoning: ReasoningFormat | None = None
    phase: Phase = Phase.BEFORE  # where in its thinking an answer begins
    tools: ToolFormat | None = None
    names: frozenset[str] = frozenset()  # of the functions that may be called
    is_forced: bool = False  # the client named the function, so that calling it is no reason to end
    is_eager: bool = True  # calls are given out while they come
    literals: Mapping[int, str] = field(default_factory=dict)  # special tokens that are marks, and so have a text

    def reader(self) -> Reader:
        """A fresh one for one answer."""
        return Reader(self)


class Reader:
    """Reads one answer while it comes."""

    def __init__(self, reading: Reading):
        self._splitter = ThinkingSplitter(reading.reasoning, reading.phase) if reading.reasoning else None
        self._parser = CallParser(reading.tools, reading.names, reading.is_eager) if reading.tools else None
        self._is_forced = reading.is_forced
        self._pieces = Pieces()

    def push(self, text: str, tokens: Sequence[str]) -> None:
        """More of the text, and what each of the tokens that it came with adds to it, held back or not."""
        if self._splitter is not None:
            self._splitter.note_tokens(tokens)
            reasoning, text = self._splitter.push(text)
            self._pieces.reasoning += reasoning
        self._read(text)

    def flush(self, is_cut: bool) -> None:
        """The answer is over; `is_cut`: at a length, not by the model."""
        if self._splitter is not None:
            reasoning, text = self._splitter.flush()
            self._pieces.reasoning += reasoning
            self._read(text)
        if self._parser is not None:
            self._note(self._parser.flush(is_cut))

    def take(self) -> Pieces:
        """What was read since the last time."""
        pieces, self._pieces = self._pieces, Pieces()
        return pieces

    @property
    def num_reasoning_tokens(self) -> int:
        return self._splitter.num_tokens if self._splitter is not None else 0

    @property
    def ends_for_calls(self) -> bool:
        """Whether an answer that ended by itself did so for its calls to be carried out."""
        return self._parser is not None and self._parser.num_calls > 0 and not self._is_forced

    def _read(self, text: str) -> None:
        if self._parser is None:
            self._pieces.content += text
        else:
            self._note(self._parser.push(text))

    def _note(self, events: Sequence[Event]) -> None:
        for event in events:
            match event:
                case Text():
                    self._pieces.content += event.text
                case CallBegun():
                    self._pieces.calls.append(CallPiece(event.index, id=event.id, name=event.name))
                case Arguments():
                    self._pieces.calls.append(CallPiece(event.index, event.text))
