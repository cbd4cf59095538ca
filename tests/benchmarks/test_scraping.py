"""What it costs to be watched, in front of an engine that pretends: that it runs. The figures mean nothing here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.front_bars import FRONT_MEASURES
from benchmarks.measuring import Setting


@pytest.fixture
def setting(tiny_config: Path, tmp_path: Path) -> Setting:
    return Setting(tiny_config, tmp_path / "absent.jsonl", tmp_path / "absent.jsonl", repetitions=1, is_quick=True)


def test_scrapes_are_timed_while_streams_run(setting: Setting) -> None:
    measured = FRONT_MEASURES["scrape"](setting)
    assert 0 < measured.value.median < 1000
    assert measured.detail["bytes"][0] > 10_000


def test_streams_are_timed_with_and_without_scrapes(setting: Setting) -> None:
    measured = FRONT_MEASURES["scrape-cost"](setting)
    assert measured.value.median > 0


def test_a_server_that_has_no_metrics_ends_the_scraper() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scraping", "http://127.0.0.1:1", "1"], input=b"", capture_output=True, check=False
    )
    assert done.returncode == 1
    assert b"refused" in done.stderr
