"""The command line as far as it goes without models: exit codes, one-line errors, and no torch for a help text."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

from engine.errors import ConfigError
from server.cli import app

runner = CliRunner()


def test_help_and_version_need_no_torch() -> None:
    code = "import sys, server.cli; sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'fastapi', 'uvicorn')))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
    assert runner.invoke(app, ["--version"]).output == f"cascade {version('cascade-serve')}\n"
    assert "serve" in runner.invoke(app, ["--help"]).output


@pytest.mark.parametrize("command", ["serve", "check"])
def test_a_flag_is_shown_plain_and_the_file_by_one_name(command: str) -> None:
    text = runner.invoke(app, [command, "--help"]).output
    assert "CONFIG" in text
    assert "config " not in text
    assert "bool" not in text


@pytest.mark.parametrize("command", [["serve"], ["check"], ["check", "--no-load"]])
def test_a_bad_deployment_is_one_line_and_exit_code_2(command: list[str], tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("model: {name: a, target: {source: b}}\nengine: {block_size: 0}\n")
    result = runner.invoke(app, [*command, str(file)])
    assert result.exit_code == 2
    assert result.stderr == f"Error: {file}: engine.block_size: 0 - must be at least 1\n"
    assert result.stdout == ""


def test_an_absent_deployment_is_one_line(tmp_path: Path) -> None:
    result = runner.invoke(app, ["serve", str(tmp_path / "no.yaml")])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "no.yaml cannot be read" in result.stderr


def test_an_option_is_checked_like_the_file(tmp_path: Path) -> None:
    file = tmp_path / "good.yaml"
    file.write_text("model: {name: a, target: {source: b}}\n")
    result = runner.invoke(app, ["serve", str(file), "--port", "70000"])
    assert (result.exit_code, result.stderr) == (2, "Error: --port: 70000 - must be at most 65535\n")


def test_debug_shows_where_an_error_came_from(tmp_path: Path) -> None:
    result = runner.invoke(app, ["serve", str(tmp_path / "no.yaml"), "--debug"])
    assert isinstance(result.exception, ConfigError)
