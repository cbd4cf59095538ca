"""The file of answers: what a kill leaves is used, what another run left is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.errors import BenchmarkError
from benchmarks.evaluate.record import Journal
from tests.evaluate.records import make_record

SETTINGS = {"seed": 0, "deployment": {"engine": {"block_size": 16}}, "points": ["target", "exact"]}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "new" / "answers.jsonl"
    with Journal(path, SETTINGS) as journal:
        journal.append([make_record("target"), make_record("exact")])
    return path


def test_records_are_there_again(file: Path) -> None:
    with Journal(file, SETTINGS) as journal:
        assert journal.records == [make_record("target"), make_record("exact")]


def test_half_a_line_is_dropped(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:-20])
    with Journal(file, SETTINGS) as journal:
        assert journal.records == [make_record("target")]
        journal.append([make_record("exact")])
    assert file.read_bytes() == content


def test_a_killed_beginning_is_a_beginning(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:10])
    with Journal(file, SETTINGS) as journal:
        assert journal.records == []


def test_another_run_is_refused_by_what_differs(file: Path) -> None:
    other = SETTINGS | {"seed": 1, "deployment": {"engine": {"block_size": 32}}, "points": ["target"]}
    with pytest.raises(BenchmarkError) as error:
        Journal(file, other)
    for part in (
        "deployment.engine.block_size was 16 and is 32",
        "seed was 0 and is 1",
        "points was target, exact and is target",
        "--fresh",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    with Journal(file, other, is_fresh=True) as journal:
        assert journal.records == []


def test_a_file_of_something_else_is_refused(file: Path) -> None:
    file.write_text('{"a": 1}\n')
    with pytest.raises(BenchmarkError, match="is not a run of `cascade evaluate`"):
        Journal(file, SETTINGS)


def test_two_runs_do_not_write_to_one_file(file: Path) -> None:
    with Journal(file, SETTINGS), pytest.raises(BenchmarkError, match="is being written by another run"):
        Journal(file, SETTINGS)
