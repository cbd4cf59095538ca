"""Thinking in front of an answer: how models mark it, which of the marks a template knows, and how a text that comes in pieces is split.

White space at the ends of the thinking and behind it is nobody's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal


@dataclass(frozen=True)
class ReasoningFormat:
    """The marks around thinking."""

    name: str
    opening: str
    closing: str


FORMATS: Mapping[str, ReasoningFormat] = {
    form.name: form
    for form in (
        ReasoningFormat("think", "<think>", "</think>"),
        ReasoningFormat("mistral", "[THINK]", "[/THINK]"),
        ReasoningFormat("seed", "<seed:think>", "</seed:think>"),
        ReasoningFormat("command", "<|START_THINKING|>", "<|END_THINKING|>"),
    )
}
FormatName = Literal["auto", "none", "think", "mistral", "seed", "command"]


def detected(template: str) -> ReasoningFormat | None:
    """What a template marks thinking with. Some only cut it out of earlier answers, and so know its end alone."""
    return next((form for form in FORMATS.values() if form.opening in template or form.closing in template), None)


class Phase(Enum):
    """Where in an answer a text stands."""

    BEFORE = "before"  # nothing but white space so far: thinking may begin
    THINKING = "thinking"
    BEHIND = "behind"  # white space behind the thinking
    CONTENT = "content"


def phase_behind(prompt: str, form: ReasoningFormat) -> Phase:
    """Where an answer begins, from how its prompt ends: templates may open the thinking themselves, or close it."""
    prompt = prompt.rstrip()
    if prompt.endswith(form.opening):
        return Phase.THINKING
    return Phase.BEHIND if prompt.endswith(form.closing) else Phase.BEFORE


def phase_within(begun: str, form: ReasoningFormat) -> Phase:
    """Where an answer goes on of which this much is written."""
    if not begun.strip():
        return Phase.BEFORE
    if not begun.lstrip().startswith(form.opening):
        return Phase.CONTENT
    return Phase.CONTENT if form.closing in begun else Phase.THINKING


class ThinkingSplitter:
    """Splits one answer. Holds back what may be a mark, and white space that may be nobody's."""

    def __init__(self, form: ReasoningFormat, phase: Phase):
        self._form, self._phase = form, phase
        self._held = ""
        self._is_begun = False  # something was thought
        self._num_chars = 0  # pushed so far
        self._end: int | None = None  # characters up to the end of the closing mark
        self._token_begins: list[int] = []  # in characters; up to the end of the thinking
        self._num_token_chars = 0

    def push(self, text: str) -> tuple[str, str]:
        """What this piece adds to the thinking and to the content."""
        self._num_chars += len(text)
        text, self._held = self._held + text, ""
        reasoning = ""
        if self._phase is Phase.BEFORE:
            text = self._open(text)
        if self._phase is Phase.THINKING:
            reasoning, text = self._thought(text)
        if self._phase is Phase.BEHIND and (text := text.lstrip()):
            self._phase = Phase.CONTENT
        return reasoning, text

    def flush(self) -> tuple[str, str]:
        """What is held back, when nothing follows."""
        held, self._held = self._held, ""
        return (held.rstrip(), "") if self._phase is Phase.THINKING else ("", held)

    def note_tokens(self, pieces: Sequence[str]) -> None:
        """Tokens that the answer gets, as what each adds to its text. To be told in front of that text."""
        if self._phase is Phase.CONTENT:
            return
        for piece in pieces:
            self._token_begins.append(self._num_token_chars)
            self._num_token_chars += len(piece)

    @property
    def num_tokens(self) -> int:
        """Tokens of the thinking, its marks included."""
        if self._end is not None:
            return bisect_left(self._token_begins, self._end)
        return len(self._token_begins) if self._phase is Phase.THINKING else 0

    def _open(self, text: str) -> str:
        """The text behind the opening mark, or all of it where there is none."""
        stripped, opening = text.lstrip(), self._form.opening
        if stripped != opening and opening.startswith(stripped):
            self._held = text
            return ""
        if stripped.startswith(opening):
            self._phase = Phase.THINKING
            return stripped[len(opening) :]
        self._phase = Phase.CONTENT
        return text

    def _thought(self, text: str) -> tuple[str, str]:
        """What of a text is thinking, and what stands behind it."""
        if not self._is_begun:
            text = text.lstrip()
            self._is_begun = bool(text)
        closing = self._form.closing
        at = text.find(closing)
        if at >= 0:
            behind = text[at + len(closing) :]
            self._phase, self._end = Phase.BEHIND, self._num_chars - len(behind)
            return text[:at].rstrip(), behind
        num_held = next(num for num in range(len(closing) - 1, -1, -1) if text.endswith(closing[:num]))
        told = text[: len(text) - num_held].rstrip()
        self._held = text[len(told) :]
        return told, ""
