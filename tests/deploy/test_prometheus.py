"""A real Prometheus scrapes a loaded server: every panel's query and every rule of ours has data, with the sign that it should have."""

from __future__ import annotations

import asyncio
import contextlib
import math
import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from engine.errors import QueueFull
from engine.request import FinishReason, Round
from engine.stats import StepStats
from server.app import create_app
from tests.deploy.dashboards import DASHBOARDS, DEPLOY, queries
from tests.fakes import FakeEngine, Part, Script, make_info
from tests.server.conftest import Served, listen, make_deployment, until
from tests.server.conftest import folder as folder  # a fixture

pytestmark = [
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed (Debian: apt install prometheus)"),
    pytest.mark.timeout(120),
]

SECONDS = 12.0  # of load
INTERVAL = "10s"
SERIES = ({"model": "tiny"}, {"model": "tiny:short"}, {"speculation": {"rule": "opt", "alpha": 0.2}})
PARTS = [Part((40,), None, 1, 1), Part((41, 42, 43), Round(4, 2, 0b100, 0b1), 2, 4), Part((44,), Round(2, 0, 0b1, 0), 3, 6)]
CROWDED = StepStats(
    step_seconds=0.02,
    num_running=8,
    num_waiting=4,
    num_blocks=64,
    num_used_blocks=60,
    num_target_tokens=40,
    num_emitted_tokens=20,
    num_preemptions=1,
    num_prefix_queried_tokens=100,
    num_prefix_hit_tokens=60,
    schedule_seconds=0.001,
    draft_seconds=0.004,
    verify_seconds=0.015,
    wait_seconds=0.001,
    undrafted_seconds=0.03,
    num_sequences=8,
    draft_lengths=(2, 0, 1, 0, 5),
    num_cached_blocks=2,
    num_waiting_for_place=1,
    num_waiting_for_memory=1,
    num_waiting_for_leader=1,
    num_waiting_for_budget=1,
)


@dataclass
class Prometheus:
    """One that runs."""

    http: httpx.Client
    at: float = 0.0  # the time that questions are about

    def samples(self, query: str) -> list[tuple[dict[str, str], float]]:
        response = self.http.get("/api/v1/query", params={"query": query, "time": self.at}).json()
        assert response["status"] == "success", f"{query}: {response}"
        return [(sample["metric"], float(sample["value"][1])) for sample in response["data"]["result"]]

    def values(self, query: str) -> list[float]:
        return [value for _, value in self.samples(query)]

    def alerts(self, state: str) -> set[str]:
        return {labels["alertname"] for labels, _ in self.samples(f'ALERTS{{alertstate="{state}"}}')}

    def rules(self) -> list[dict[str, Any]]:
        groups = self.http.get("/api/v1/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]


@contextmanager
def prometheus(target: str, folder: Path) -> Iterator[Prometheus]:
    """Ours, but quicker, and of this target."""
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text("utf-8"))
    config["global"] = {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"}
    config["rule_files"] = [str(DEPLOY / "prometheus" / "rules" / "*.yml")]
    config["scrape_configs"][0]["static_configs"] = [{"targets": [target]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), "utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with (folder / "words").open("wb") as words:
        process = subprocess.Popen(
            [
                "prometheus",
                f"--config.file={folder}/prometheus.yml",
                f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address={address}",
            ],
            stdout=words,
            stderr=words,
        )
        try:
            with httpx.Client(base_url=f"http://{address}", trust_env=False, timeout=20) as http:
                _wait_until_ready(http, process, folder / "words")
                yield Prometheus(http)
        finally:
            process.terminate()
            process.wait(20)


def _wait_until_ready(http: httpx.Client, process: subprocess.Popen[bytes], words: Path) -> None:
    for _ in range(300):
        with contextlib.suppress(httpx.TransportError):
            if http.get("/-/ready").status_code == 200:
                return
        assert process.poll() is None, words.read_text("utf-8", "replace")
        time.sleep(0.1)
    raise AssertionError(words.read_text("utf-8", "replace"))


@asynccontextmanager
async def loaded(folder: Path) -> AsyncIterator[Served]:
    """A server on a socket that has things to count, good and bad."""
    engine = FakeEngine(make_info(str(folder), end_token_ids=(2,), rules=("exact", "opt")), max_queued=64)
    deployment = make_deployment(objective_per_token_seconds=0.004, max_queued_requests=64)
    deployment = deployment.model_validate(
        deployment.model_dump() | {"model": deployment.model.model_dump() | {"drafter": {"kind": "model", "source": "anywhere"}}}
    )
    app = create_app(engine, deployment)
    async with listen(app) as (_, url), httpx.AsyncClient(base_url=url, timeout=30) as http:
        yield Served(app, engine, http)


async def load(served: Served, seconds: float) -> None:
    """Answers that are quick, slow, refused and in error, for so long; one of them is open all the time."""
    served.answer_with(parts=PARTS, endless=True, delay=0.05)
    metrics = served.app.state.metrics
    background = asyncio.ensure_future(served.complete(max_tokens=480))
    await until(lambda: served.engine.num_steps > 0)
    end, has_lost = time.monotonic() + seconds, False
    while time.monotonic() < end:
        for delay, finish in ((0.0, FinishReason.LENGTH), (0.02, FinishReason.LENGTH), (0.0, FinishReason.ERROR)):
            served.engine.script = Script(parts=PARTS, endless=True, delay=delay, finish=finish, num_cached_tokens=2)
            await asyncio.gather(*(served.complete(max_tokens=40, **fields) for fields in SERIES))
        served.engine.script = Script(refusal=QueueFull(4, 1))
        assert (await served.complete()).status_code == 503
        if not has_lost and time.monotonic() > end - seconds / 2:
            metrics.observe_loss(True)
            has_lost = True
        metrics.observe_step(CROWDED)
        await asyncio.sleep(0.05)
    served.engine.callbacks.clear()  # the last word on gauges is this step's
    metrics.observe_step(CROWDED)
    await asyncio.sleep(1.5)
    background.cancel()


@pytest.fixture(scope="module")
def asked(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that has scraped a loaded server, and is asked about the end of the load."""

    async def run(stack: contextlib.ExitStack) -> Prometheus:
        async with loaded(folder) as served:
            it = await asyncio.to_thread(
                stack.enter_context, prometheus(str(served.http.base_url).removeprefix("http://"), tmp_path_factory.mktemp("prometheus"))
            )
            await load(served, SECONDS)
            it.at = time.time()
            return it

    with contextlib.ExitStack() as stack:
        yield asyncio.run(run(stack))


PANELS = [query for file in DASHBOARDS for query in queries(file, INTERVAL)]
"""As Grafana asks."""


@pytest.mark.parametrize(("title", "query"), PANELS, ids=[title for title, _ in PANELS])
def test_every_panel_has_something_to_show(title: str, query: str, asked: Prometheus) -> None:
    values = [value for value in asked.values(query) if not math.isnan(value)]
    assert values, f"{title}: no data for {query}"
    assert all(value >= 0 for value in values), f"{title}: {values}"
    assert any(value > 0 for value in values), f"{title}: nothing but 0 for {query}"


def test_ratios_are_between_nothing_and_all(asked: Prometheus) -> None:
    for rule in asked.rules():
        if rule["type"] == "recording" and ":ratio" in rule["name"] and "speedup" not in rule["name"]:
            assert all(0 <= value <= 1 or math.isnan(value) for value in asked.values(rule["name"])), rule["name"]


def test_every_rule_is_evaluated_and_records(asked: Prometheus) -> None:
    rules = asked.rules()
    assert {rule["health"] for rule in rules} == {"ok"}, [rule for rule in rules if rule["health"] != "ok"]
    recorded = [rule for rule in rules if rule["type"] == "recording"]
    assert len(recorded) > 10
    for rule in recorded:
        assert any(value > 0 for value in asked.values(rule["name"])), rule["name"]


def test_what_the_server_did_is_what_prometheus_says(asked: Prometheus) -> None:
    (acceptance,) = asked.values('cascade:acceptance:ratio_rate5m{rule="opt"}')
    assert acceptance == pytest.approx(1 / 3, abs=0.02), "of four drafts two stand, of two none"
    assert max(asked.values("cascade:speedup:ratio_rate5m")) == pytest.approx(1.5, abs=0.05)
    assert max(asked.values("cascade:kv_used:ratio")) <= 60 / 64


def test_alerts_say_what_happened_and_nothing_else(asked: Prometheus) -> None:
    assert asked.alerts("firing") == {"CascadeEngineRestarting"}
    pending = asked.alerts("pending")
    assert {"CascadeErrorRatio", "CascadeObjectiveBurnsFast"} <= pending, "these want to be seen for longer"
    assert not pending & {"CascadeNoProgress", "CascadeNotReady", "CascadeSpeculationSlower", "CascadeAcceptanceCollapsed"}
