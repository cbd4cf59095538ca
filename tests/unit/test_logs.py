"""The two ways in which a record is written: what each shows, and that a line which is to be JSON always is."""

from __future__ import annotations

import io
import json
import logging
import math
import subprocess
import sys
from typing import Any

import pytest

from engine.logs import ConsoleFormatter, JsonFormatter


class Stubborn:
    """Has no text."""

    def __str__(self) -> str:
        raise RuntimeError("no")

    __repr__ = __str__


def holding_itself() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def record(message: object = "hello", *args: object, **given: Any) -> logging.LogRecord:
    extra = given.pop("extra", {})
    made = logging.getLogger("some.where").makeRecord("some.where", logging.WARNING, "a.py", 1, message, args, given.get("exc_info"))
    made.created = 1_800_000_000.125
    vars(made).update(extra)
    return made


def parsed(made: logging.LogRecord) -> dict[str, Any]:
    """A line of JSON: strictly, in one line, in ASCII."""
    line = JsonFormatter("engine").format(made)
    assert line.isascii()
    assert line.isprintable()
    found: dict[str, Any] = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return found


def raised(error: Exception) -> Any:
    try:
        raise error
    except Exception:  # noqa: BLE001
        return sys.exc_info()


def test_a_json_line_says_when_where_and_what() -> None:
    assert parsed(record("%d of %s", 2, "three", extra={"request_id": "r-1", "fields": {"status": 200, "model": "tiny"}})) == {
        "time": "2027-01-15T08:00:00.125Z",
        "level": "warning",
        "process": "engine",
        "logger": "some.where",
        "message": "2 of three",
        "status": 200,
        "model": "tiny",
        "request_id": "r-1",
    }


def test_a_traceback_is_a_text_in_the_line() -> None:
    found = parsed(record(exc_info=raised(ValueError('two\nlines "quoted" \u2028 \udc80 é'))))
    assert found["exception"].splitlines()[0] == "Traceback (most recent call last):"
    assert 'ValueError: two\nlines "quoted" \u2028 \udc80 é' in found["exception"]


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        b"\xff",
        {1: {2, 3}},
        Stubborn(),
        {Stubborn(): 1},
        holding_itself(),
        "\x00\n\x85\u2029\udfff",
        10**5000,
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_json_line_is_json_whatever_is_in_it(value: Any) -> None:
    found = parsed(record(extra={"fields": {"value": value, "nested": {"deep": [value]}}}))
    assert found["message"] == "hello"
    assert parsed(record("%s", value))["level"] == "warning"


@pytest.mark.parametrize(("message", "args"), [("%d", ("x",)), ("%s %s", ("one",)), (Stubborn(), ()), ("%s", (Stubborn(),))])
def test_a_message_that_cannot_be_made_costs_no_line(message: object, args: tuple[object, ...]) -> None:
    assert parsed(record(message, *args))["message"].startswith("(a text that cannot be made: ")
    assert "(a text that cannot be made: " in ConsoleFormatter().format(record(message, *args))


def test_fields_hide_nothing_of_the_line() -> None:
    found = parsed(record(extra={"request_id": "r", "fields": {"level": "x", "message": "x", "time": "x", "request_id": "x"}}))
    assert (found["level"], found["message"], found["request_id"]) == ("warning", "hello", "r")


def test_numbers_that_json_has_not_are_null() -> None:
    found = parsed(record(extra={"fields": {"a": math.nan, "b": [math.inf], "c": 0.25, "d": True, "e": None}}))
    assert {name: found[name] for name in "abcde"} == {"a": None, "b": [None], "c": 0.25, "d": True, "e": None}


def test_a_console_line_is_for_people() -> None:
    fields = {"status": 200, "path": "/v1/models", "said": "a b", "rate": 0.25, "none": None, "all": ["x", 1], "on": True, "empty": ""}
    line = ConsoleFormatter("engine: ").format(record(extra={"request_id": "r-1", "fields": fields}))
    _, _, rest = line.split(" ", 2)
    assert rest == ('WARNING engine: some.where: [r-1] hello status=200 path=/v1/models said="a b" rate=0.25 all=["x", 1] on=true empty=""')


def test_nobody_writes_a_line_of_the_console_log_but_us() -> None:
    line = ConsoleFormatter().format(record("one\nINFO two\x1b[2J", extra={"fields": {"path": "/a\r\nINFO three\x9b"}}))
    assert "\n" not in line
    assert line.isprintable()
    assert "one\\nINFO two\\x1b[2J" in line
    trace = ConsoleFormatter().format(record(exc_info=raised(ValueError("red \x1b[31m"))))
    assert trace.splitlines()[-1] == "  ValueError: red \\x1b[31m"
    assert "\x1b" not in trace


def test_an_errors_text_is_no_line_of_the_console_log() -> None:
    head, *trace = (
        ConsoleFormatter().format(record(exc_info=raised(ValueError("one\nINFO forged\r\nINFO again \u202e\u2066")))).splitlines()
    )
    assert head.endswith("hello")
    assert all(line.startswith("  ") for line in trace)
    assert trace[-2:] == ["  INFO forged\\x0d", "  INFO again \\u202e\\u2066"]
    turned = ConsoleFormatter().format(record("a \u202e b", extra={"fields": {"path": "\u2066x\u202a"}}))
    assert turned.endswith('a \\u202e b path="\\u2066x\\u202a"')


PROGRAM = """
import logging, sys, threading, warnings
from engine.logs import format_in_use, say, set_up
set_up("INFO", "console")
set_up("WARNING", "json")
assert format_in_use() == "json"
logging.getLogger("some.where").info("not this")
logging.getLogger("httpx").info("nor this")
say("Ready\\nnow")
warnings.warn("mind", stacklevel=1)
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
raise KeyError("the end")
"""


def test_whatever_a_process_says_is_json() -> None:
    """What is said at any level, warnings, and errors that nobody foresaw, in threads, too; each once."""
    done = subprocess.run([sys.executable, "-W", "default", "-c", PROGRAM], capture_output=True, text=True, timeout=60)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(line["level"], line["logger"]) for line in lines] == [
        ("info", "cascade"),
        ("warning", "py.warnings"),
        ("critical", "cascade"),
        ("critical", "cascade"),
    ]
    assert lines[0]["message"] == "Ready\nnow"
    assert "ZeroDivisionError" in lines[2]["exception"]
    assert lines[3]["exception"].endswith("KeyError: 'the end'")
    assert (done.returncode, done.stdout) == (1, "")


def test_what_others_have_set_up_is_left_alone() -> None:
    code = "import logging, engine.logs as logs; logging.basicConfig(format='mine %(message)s'); logs.set_up('INFO', 'json'); " + (
        "logging.warning('x'); assert logs.format_in_use() == 'console'"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60).stderr == "mine x\n"


def test_libraries_with_handlers_of_their_own_write_by_ours() -> None:
    code = """
import logging, sys
from engine.logs import adopt_libraries, set_up
library = logging.getLogger("transformers")
library.addHandler(logging.StreamHandler(sys.stderr))
library.propagate = False
set_up("INFO", "json", "engine")
adopt_libraries()
logging.getLogger("transformers.models").warning("a word")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    (line,) = map(json.loads, done.stderr.splitlines())
    assert (line["process"], line["logger"], line["message"]) == ("engine", "transformers.models", "a word")


def test_a_handler_writes_a_whole_line() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter("server"))
    handler.handle(record("a\nb"))
    assert stream.getvalue().endswith("\n")
    assert stream.getvalue().count("\n") == 1
