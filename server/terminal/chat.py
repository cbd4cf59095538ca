"""`cascade chat`: reads lines, prints answers in the colours of who wrote them.

Answers go to standard output and nothing else does, so that it can be read by a program; where one end is no terminal there are no
prompts, and the first error ends it.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console
from rich.text import Text

from server.terminal.client import ChatError, Chunk, Client, Metrics, Origin, Usage
from server.terminal.session import Quit, Session

KINDS = {  # as the page has them: colour and line
    "accepted": ("blue", "drafter, accepted"),
    "lossy": ("bold yellow underline", "drafter, kept by the rule"),
    "recovered": ("magenta italic", "target, after a rejection"),
    "bonus": ("green underline2", "bonus"),
    "plain": ("", "target alone"),
}
# Control characters of a model's text are shown, not obeyed: some make a terminal do things.
_HARMLESS = {code: 0x2400 + code for code in range(32) if code not in (9, 10)} | {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


@dataclass(frozen=True)
class Terminal:
    """Where it reads and writes."""

    lines: TextIO
    answers: Console
    remarks: Console

    @classmethod
    def standard(cls) -> Terminal:
        return cls(sys.stdin, Console(highlight=False), Console(stderr=True, highlight=False))

    @property
    def is_interactive(self) -> bool:
        return self.lines.isatty() and self.answers.is_terminal

    def remark(self, text: str, style: str = "dim") -> None:
        self.remarks.print(Text(text.translate(_HARMLESS), style), soft_wrap=True)


def run(client: Client, session: Session, terminal: Terminal) -> None:
    """Converse until the lines end. Raises ChatError where nobody is there to try again."""
    if terminal.is_interactive:
        _enable_editing()
        terminal.remark(f"{session.controls.target}, drafted by {session.controls.drafter}. {session.summary()}. /help lists commands.")
        terminal.remarks.print(_legend())
    try:
        for line in _lines(terminal):
            _take(line, client, session, terminal)
    except Quit:
        pass
    except KeyboardInterrupt:
        if not terminal.is_interactive:
            raise SystemExit(128 + signal.SIGINT) from None
    if terminal.is_interactive:
        terminal.remarks.print()


def _take(line: str, client: Client, session: Session, terminal: Terminal) -> None:
    try:
        if line.startswith("/"):
            terminal.remark(session.command(line))
        else:
            session.answered(line, _answer(line, client, session, terminal))
    except ChatError as error:
        if not terminal.is_interactive:
            raise
        terminal.remark(str(error), "red")


def _answer(prompt: str, client: Client, session: Session, terminal: Terminal) -> str:
    """Print an answer as it comes. Ctrl-C stops it; what came stands."""
    parts: list[str] = []
    shown: list[str] = []
    usage: Usage | None = None
    metrics: Metrics | None = None
    with closing(client.stream(session.body(prompt))) as chunks:  # type: ignore[type-var]  # a generator, which can be closed
        try:
            for chunk in chunks:
                usage, metrics = chunk.usage or usage, chunk.metrics or metrics
                parts.append(chunk.content)
                shown.append(_print(chunk, terminal.answers, any(shown)))
        except KeyboardInterrupt:
            if not terminal.is_interactive:
                raise
            terminal.answers.out("")
            terminal.remark("Stopped.")
            return "".join(parts)
    answer, told = "".join(parts), "".join(shown)
    if told and answer.startswith(told):  # text without a token, such as what was held back at a cut
        _out(answer[len(told) :], terminal.answers)
    terminal.answers.out("")
    if terminal.is_interactive and usage is not None and metrics is not None:
        terminal.remark(figures_of(usage, metrics))
    return "".join(parts)


def _print(chunk: Chunk, console: Console, has_tokens: bool) -> str:
    """The tokens of a chunk in their colours; on anything but a terminal, and where a server tells of no tokens, its text. Returns the text
    of the tokens: a chunk's content need not be theirs, since the server holds back what may become a mark."""
    tokens = chunk.tokens if console.is_terminal else ()
    for token in tokens:
        _out(token.text, console, KINDS[kind_of(token)][0])
    if not tokens and not has_tokens:
        _out(chunk.content, console)
    console.file.flush()
    return "".join(token.text for token in tokens)


def _out(text: str, console: Console, style: str = "") -> None:
    if text:
        console.out(text.translate(_HARMLESS) if console.is_terminal else text, style=style or None, end="", highlight=False)


def kind_of(token: Origin) -> str:
    """One of KINDS."""
    if token.lossy:
        return "lossy"
    if token.role in ("bonus", "accepted"):
        return token.role
    return "accepted" if token.by == "drafter" else token.role


def figures_of(usage: Usage, metrics: Metrics) -> str:
    """How an answer was made, in a line."""
    drafts, calls, latency = metrics.speculative_decoding, metrics.cascade.target_calls, metrics.latency
    parts = [f"{usage.completion_tokens} tokens"]
    if drafts is not None:
        parts.append(f"{drafts.draft_acceptance_rate:.0%} of drafts accepted")
    if calls:
        parts.append(f"{usage.completion_tokens / calls:.2f} tokens a target call")
    if latency.tokens_per_second is not None:
        parts.append(f"{latency.tokens_per_second:.1f} tokens/s")
    if latency.time_to_first_token_ms is not None:
        parts.append(f"first token after {latency.time_to_first_token_ms:.0f} ms")
    return ", ".join(parts)


def _lines(terminal: Terminal) -> Iterator[str]:
    """What was typed, or what a file has; empty lines are nothing."""
    while True:
        if terminal.is_interactive:
            try:
                line = input("> ")
            except EOFError:
                return
        elif not (line := terminal.lines.readline()):
            return
        if line.strip():
            yield line.strip()


def _legend() -> Text:
    return Text("   ").join(Text(name, style) for style, name in KINDS.values())


def _enable_editing() -> None:
    """Arrow keys and a history for `input`, where Python has them."""
    try:
        import readline  # noqa: F401
    except ImportError:  # not on Windows
        return
