"""Dashboards, rules and the runbook say the same, by their files alone."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.catalogue import CATALOGUE
from tests.deploy.dashboards import DASHBOARDS, DEPLOY, dashboard, panels, queries

RULES = sorted((DEPLOY / "prometheus" / "rules").glob("*.yml"))
SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
SAMPLES = {f"cascade_{name}{suffix}" for name, entry in CATALOGUE.items() for suffix in SUFFIXES[entry.kind]}

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian: apt install prometheus)")


def rules(kind: str) -> list[dict[str, Any]]:
    """All rules that record, or that alert."""
    files = [yaml.safe_load(file.read_text("utf-8")) for file in RULES]
    return [rule for file in files for group in file["groups"] for rule in group["rules"] if kind in rule]


def test_there_is_something_to_look_at() -> None:
    assert [file.stem for file in DASHBOARDS] == ["engine", "overview", "speculation"]
    assert len(rules("alert")) == 12
    assert len(rules("record")) > 10


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_every_panel_says_what_it_means_and_takes_the_chosen_source(file: Path) -> None:
    content = dashboard(file)
    sources = [variable for variable in content["templating"]["list"] if variable["type"] == "datasource"]
    assert [variable["name"] for variable in sources] == ["datasource"]
    ids = [panel["id"] for panel in content["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in panels(file):
        assert len(panel["description"].split()) >= 5, panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}, panel["title"]
        assert panel["targets"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]


@pytest.mark.parametrize("file", DASHBOARDS, ids=lambda file: file.stem)
def test_panels_do_not_lie_on_each_other(file: Path) -> None:
    places = [(panel["title"], panel["gridPos"]) for panel in dashboard(file)["panels"]]
    for (one, a), (other, b) in itertools.combinations(places, 2):
        is_apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"] or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert is_apart, f"{one} and {other}"
    assert all(place["x"] + place["w"] <= 24 for _, place in places)


def test_only_what_the_server_exposes_is_asked_for() -> None:
    asked = [query for file in DASHBOARDS for query in queries(file, "5m")]
    asked += [(str(rule.get("alert", rule.get("record"))), str(rule["expr"])) for rule in rules("expr")]
    recorded = {rule["record"] for rule in rules("record")}
    for title, query in asked:
        assert set(re.findall(r"\bcascade_[a-z_]+", query)) <= SAMPLES, title
        assert set(re.findall(r"\bcascade:[a-z0-9_:]+", query)) <= recorded, title


def test_every_metric_is_looked_at_by_somebody() -> None:
    text = "".join(file.read_text("utf-8") for file in (*DASHBOARDS, *RULES))
    unseen = {name for name in CATALOGUE if f"cascade_{name}" not in text}
    assert unseen == set()


def test_every_alert_has_a_section_in_the_runbook_and_the_runbook_no_other() -> None:
    headings = re.findall(r"^## (Cascade\w+)$", (DEPLOY / "runbook.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(headings) == sorted(rule["alert"] for rule in rules("alert"))
    for rule in rules("alert"):
        assert rule["annotations"]["runbook"] == f"deploy/runbook.md#{rule['alert'].lower()}"
        assert rule["labels"]["severity"] in ("page", "ticket")


def test_panels_that_the_runbook_names_are_there() -> None:
    named = re.findall(r"\*(Overview|Speculation|Engine): ([^*]+?)\.?\*", (DEPLOY / "runbook.md").read_text("utf-8").replace("\n", " "))
    there = {(file.stem.capitalize(), panel["title"]) for file in DASHBOARDS for panel in panels(file)}
    assert len(named) > 15
    assert {(board, re.sub(r" +", " ", title)) for board, title in named} <= there


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_is_silent() -> None:
    content = yaml.safe_load((DEPLOY / "prometheus" / "tests" / "alerts.yml").read_text("utf-8"))
    cases = [case for test in content["tests"] for case in test["alert_rule_test"]]
    fire = {case["alertname"] for case in cases if case.get("exp_alerts")}
    silent = {case["alertname"] for case in cases if not case.get("exp_alerts")}
    names = {rule["alert"] for rule in rules("alert")}
    assert fire == names
    # these three have their silent cases as series beside the one that fires
    assert names - silent <= {"CascadeAnswersLoop", "CascadeObjectiveBurnsSlowly"}


@needs_promtool
def test_alerts_fire_when_they_should_and_are_silent_when_they_should_be() -> None:
    cases = DEPLOY / "prometheus" / "tests" / "alerts.yml"
    done = subprocess.run(["promtool", "test", "rules", str(cases)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_prometheus_takes_the_configuration() -> None:
    done = subprocess.run(
        ["promtool", "check", "config", str(DEPLOY / "prometheus" / "prometheus.yml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 rule files found" in done.stdout
