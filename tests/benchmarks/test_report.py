"""From JSON files to the table of the README."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.environment import environment
from benchmarks.errors import BenchmarkError
from benchmarks.report import BEGIN, END, FOLDER, app, table_of, with_table


def result(**changes: Any) -> dict[str, Any]:
    environment = {"date": "2026-01-02T03:04:05+00:00", "command": "cascade bench", "machine": "Abacus", "num_cpus": 2}
    versions = {"cascade-serve": "1", "torch": "2", "python": "3"}
    found = {"benchmark": "serve", "headline": ["fast", "a|b"], "environment": environment | {"versions": versions}}
    return found | {"target": {"device": "cpu"}, "figures": {}} | changes


def test_a_row_is_what_the_file_says(tmp_path: Path) -> None:
    later = result(headline=["later"])
    later["environment"] |= {"date": "2026-02-01T00:00:00+00:00"}
    (tmp_path / "a.json").write_text(json.dumps(later))
    (tmp_path / "b.json").write_text(json.dumps(result()))
    _, _, first, second = table_of(tmp_path).splitlines()
    assert first == "| 2026-01-02 | serve | Abacus, 2 CPUs, cpu | cascade-serve 1, torch 2 | `cascade bench` | fast<br>a\\|b |"
    assert "later" in second


def test_figures_that_mean_little_and_foreign_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(result(is_quick=True)))
    with pytest.raises(BenchmarkError, match="--quick"):
        table_of(tmp_path)
    file.write_text("{}")
    with pytest.raises(BenchmarkError, match="is not the result of a benchmark"):
        table_of(tmp_path)


def test_only_what_stands_between_the_markers_changes() -> None:
    text = f"head\n{BEGIN}\nold\n{END}\ntail\n"
    assert with_table(text, "new") == f"head\n{BEGIN}\nnew\n{END}\ntail\n"
    with pytest.raises(BenchmarkError, match="needs the lines"):
        with_table("no markers", "new")


def test_the_readme_shows_the_results_that_are_there() -> None:
    assert CliRunner().invoke(app, ["--check"]).exit_code == 0
    assert BEGIN in (FOLDER / "README.md").read_text("utf-8")


def test_a_command_is_shown_without_keys_and_without_where_its_result_went(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["cascade", "bench", "--output", "/home/a/x.json", "--api-key", "k", "--seed", "1", "--output=/home/a/y", "--api-key=k"]
    monkeypatch.setattr("sys.argv", asked)
    assert environment("cascade bench").command == "cascade bench --api-key '(hidden)' --seed 1 '--api-key=(hidden)'"
