"""`cascade chat` as a program: with lines from a file, and at a terminal."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import pty
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from engine.errors import QueueFull
from engine.request import Round
from server.terminal.chat import Terminal, _print
from server.terminal.client import Chunk
from server.text import TextTokenizer
from tests.fakes import Part
from tests.server.conftest import Served, make_deployment, serve_socket, until

PROGRAM = (sys.executable, "-c", "from server.cli import main; main()", "chat")
ROOT = Path(__file__).parents[2]


def environment(**more: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("OPENAI_API_KEY", "NO_COLOR", "FORCE_COLOR", "COLORTERM")}
    return kept | {"PYTHONPATH": str(ROOT), "TERM": "xterm", "COLUMNS": "200"} | more


async def run(served: Served | None, lines: str, *options: str, **more: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    url = ("--url", str(served.http.base_url)) if served is not None else ()
    pipes = {"stdin": asyncio.subprocess.PIPE, "stdout": asyncio.subprocess.PIPE, "stderr": asyncio.subprocess.PIPE}
    process = await asyncio.create_subprocess_exec(*PROGRAM, *url, *options, env=environment(**more), **pipes)  # type: ignore[arg-type]
    out, err = await asyncio.wait_for(process.communicate(lines.encode()), 60)
    return process.returncode or 0, out.decode(), err.decode()


@pytest.fixture
async def served(folder: Path) -> AsyncIterator[Served]:
    async with serve_socket(folder) as it:
        yield it


# ---------------------------------------------------------------------- lines from a file
async def test_lines_become_answers_and_nothing_else(served: Served, tokenizer: TextTokenizer) -> None:
    served.answer_with(parts=[Part(tuple(tokenizer.encode("hello\nworld")), Round(2, 1), drafted_mask=0b01)])
    code, out, err = await run(served, "the quick\n\n/preset short\n/seed 7\nbrown fox")
    assert (code, out) == (0, "hello\nworld\nhello\nworld\n")
    assert "tiny:short" in err
    first, second = served.engine.requests
    assert (first.speculation.max_draft, second.speculation.max_draft, second.sampling.seed) == (None, 2, 7)
    said = re.sub(r"<\|im_\w+\|>", "", tokenizer.text_of(second.prompt_ids))
    assert said == "user\nthe quick\nassistant\nhello\nworld\nuser\nbrown fox\nassistant\n"


async def test_the_first_error_ends_it(served: Served) -> None:
    served.answer_with(refusal=QueueFull(4, 4))
    code, out, err = await run(served, "a\nb\n")
    assert (code, out) == (2, "")
    assert err == f"Error: {served.engine.script.refusal}\n"
    code, _, err = await run(served, "/rule none\na\n")
    assert code == 2
    assert "the rules are exact" in err


async def test_an_answer_that_breaks_off_is_an_error(served: Served) -> None:
    served.answer_with(dies_after=1)
    code, _, err = await run(served, "hello\n")
    assert (code, err) == (2, "Error: The engine stopped at an internal error.\n")


async def test_a_key_comes_from_the_environment(folder: Path) -> None:
    async with serve_socket(folder, make_deployment(api_keys=["secret"])) as served:
        code, _, err = await run(served, "hello\n")
        assert code == 2
        assert "--api-key-env names the variable" in err
        assert (await run(served, "hello\n", "--api-key-env", "MY_KEY", MY_KEY="secret"))[0] == 0
        assert (await run(served, "hello\n", OPENAI_API_KEY="secret"))[0] == 0


async def test_what_is_no_server_of_ours_is_said() -> None:
    code, _, err = await run(None, "", "--url", "http://127.0.0.1:9")
    assert code == 2
    assert "http://127.0.0.1:9 cannot be reached" in err
    code, _, err = await run(None, "", "--url", "localhost")
    assert (code, err) == (2, "Error: --url: localhost - must begin with http:// or https://\n")


async def test_a_model_that_is_not_there_is_said(served: Served) -> None:
    code, _, err = await run(served, "", "--model", "gpt")
    assert (code, err) == (2, "Error: gpt - the presets are tiny, off, short.\n")


# ---------------------------------------------------------------------- a terminal
class Screen:
    """The program at a terminal."""

    def __init__(self, process: asyncio.subprocess.Process, master: int):
        self.process = process
        self._master = master
        self.text = ""
        os.set_blocking(master, False)
        asyncio.get_running_loop().add_reader(master, self._read)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    async def shows(self, text: str) -> None:
        await until(lambda: text in self.text, 30)

    def clear(self) -> None:
        self.text = ""

    def _read(self) -> None:
        try:
            self.text += os.read(self._master, 65536).decode("utf-8", "replace")
        except OSError:  # the other end was closed
            asyncio.get_running_loop().remove_reader(self._master)


@asynccontextmanager
async def at_terminal(served: Served) -> AsyncIterator[Screen]:
    master, slave = pty.openpty()
    process = await asyncio.create_subprocess_exec(
        *PROGRAM, "--url", str(served.http.base_url), env=environment(), stdin=slave, stdout=slave, stderr=slave, start_new_session=True
    )
    os.close(slave)
    screen = Screen(process, master)
    try:
        yield screen
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()
        asyncio.get_running_loop().remove_reader(master)
        os.close(master)


async def test_tokens_have_the_colours_of_who_wrote_them(served: Served, tokenizer: TextTokenizer) -> None:
    a, b, c, d, e = tokenizer.encode("abcde")
    served.answer_with(parts=[Part((a,)), Part((b, c, d), Round(3, 2, 0, 0b10), 2, drafted_mask=0b011), Part((e,), Round(0, 0))])
    async with at_terminal(served) as screen:
        await screen.shows("> ")
        assert "drafter, kept by the rule" in screen.text
        screen.clear()
        screen.type("hello\r")
        await screen.shows("tokens/s")
        assert "a\x1b[34mb\x1b[0m\x1b[1;4;33mc\x1b[0m\x1b[3;35md\x1b[0me" in screen.text
        assert "67% of drafts accepted" in screen.text
        screen.type("/quit\r")
        assert await asyncio.wait_for(screen.process.wait(), 20) == 0


async def test_ctrl_c_stops_an_answer_and_then_the_conversation(served: Served, tokenizer: TextTokenizer) -> None:
    served.answer_with(parts=[Part(tuple(tokenizer.encode("again ")))], endless=True, delay=0.05)
    async with at_terminal(served) as screen:
        await screen.shows("> ")
        screen.type("hello\r")
        await screen.shows("again again again")
        for _ in range(5):  # Python drops an interrupt that meets it in a finaliser; people press again
            os.kill(screen.process.pid, 2)
            with contextlib.suppress(TimeoutError):
                await until(lambda: "Stopped." in screen.text, 5)
                break
        assert "Stopped." in screen.text
        await until(lambda: served.engine.aborted)
        screen.clear()
        screen.type("/settings\r")
        await screen.shows("rule exact")
        await asyncio.sleep(0.2)
        os.kill(screen.process.pid, 2)
        assert await asyncio.wait_for(screen.process.wait(), 20) == 0
        assert "Traceback" not in screen.text


async def test_an_error_is_said_and_the_conversation_goes_on(served: Served) -> None:
    served.answer_with(refusal=QueueFull(4, 4))
    async with at_terminal(served) as screen:
        await screen.shows("> ")
        screen.type("hello\r")
        await screen.shows("at capacity")
        served.answer_with()
        screen.type("hello\r")
        await screen.shows("tokens/s")
        screen.type("\x04")
        assert await asyncio.wait_for(screen.process.wait(), 20) == 0


def test_what_a_server_says_cannot_command_the_terminal() -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=True)
    Terminal(sys.stdin, console, console).remark("no model \x1b]0;owned\x07 here")
    assert "no model ␛]0;owned␇ here" in written.getvalue()


def test_text_that_was_held_back_is_not_printed_twice() -> None:
    """A server tells of a token when it comes, and of its text when it is sure that no mark begins with it."""
    written = io.StringIO()
    console = Console(file=written, force_terminal=True, color_system=None)
    chunks = [("", "\n<tho"), ("", "rough"), ("\n<thorough> yes", "> yes"), (" indeed", "")]
    shown = ""
    for content, token in chunks:
        made = {"choices": [{"delta": {"content": content}, "provenance": [_token(token)] if token else []}]}
        shown += _print(msgspec.convert(made, Chunk), console, bool(shown))
    assert (written.getvalue(), shown) == ("\n<thorough> yes",) * 2
    _print(msgspec.convert({"choices": [{"delta": {"content": "plain"}}]}, Chunk), console, has_tokens=False)
    assert written.getvalue().endswith("yesplain"), "of a server that tells of no tokens"


def _token(text: str) -> dict[str, Any]:
    return {"text": text, "by": "target", "lossy": False, "role": "recovered"}


async def test_what_a_model_writes_cannot_command_the_terminal(served: Served, tokenizer: TextTokenizer) -> None:
    served.answer_with(parts=[Part(tuple(tokenizer.encode("x\x1b]0;owned\x07y")))])
    async with at_terminal(served) as screen:
        await screen.shows("> ")
        screen.clear()
        screen.type("hello\r")
        await screen.shows("tokens/s")
        assert "\x1b]0;" not in screen.text
        assert "␛]0;owned␇y" in screen.text
