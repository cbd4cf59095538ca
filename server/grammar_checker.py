"""Whether answers of a model can be held to a client's wish, asked in a process that can be killed: a wish may take for ever."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import select
import signal
import subprocess
import time
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import QueueFull
from engine.grammar.automaton import LONGEST
from engine.programs import command_of, environment
from server.errors import NotChecked

_log = logging.getLogger(__name__)

SECONDS = 5  # of a processor, for one answer; what is not monstrous takes a few milliseconds, and little that is takes one second
_PATIENCE = 6  # times as long by the clock: whoever serves gives way to the engine, and so do we
_TO_BEGIN = 60.0  # seconds for a process to be there, at the worst
_NUM_KNOWN = 256
_MOST_WAITING = 64
_LONGEST_QUESTION = 4 * LONGEST  # bytes: of a schema, whose grammar is about as long, or of a text with escapes


@dataclass(frozen=True)
class Checked:
    """A grammar, or why there is none, in the library's words."""

    grammar: str = ""
    mistake: str = ""


class Checker:
    """Asks about one wish at a time: nobody's schemas take the cores of all others. What was asked lately is known."""

    def __init__(self, folder: Path, end_token_ids: tuple[int, ...], seconds: int = SECONDS):
        """`folder` holds the model's tokenizer. The process is started for the first wish, which therefore takes a second."""
        self._command = command_of("server.grammar_child", str(folder), str(seconds), *map(str, end_token_ids))
        self._seconds = seconds
        self._known: OrderedDict[bytes, Checked] = OrderedDict()  # by digest, the newest last
        self._worker = ThreadPoolExecutor(1, "grammar-check")
        self._num_waiting = 0
        self._child: subprocess.Popen[bytes] | None = None
        self._is_closed = False

    async def made(self, kind: str, value: Any, white_space: str | None = None) -> Checked:
        """The grammar of a wish; kinds are those of server/structure.py, and `made` for a grammar of ours.

        Raises QueueFull, and NotChecked where this machine is to blame and not the wish.
        """
        question = await asyncio.to_thread(_encoded, {"kind": kind, "value": value, "white_space": white_space})
        if len(question) > _LONGEST_QUESTION:
            return Checked(mistake=f"it has {len(question)} bytes, and may have {_LONGEST_QUESTION}")
        key = hashlib.blake2b(question, digest_size=16).digest()
        if (known := self._known.get(key)) is not None:
            self._known.move_to_end(key)
            return known
        if self._is_closed:
            raise NotChecked
        if self._num_waiting >= _MOST_WAITING:
            raise QueueFull(self._num_waiting, self._seconds)
        self._num_waiting += 1
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._worker, self._ask, question)
        finally:
            self._num_waiting -= 1
        self._known[key] = found
        if len(self._known) > _NUM_KNOWN:
            self._known.popitem(last=False)
        return found

    async def mistake_in(self, grammar: str) -> str:
        """What is wrong with a grammar of our own making; "" for nothing. Raises as `made` does."""
        return (await self.made("made", grammar)).mistake

    def close(self) -> None:
        """End the process, and the thread."""
        self._is_closed = True
        if (child := self._child) is not None:
            child.kill()  # whoever waits for it is told at once
        self._worker.submit(self._end)
        self._worker.shutdown(wait=True)

    # ------------------------------------------------------------------ in the thread
    def _ask(self, question: bytes) -> Checked:
        """Ask the process that is there; if that ended meanwhile, a new one."""
        for is_new in (self._begin(), True):
            try:
                return Checked(**self._answer_to(question))
            except TimeoutError as error:  # it had no processor: one that has it ends by itself
                self._end()
                _log.warning(
                    "A grammar of %d bytes was not checked within %d s; is this machine busy?", len(question), _PATIENCE * self._seconds
                )
                raise NotChecked from error
            except (OSError, EOFError):
                if self._end() == -signal.SIGXCPU:
                    return self._refused(question, f"it takes longer than {self._seconds} s to check; simplify it")
                if is_new:  # a stack that is too deep, or memory
                    return self._refused(question, "it cannot be checked; simplify it")
                self._begin()
            except BaseException:  # a later question must not get this one's answer
                self._end()
                raise
        raise AssertionError("a process that is new is asked last")

    def _refused(self, question: bytes, mistake: str) -> Checked:
        if self._is_closed:
            raise NotChecked
        _log.warning("A grammar of %d bytes is refused: %s", len(question), mistake)
        return Checked(mistake=mistake)

    def _begin(self) -> bool:
        """Have a process that waits for a question. Returns whether it is a new one. Raises NotChecked."""
        if self._child is not None and self._child.poll() is None:
            return False
        self._end()
        try:
            self._child = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment())
            if self._is_closed:
                self._child.kill()
            _line_of(self._child, _TO_BEGIN)
        except (OSError, EOFError) as error:  # a TimeoutError is an OSError
            self._end()
            _log.exception("No process that checks grammars can be started")
            raise NotChecked from error
        return True

    def _answer_to(self, question: bytes) -> Mapping[str, str]:
        """Raises TimeoutError, EOFError and OSError."""
        assert self._child is not None
        assert self._child.stdin is not None
        self._child.stdin.write(question)
        self._child.stdin.flush()
        answer: Mapping[str, str] = json.loads(_line_of(self._child, _PATIENCE * self._seconds))
        return answer

    def _end(self) -> int:
        """End the process, if there is one. Returns its status."""
        if (child := self._child) is None:
            return 0
        self._child = None
        child.kill()
        for pipe in filter(None, (child.stdin, child.stdout)):
            with contextlib.suppress(OSError):  # what was not written is lost with the process
                pipe.close()
        return child.wait()


def _encoded(question: Mapping[str, Any]) -> bytes:
    """A line. Lone surrogates, which JSON may have, stay escapes."""
    try:
        return json.dumps(question, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(question).encode() + b"\n"


def _line_of(child: subprocess.Popen[bytes], seconds: float) -> bytes:
    """What a process says next. Raises TimeoutError and EOFError."""
    assert child.stdout is not None
    said, end, waiting = bytearray(), time.monotonic() + seconds, select.poll()
    waiting.register(child.stdout, select.POLLIN)
    while not said.endswith(b"\n"):
        if not waiting.poll(max(0.0, 1000 * (end - time.monotonic()))):
            raise TimeoutError("the process says nothing")
        more = os.read(child.stdout.fileno(), 1 << 16)
        if not more:
            raise EOFError("the process ended")
        said += more
    return bytes(said)
