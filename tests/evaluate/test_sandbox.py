"""Programs that misbehave are ended, and how they ended is said."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from benchmarks.evaluate.sandbox import Limits, run

LIMITS = Limits(cpu_seconds=1, wall_seconds=2.5)


def test_a_program_passes_if_it_reaches_its_end() -> None:
    assert run("assert 1 + 1 == 2", LIMITS).verdict == "passed"
    assert run("print('x', end='')", LIMITS).verdict == "passed"
    outcome = run("assert 1 + 1 == 3", LIMITS)
    assert (outcome.verdict, outcome.detail) == ("failed", "AssertionError")


@pytest.mark.parametrize("end", ["import sys; sys.exit(0)", "import os; os._exit(0)"])
def test_an_early_end_is_no_pass(end: str) -> None:
    outcome = run(f"print('all tests passed')\n{end}", LIMITS)
    assert (outcome.verdict, outcome.detail) == ("failed", "ended early with 0")


def test_an_endless_loop_is_ended_by_the_processor_time_it_used() -> None:
    outcome = run("while True: pass", LIMITS)
    assert (outcome.verdict, outcome.detail) == ("timeout", "used 1 s of processor time")


def test_a_sleeper_is_ended_by_the_clock() -> None:
    start = time.monotonic()
    outcome = run("import time; time.sleep(60)", Limits(wall_seconds=0.5))
    assert (outcome.verdict, outcome.detail) == ("timeout", "ran for 0.5 s")
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("program", "detail"),
    [
        ("x = bytearray(2 << 30)", "MemoryError"),
        ("f = open('big', 'wb')\nwhile True: f.write(b'x' * 100_000); f.flush()", "OSError: [Errno 27] File too large"),
        ("files = [open(str(i), 'w') for i in range(100)]", "OSError: [Errno 24] Too many open files"),
        ("import numpy", "ModuleNotFoundError"),
    ],
)
def test_limits_hold(program: str, detail: str) -> None:
    outcome = run(program, LIMITS)
    assert outcome.verdict == "failed"
    assert outcome.detail.startswith(detail)


def test_a_flood_of_output_is_cut() -> None:
    assert run("while True: print('x' * 1000)", LIMITS).verdict == "failed"


def test_the_environment_is_not_the_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert run("import os; assert 'secret' not in os.environ.values()", LIMITS).verdict == "passed"


def test_what_the_system_permits_is_shut(tmp_path: Path) -> None:
    """Each fence that the jail says it has holds."""
    tmp_path.chmod(0o777)
    isolation = run("", LIMITS).isolation
    programs = {
        "network": "import socket; socket.create_connection(('127.0.0.1', 1), 1)",
        "processes": f"import os; os.kill({os.getpid()}, 0)",
        "files": f"open({str(tmp_path / 'outside')!r}, 'w').write('x')",
        "user": "import os; os.fork()",
    }
    for fence, program in programs.items():
        if getattr(isolation, fence):
            assert run(program, LIMITS).verdict == "failed", fence
    assert isolation.files is False or not (tmp_path / "outside").exists()


def test_nothing_is_left_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither files nor processes, also not those that went into a session of their own."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mark = f"cascade-{os.getpid()}"
    outcome = run(
        f"import os, time\nopen('left', 'w').write('x')\nif os.fork() == 0:\n    os.setsid(); time.sleep(600)  # {mark}\n", LIMITS
    )
    assert list(tmp_path.iterdir()) == []
    if outcome.isolation.processes or outcome.isolation.user:
        mine = [place for place in Path("/proc").glob("[0-9]*/cmdline") if b"program.py" in _read(place)]
        assert mine == []


def _read(place: Path) -> bytes:
    try:
        return place.read_bytes()
    except OSError:  # it has ended meanwhile
        return b""
