"""What it costs to be watched, in front of an engine that pretends: that it runs. The figures mean nothing here."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest

from benchmarks import front_bars
from benchmarks.front_bars import FRONT_MEASURES
from benchmarks.measuring import Setting
from benchmarks.served import serve


def test_scrapes_are_timed_and_streams_with_and_without_them(tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting(tiny_config, tmp_path / "absent.jsonl", tmp_path / "absent.jsonl", repetitions=1, is_quick=True)
    config = setting.engine({"engine.max_sequences": front_bars.NUM_STREAMS})
    with serve(config, front_bars._PRETENDING) as served:  # one for both: starting takes longer than all else
        monkeypatch.setattr(front_bars, "serve", lambda *_: nullcontext(served))
        measured = FRONT_MEASURES["scrape"](setting)
        assert 0 < measured.value.median < 1000
        assert measured.detail["bytes"][0] > 10_000
        assert FRONT_MEASURES["scrape-cost"](setting).value.median > 0


def test_a_server_that_has_no_metrics_ends_the_scraper() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.scraping", "http://127.0.0.1:1", "1"], input=b"", capture_output=True, check=False
    )
    assert done.returncode == 1
    assert b"refused" in done.stderr
