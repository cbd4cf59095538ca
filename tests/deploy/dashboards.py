"""What Grafana would ask Prometheus for: the panels of deploy/grafana/dashboards, their variables filled in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))


def dashboard(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text("utf-8"))
    return content


def panels(file: Path) -> list[dict[str, Any]]:
    """All that show something."""
    return [panel for panel in dashboard(file)["panels"] if panel["type"] != "row"]


def queries(file: Path, interval: str) -> Iterator[tuple[str, str]]:
    """Title and query of each target."""
    for panel in panels(file):
        for target in panel["targets"]:
            filled = target["expr"].replace("$__rate_interval", interval).replace("$model", ".*").replace("$job", ".*")
            assert "$" not in filled, f"{panel['title']}: a variable that nobody fills in: {filled}"
            yield f"{file.stem}: {panel['title']} ({target['legendFormat']})", filled
