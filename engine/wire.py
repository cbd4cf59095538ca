"""The frames between an engine's process and whoever started it, and how they look on the wire: MessagePack, tagged by their class.

Every frame carries the id of the incarnation that it is from or for; who receives one of another incarnation drops it. One frame a step
tells what became of all sequences. Nothing here opens a socket.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from engine import errors
from engine.errors import EngineDead, EngineError
from engine.logs import LogFormat
from engine.request import Request
from engine.stats import EngineInfo, StepOutput


class Frame(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """One message."""

    incarnation: str


# ---------------------------------------------------------------------- to the engine
class Start(Frame, frozen=True, tag=True):
    """The first frame: what to load, and how to report."""

    config: str  # an EngineConfig as JSON
    factory: str  # "module:function" that makes the core of a config and a progress callback
    heartbeat_seconds: float  # an idle engine says so this often
    log_level: int
    log_format: LogFormat


class Add(Frame, frozen=True, tag=True):
    """Run a request that Admission has let through."""

    request: Request


class Abort(Frame, frozen=True, tag=True):
    """Drop one choice."""

    request_id: str
    choice: int


# ---------------------------------------------------------------------- from the engine
class Hello(Frame, frozen=True, tag=True):
    """The process runs and waits for Start."""


class Progress(Frame, frozen=True, tag=True):
    """What loading is at, for people."""

    text: str


class Loaded(Frame, frozen=True, tag=True):
    """Loaded and warmed up; requests may come."""

    info: EngineInfo


class Running(Frame, frozen=True, tag=True):
    """A pass is about to begin, or a grammar to be made ready, for other requests than before: if the process ends, one of these is to
    blame."""

    request_ids: tuple[str, ...]


class Stepped(Frame, frozen=True, tag=True):
    """One step, for all sequences."""

    output: StepOutput


class Heartbeat(Frame, frozen=True, tag=True):
    """Idle, and able to say so."""


class Failed(Frame, frozen=True, tag=True):
    """The last frame: loading or a step raised."""

    kind: str  # a class of engine/errors.py
    message: str
    attributes: Mapping[str, Any]

    @classmethod
    def of(cls, incarnation: str, error: EngineError) -> Failed:
        """A frame for an error; a subclass that engine/errors.py does not have travels as the nearest class that it has."""
        kind = next(base.__name__ for base in type(error).__mro__ if getattr(errors, base.__name__, None) is base)
        attributes = msgspec.to_builtins(vars(error), enc_hook=str)  # one of a class of its own, such as a path, arrives as its text
        return cls(incarnation=incarnation, kind=kind, message=str(error), attributes=attributes)

    def error(self) -> EngineError:
        """The error again: its class, message and attributes, without its traceback."""
        kind = getattr(errors, self.kind, None)
        if not (isinstance(kind, type) and issubclass(kind, EngineError)):
            return EngineDead(f"The engine failed with an error of an unknown class, {self.kind}: {self.message}")
        error = kind.__new__(kind)  # not its __init__: some classes write their message themselves
        EngineError.__init__(error, self.message)
        vars(error).update(self.attributes)
        return error


Command = Start | Add | Abort
Report = Hello | Progress | Loaded | Running | Stepped | Heartbeat | Failed

_encoder = msgspec.msgpack.Encoder()
_commands: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_reports: msgspec.msgpack.Decoder[Report] = msgspec.msgpack.Decoder(Report)


def encode(frame: Command | Report) -> bytes:
    """Raises TypeError for what is no plain data, such as a token id of numpy: in another shape it would end whoever reads it."""
    return _encoder.encode(frame)


def decode_command(frame: bytes) -> Command:
    return _commands.decode(frame)


def decode_report(frame: bytes) -> Report:
    return _reports.decode(frame)
