"""How the log is written: a line for people, or a JSON object, for each record. The server's process and the engine's both write by it.

A record may hold more than its message: `extra={"fields": {...}}`, plain values by name, which both formats show. What must never happen is
that a line which is to be JSON is none, whatever a record holds, so nothing here raises. Beyond reach is what the interpreter itself
writes when it can do nothing else: the stacks of a process that hangs or crashes (faulthandler).
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from functools import partial
from types import TracebackType
from typing import Any, Literal

LogFormat = Literal["console", "json"]
SAID = "cascade"  # the logger of what is said whatever the level, such as that the server is ready

_CHATTY = ("httpx", "httpcore", "httpx2", "httpcore2", "filelock", "asyncio", "sse_starlette")  # which logs every chunk of an answer
_STUBBORN = ("transformers", "huggingface_hub")  # write by handlers of their own
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))}
_CONTROLS |= {code: f"\\u{code:04x}" for code in (*range(0x2028, 0x202F), *range(0x2066, 0x206A))}  # line ends, and what turns text round
_IN_A_LINE = _CONTROLS | {0x0A: "\\n", 0x0D: "\\r", 0x09: "\\t"}
_IN_A_TRACE = {code: text for code, text in _CONTROLS.items() if code not in (0x09, 0x0A)}
_BARE = re.compile(r"[\w./:+@%,*-]+", re.ASCII)


class ConsoleFormatter(logging.Formatter):
    """`TIME LEVEL LOGGER: [REQUEST] MESSAGE name=value ...`, and a traceback below, set in. Control characters are shown and do nothing."""

    def __init__(self, prefix: str = ""):
        super().__init__()
        self._prefix = prefix

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        about = f"[{request_id}] " if (request_id := _request_of(record)) else ""
        fields = [f"{name}={_shown(value)}" for name, value in _fields_of(record).items() if value is not None]
        head = f"{when} {record.levelname} {self._prefix}{record.name}: {about}{' '.join([_message_of(record), *fields])}"
        lines = "\n".join(_traces_of(self, record).values()).translate(_IN_A_TRACE).splitlines()
        return "\n  ".join([head.translate(_IN_A_LINE), *lines])  # set in, as a line of an error's text could be taken for ours


class JsonFormatter(logging.Formatter):
    """One JSON object: time (UTC), level, process, logger, message, and what else there is. ASCII alone, so that no reader splits it."""

    def __init__(self, process: str):
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        head = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": _message_of(record),
        }
        about = {"request_id": request_id} if (request_id := _request_of(record)) else {}
        content = {**_fields_of(record), **about, **_traces_of(self, record)}
        try:
            return json.dumps(head | {name: value for name, value in _plain(content).items() if name not in head})
        except Exception as error:  # noqa: BLE001  # a value that nobody can write, such as one that holds itself
            return json.dumps(head | {"unwritten": type(error).__name__})


def set_up(level: int | str, form: LogFormat, process: str = "server", filters: Iterable[logging.Filter] = ()) -> None:
    """Write to standard error, from now on and in this process. Nothing where somebody else has set logging up, as tests have."""
    root = logging.getLogger()
    if any(not isinstance(handler, _Handler) for handler in root.handlers):
        return
    handler = _Handler(sys.stderr, form, process)
    for each in filters:
        handler.addFilter(each)
    root.handlers[:] = [handler]
    root.setLevel(level)
    logging.getLogger(SAID).setLevel(logging.INFO)
    quieten()
    if form == "json":
        logging.captureWarnings(True)
        sys.excepthook = _log_uncaught
        threading.excepthook = lambda given: _log_uncaught(given.exc_type, given.exc_value, given.exc_traceback)
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read by huggingface_hub when it is imported


def quieten() -> None:
    """Have libraries that say too much, and things that are nobody's business, say only what is wrong."""
    for chatty in _CHATTY:
        logging.getLogger(chatty).setLevel(logging.WARNING)


def adopt_libraries() -> None:
    """Have libraries that write by handlers of their own write by ours. To be called when they have been imported."""
    for name in _STUBBORN:
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True


def format_in_use() -> LogFormat:
    """That of this process, as `set_up` has left it."""
    return next((handler.form for handler in logging.getLogger().handlers if isinstance(handler, _Handler)), "console")


def say(text: str) -> None:
    """Log what everybody is to see, whatever the level: that the server is ready, that it ends."""
    logging.getLogger(SAID).info("%s", text)


class _Handler(logging.StreamHandler[Any]):
    """Ours, so that it can be told from others."""

    def __init__(self, stream: Any, form: LogFormat, process: str):
        super().__init__(stream)
        self.form: LogFormat = form
        self.setFormatter(JsonFormatter(process) if form == "json" else ConsoleFormatter("" if process == "server" else f"{process}: "))


def _log_uncaught(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    """As the interpreter's own hooks, but a record."""
    if issubclass(kind, (SystemExit, KeyboardInterrupt)):
        return
    logging.getLogger(SAID).critical("An error that nobody foresaw", exc_info=(kind, error or kind(), trace))


# ---------------------------------------------------------------------- what a record holds
def _request_of(record: logging.LogRecord) -> str:
    return str(getattr(record, "request_id", ""))


def _fields_of(record: logging.LogRecord) -> Mapping[str, object]:
    fields = getattr(record, "fields", None)
    return fields if isinstance(fields, Mapping) else {}


def _message_of(record: logging.LogRecord) -> str:
    return _safely(record.getMessage)


def _traces_of(formatter: logging.Formatter, record: logging.LogRecord) -> dict[str, str]:
    traces = {}
    if (raised := record.exc_info) and raised[0] is not None:
        traces["exception"] = _safely(lambda: formatter.formatException(raised))
    if record.stack_info:
        traces["stack"] = record.stack_info
    return traces


def _safely(write: Callable[[], str]) -> str:
    """What `write` makes. A record whose text cannot be made is still a record: what is wrong with it stands there instead."""
    try:
        return write()
    except Exception as error:  # noqa: BLE001  # whatever a library logs must not cost the line
        return f"(a text that cannot be made: {type(error).__name__})"


def _plain(value: Any) -> Any:
    """The same in what JSON has: no NaN, no keys but texts, and the text of whatever else there is."""
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_safely(partial(str, name)): _plain(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return _safely(partial(str, value))


def _shown(value: object) -> str:
    """A field's value for people: bare where that is plain, else as JSON has it."""
    if isinstance(value, float):
        return f"{value:g}" if abs(value) < 1e6 else f"{value:.0f}"
    text = value if isinstance(value, str) else _safely(lambda: json.dumps(_plain(value), ensure_ascii=False))
    return text if _BARE.fullmatch(text) or not isinstance(value, str) else json.dumps(text, ensure_ascii=False)
