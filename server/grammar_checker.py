"""Whether answers of a model can be held to a client's wish, asked in a process that can be killed: a wish may take for ever."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import select
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.grammar.automaton import LONGEST

_log = logging.getLogger(__name__)

SECONDS = 5.0  # for one answer; what is not monstrous takes a few milliseconds, and little that is takes one second
_TO_BEGIN = 60.0  # for a process to be there, at the worst
_NUM_KNOWN = 256
_LONGEST_QUESTION = 4 * LONGEST  # bytes: of a schema, whose grammar is about as long, or of a text with escapes


@dataclass(frozen=True)
class Checked:
    """A grammar, or why there is none, in the library's words."""

    grammar: str = ""
    mistake: str = ""


class Checker:
    """Asks about one wish at a time: nobody's schemas take the cores of all others. What was asked lately is known."""

    def __init__(self, folder: Path, end_token_ids: tuple[int, ...], seconds: float = SECONDS):
        """`folder` holds the model's tokenizer. The process is started for the first wish, which therefore takes a second."""
        self._command = [sys.executable, "-m", "server.grammar_child", str(folder), *map(str, end_token_ids)]
        self._seconds = seconds
        self._known: OrderedDict[bytes, Checked] = OrderedDict()  # by digest, the newest last
        self._worker = ThreadPoolExecutor(1, "grammar-check")
        self._child: subprocess.Popen[bytes] | None = None

    async def made(self, kind: str, value: Any, white_space: str | None = None) -> Checked:
        """The grammar of a wish; kinds are those of server/structure.py."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, self._ask, kind, value, white_space)

    async def mistake_in(self, grammar: str) -> str:
        """What is wrong with a grammar of our own making; "" for nothing."""
        return (await self.made("made", grammar)).mistake

    def close(self) -> None:
        """End the process, and the thread."""
        self._worker.shutdown(wait=False, cancel_futures=True)
        self._end()

    # ------------------------------------------------------------------ in the thread
    def _ask(self, kind: str, value: Any, white_space: str | None) -> Checked:
        question = json.dumps({"kind": kind, "value": value, "white_space": white_space}).encode() + b"\n"
        if len(question) > _LONGEST_QUESTION:
            return Checked(mistake=f"it has {len(question)} bytes, and may have {_LONGEST_QUESTION}")
        key = hashlib.blake2b(question, digest_size=16).digest()
        if key not in self._known:
            try:
                self._known[key] = Checked(**self._answer_to(question))
            except TimeoutError:
                self._end()
                _log.warning("A grammar of %d bytes was not checked within %g s, and is refused", len(question), self._seconds)
                self._known[key] = Checked(mistake=f"it takes longer than {self._seconds:g} s to check; simplify it")
            except (OSError, EOFError):  # it ended the process: a stack that is too deep, or memory
                self._end()
                _log.exception("The process that checks grammars was lost over one of %d bytes, which is refused", len(question))
                self._known[key] = Checked(mistake="it cannot be checked; simplify it")
            if len(self._known) > _NUM_KNOWN:
                self._known.popitem(last=False)
        return self._known[key]

    def _answer_to(self, question: bytes) -> Mapping[str, str]:
        """Raises TimeoutError, EOFError and OSError."""
        if self._child is None:
            self._child = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # our own
            _line_of(self._child, _TO_BEGIN)
        assert self._child.stdin is not None
        self._child.stdin.write(question)
        self._child.stdin.flush()
        answer: Mapping[str, str] = json.loads(_line_of(self._child, self._seconds))
        return answer

    def _end(self) -> None:
        if (child := self._child) is not None:
            self._child = None
            child.kill()
            for pipe in filter(None, (child.stdin, child.stdout)):
                with contextlib.suppress(OSError):  # what was not written is lost with the process
                    pipe.close()
            child.wait()


def _line_of(child: subprocess.Popen[bytes], seconds: float) -> bytes:
    """What a process says next. Raises TimeoutError and EOFError."""
    assert child.stdout is not None
    said, end = bytearray(), time.monotonic() + seconds
    while not said.endswith(b"\n"):
        if not select.select([child.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
            raise TimeoutError
        more = os.read(child.stdout.fileno(), 1 << 16)
        if not more:
            raise EOFError("the process ended")
        said += more
    return bytes(said)
