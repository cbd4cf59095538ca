"""Bars of the pair on a tiny model whose drafter is itself: they run, count what they say they count, and skip with a reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from benchmarks.bars import MEASURES
from benchmarks.measuring import BarSkipped, Setting
from benchmarks.pair_bars import CHAT, LENGTHS, NUM_DRAFT

KINDS = ("writing", "coding", "rag", "qa")


@pytest.fixture
def setting(tiny_config: Path, tmp_path: Path) -> Setting:
    """The tiny deployment with its target as its own drafter, and a few questions."""
    content = yaml.safe_load(tiny_config.read_text("utf-8"))
    content["model"]["drafter"] = {"kind": "model", **content["model"]["target"]}
    content["speculation"] = {"rule": "token_v3", "alpha": 1.0}
    (tmp_path / "pair.yaml").write_text(yaml.safe_dump(content), "utf-8")
    lines = [{"question_id": i, "category": KINDS[i % 4], "turns": [f"the {i} of the"]} for i in range(16)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    return Setting(tmp_path / "pair.yaml", tmp_path / "questions.jsonl", tmp_path / "absent", repetitions=1, is_quick=True)


@pytest.mark.parametrize("name", ["accepted-chat", "accepted-all", "accepted-chat-token_v3", "accepted-all-token_v3"])
def test_a_drafter_that_is_the_target_is_always_right(name: str, setting: Setting) -> None:
    """8 tokens at 6 a call are two calls, unless one ends sooner."""
    measured = MEASURES[name](setting)
    assert 1 < measured.value.median <= NUM_DRAFT + 1
    assert measured.value.median >= 4 or measured.detail["prompts"] < 4
    kinds = measured.detail["by_category"].keys()
    assert kinds <= set(CHAT) if "chat" in name else "rag" in kinds


def test_a_drafted_token_is_measured_in_percent_of_a_step(setting: Setting) -> None:
    for name, temperature in (("drafter-step", 0.0), ("drafter-step-sampled", 1.0)):
        measured = MEASURES[name](setting)
        assert measured.detail["temperature"] == temperature
        expected = 100 * measured.detail["drafter_ms"] / measured.detail["target_ms"]
        assert measured.value.median == pytest.approx(expected, rel=1.0)


def test_every_length_is_compared(setting: Setting) -> None:
    measured = MEASURES["lengths-4"](setting)
    over = measured.detail["over"]
    assert list(over) == [str(length) for length in LENGTHS]
    assert min(over.values()) > 0
    assert over[str(measured.detail["best"])] == min(over.values()) == measured.value.median


def test_the_worst_kind_of_prompts_counts(setting: Setting) -> None:
    measured = MEASURES["never-slower"](setting)
    assert measured.detail["all"].keys() == {"chat, 1", "rag, 1", "qa, 1"}
    assert measured.value.median == min(measured.detail["all"].values())


def test_a_client_is_served_by_rule_and_without_drafts(setting: Setting) -> None:
    measured = MEASURES["http-default"](setting)
    assert measured.detail["prompts"] == 1
    assert measured.value.median > 0


def test_what_is_absent_skips_a_bar(setting: Setting, tiny_config: Path) -> None:
    with pytest.raises(BarSkipped, match="is not there; --data names"):
        MEASURES["accepted-all"](replace(setting, data=Path("absent.jsonl")))
    for name in ("drafter-step", "http-exact"):
        with pytest.raises(BarSkipped, match=r"the drafter of tiny\.yaml is of kind ngram"):
            MEASURES[name](replace(setting, config=tiny_config))
