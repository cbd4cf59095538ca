"""What /metrics says is what prometheus_client would say."""

from __future__ import annotations

import math

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from engine.request import Round
from engine.stats import StepStats
from server.exposition import Writer
from server.metrics import Metrics
from server.record import Objectives

STEP = StepStats(
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
    draft_lengths=(2, 0, 1, 0, 5),
)


def loaded(num_presets: int = 3, num_rules: int = 2) -> Metrics:
    """Those of a server that was asked for several presets under several rules."""
    metrics = Metrics('a "model"\\of\nours', Objectives(1.0, 0.1), has_vllm_names=True)
    metrics.opened()
    metrics.observe_step(STEP)
    for preset in range(num_presets):
        for rule in range(num_rules):
            asked = metrics.request(f"preset{preset}", f"rule{rule}")
            asked.first_delivery(0.01, 0.1)
            asked.round(Round(8, 5, 0, 0))
            asked.request_done(10, 1.0)
    return metrics


def test_it_is_what_the_library_writes() -> None:
    metrics = loaded()
    ours = metrics.exposition(True)
    assert ours.count(b"\n") > 700
    assert ours == generate_latest(metrics.book.registry)
    metrics.observe_step(STEP)
    assert metrics.exposition(True) == generate_latest(metrics.book.registry) != ours


def test_values_of_all_sizes_are_read_again() -> None:
    registry = CollectorRegistry()
    gauge = Gauge("g", "text with \\ and\nnew line", ["name"], registry=registry)
    values = {"a": 0.0, "b": -1.5, "c": 1e300, "d": 1e-9, "e": math.inf, "f": -math.inf, "g": 123456789.0}
    for name, value in values.items():
        gauge.labels(name).set(value)
    Counter("c", "text", registry=registry).inc(1e7)
    Histogram("h", "text", ["name"], buckets=(1, 2.5), registry=registry).labels("é").observe(2)
    read = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(Writer().write(registry.collect()).decode())
        for sample in family.samples
    }
    assert {name: read["g", name] for name in values} == values
    assert (read["c_total",], read["h_bucket", "2.5", "é"], read["h_sum", "é"]) == (1e7, 1, 2)
    assert "# HELP g text with \\\\ and\\nnew line\n" in Writer().write(registry.collect()).decode()


def test_series_that_come_later_are_written_and_two_registries_are_apart() -> None:
    first, second = CollectorRegistry(), CollectorRegistry()
    counters = [Counter("c", "text", ["name"], registry=registry) for registry in (first, second)]
    writers = [Writer(), Writer()]
    counters[0].labels("x").inc()
    assert b'c_total{name="x"} 1.0\n' in writers[0].write(first.collect())
    counters[0].labels("y").inc()
    counters[1].labels("z").inc()
    assert writers[0].write(first.collect()).endswith(b'c_total{name="x"} 1.0\nc_total{name="y"} 1.0\n')
    assert writers[1].write(second.collect()).endswith(b'c_total{name="z"} 1.0\n')
