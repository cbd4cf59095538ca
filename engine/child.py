"""The engine's process: loads, steps, reports. `python -m engine.child ENDPOINT INCARNATION`, started by engine/incarnation.py alone.

Everything happens in the main thread: commands are taken between steps and never waited for while there is work. The process ends when
its standard input does, wherever it stands, so it outlives nobody. Imports nothing heavy before it can do that.
"""

from __future__ import annotations

import faulthandler
import importlib
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

import msgspec
import zmq

from engine.client import Steppable
from engine.config import EngineConfig
from engine.errors import EngineDead, EngineError
from engine.logs import adopt_libraries, set_up
from engine.programs import die_with_starter
from engine.wire import (
    Abort,
    Add,
    Command,
    Failed,
    Heartbeat,
    Hello,
    Loaded,
    Progress,
    Report,
    Running,
    Start,
    Stepped,
    decode_command,
    encode,
)

_log = logging.getLogger("engine.child")  # this module runs as __main__

Factory = Callable[[EngineConfig, Callable[[str], None]], Steppable]


def main(endpoint: str, incarnation: str) -> NoReturn:
    """Load what the first frame says and step until the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group, and the parent decides what becomes of us
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # sent to an engine that hangs, before it is killed
    _die_with_parent()
    line = _Line(endpoint, incarnation)
    line.send(Hello(incarnation=incarnation))
    try:
        _serve(line)
    except EngineError as error:
        line.send(Failed.of(incarnation, error))
    except BaseException as error:  # noqa: BLE001  # whatever it is, the parent hears of it
        _log.exception("The engine stopped at an internal error")
        line.send(Failed.of(incarnation, EngineDead.of(error)))
    while True:
        signal.pause()  # the parent reads the frame and closes the pipe


def _serve(line: _Line) -> NoReturn:
    start = line.receive_one()
    assert isinstance(start, Start), start
    set_up(start.log_level, start.log_format, "engine")
    factory: Factory = _named(start.factory)
    adopt_libraries()
    core = factory(EngineConfig.model_validate_json(start.config), line.say)
    core.watch(lambda request_ids: line.send(Running(incarnation=line.incarnation, request_ids=request_ids)))
    line.send(Loaded(incarnation=line.incarnation, info=msgspec.structs.replace(core.info, incarnation=line.incarnation)))
    while True:
        for command in line.waiting(0 if core.has_work else start.heartbeat_seconds):
            _obey(core, command)
        line.send(Stepped(incarnation=line.incarnation, output=core.step()) if core.has_work else Heartbeat(incarnation=line.incarnation))


def _obey(core: Steppable, command: Command) -> None:
    match command:
        case Add(request=request):
            core.add(request)
        case Abort(request_id=request_id, choice=choice):
            core.abort(request_id, choice)
        case Start():
            raise AssertionError("an engine is started once")


class _Line:
    """Our end of the socket."""

    def __init__(self, endpoint: str, incarnation: str):
        self.incarnation = incarnation
        self._socket = zmq.Context().socket(zmq.PAIR)
        self._socket.set_hwm(0)  # a step never waits for who reads of it
        self._socket.connect(endpoint)

    def send(self, report: Report) -> None:
        self._socket.send(encode(report))

    def say(self, text: str) -> None:
        self.send(Progress(incarnation=self.incarnation, text=text))

    def receive_one(self) -> Command:
        """The next command, however long it takes."""
        while (command := decode_command(self._socket.recv())).incarnation != self.incarnation:
            pass
        return command

    def waiting(self, seconds: float) -> list[Command]:
        """All commands that are waiting; up to `seconds` are spent until there is one."""
        commands: list[Command] = []
        while self._socket.poll(0 if commands else round(1000 * seconds)):
            commands.append(self.receive_one())
        return commands


def _die_with_parent() -> None:
    """End within the moment in which standard input ends, that is, in which the parent closes it or is gone.

    A thread does it, so that neither loading nor a long step delays it. Linux can be asked for a kill when the thread that started us ends,
    and that one lives as long as the client: then not even code that keeps the interpreter lock does.
    """
    threading.Thread(target=_outlive_nobody, name="cascade-parent-watch", daemon=True).start()
    die_with_starter()


def _outlive_nobody() -> None:
    os.read(0, 1)  # nothing is ever written
    os._exit(0)


def _named(factory: str) -> Factory:
    module, _, function = factory.partition(":")
    made: Factory = getattr(importlib.import_module(module), function)
    return made


if __name__ == "__main__":
    main(*sys.argv[1:])
