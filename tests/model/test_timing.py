"""Times of passes: measured once, kept if that took long, and measured again where what was kept is not theirs."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest

from engine.model import timing
from engine.model.stack import DecoderStack
from engine.model.timing import MEASURED_ROWS, measure, pass_seconds
from tests.tiny import target_model


@pytest.fixture(scope="module")
def stack() -> DecoderStack:
    return DecoderStack(copy.deepcopy(target_model()))


def test_passes_are_measured(stack: DecoderStack) -> None:
    found = measure(stack)
    assert tuple(found) == MEASURED_ROWS
    assert all(0 < seconds < 5 for seconds in found.values())


def test_a_slow_model_is_measured_at_few_sizes(stack: DecoderStack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_BUDGET_SECONDS", 0.0)
    assert tuple(measure(stack)) == MEASURED_ROWS[:1]


def test_what_took_long_is_kept(stack: DecoderStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pass_seconds(stack, {"path": "x"}, tmp_path)
    assert not list(tmp_path.iterdir()), "milliseconds are not worth a file"
    monkeypatch.setattr(timing, "_WORTH_KEEPING_SECONDS", 0.0)
    found = pass_seconds(stack, {"path": "x"}, tmp_path)
    monkeypatch.setattr(timing, "measure", lambda stack, sizes=MEASURED_ROWS, recorder=None: {1: 1.0})
    assert pass_seconds(stack, {"path": "x"}, tmp_path) == found
    assert pass_seconds(stack, {"path": "y"}, tmp_path) == {1: 1.0}
    assert len(list((tmp_path / "costs").iterdir())) == 2


def test_what_was_kept_of_a_busy_machine_is_measured_again(stack: DecoderStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_WORTH_KEEPING_SECONDS", 0.0)

    def start(*seconds: float) -> dict[int, float]:
        """With passes over 1 and 2 rows that take so long now."""
        now = dict(zip((1, 2), seconds, strict=True))
        monkeypatch.setattr(timing, "measure", lambda stack, sizes=(1, 2), recorder=None: {rows: now[rows] for rows in sizes})
        return pass_seconds(stack, {}, tmp_path)

    assert start(8.0, 9.0) == {1: 8.0, 2: 9.0}
    assert start(7.0, 7.0) == {1: 8.0, 2: 9.0}, "no reason to measure again"
    assert start(80.0, 90.0) == {1: 8.0, 2: 9.0}, "busy now"
    assert start(1.0, 20.0) == {1: 1.0, 2: 9.0}, "the lesser of each"
    assert start(30.0, 30.0) == {1: 1.0, 2: 9.0}, "and that was kept"


@pytest.mark.parametrize("change", [{"key": {}}, {"seconds": {"1": -1}}, {"seconds": {"3": 1}}, {"seconds": []}, None])
def test_a_file_that_does_not_fit_is_measured_again(
    stack: DecoderStack, tmp_path: Path, change: dict[str, object] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "_WORTH_KEEPING_SECONDS", 0.0)
    pass_seconds(stack, {}, tmp_path)
    (file,) = (tmp_path / "costs").iterdir()
    file.write_text("{" if change is None else json.dumps(json.loads(file.read_text()) | change))
    monkeypatch.setattr(timing, "measure", lambda stack, sizes=MEASURED_ROWS, recorder=None: {1: 7.0})
    assert pass_seconds(stack, {}, tmp_path) == {1: 7.0}
    assert json.loads(file.read_text())["seconds"] == {"1": 7.0}


def test_a_folder_that_cannot_be_written_is_said(
    stack: DecoderStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(timing, "_WORTH_KEEPING_SECONDS", 0.0)
    (tmp_path / "costs").write_text("a file")
    assert pass_seconds(stack, {}, tmp_path)
    assert "cannot be kept" in caplog.text
