"""Priorities and waiting of threads: what is asked of the system, and that a refusal harms nothing. Changes nothing of this process."""

from __future__ import annotations

import errno
import os
import sys

import pytest

from engine.threads import defaults, give_way


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has priorities of threads")
def test_a_system_without_priorities_is_said_and_survived(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(os, "setpriority", lambda *_: None)
    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    give_way()
    assert "cannot give way to those of the engine: Function not implemented" in caplog.text


@pytest.mark.parametrize("variable", ["GOMP_SPINCOUNT", "OMP_WAIT_POLICY"])
def test_what_the_user_set_stays(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    assert defaults() == {"GOMP_SPINCOUNT": "10000"}
    monkeypatch.setenv(variable, "passive")
    assert defaults() == {}
