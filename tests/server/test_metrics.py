"""The numbers that dashboards and alerts hang on: names that do not change by accident, and values that mean what their help says."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.request import Round, TokenDelta
from server.catalogue import CATALOGUE, VLLM_NAMES
from server.metrics import Metrics
from server.record import ChoiceRecord, Objectives
from tests.fakes import Part
from tests.server.conftest import Served, make_deployment, serve, until

GOLDEN = Path(__file__).parents[1] / "golden" / "metrics.txt"
OBJECTIVES = Objectives(first_token=1.0, per_token=0.1)
ROUNDS = [Part((40,)), Part((40, 41, 42), Round(4, 2, 0b100, 0b1)), Part((40,), Round(2, 0, 0b1, 0))]

Values = dict[str, dict[tuple[tuple[str, str], ...], float]]


def values_of(exposition: str) -> Values:
    """By sample name, then by labels without the model's."""
    found: Values = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k not in ("model", "preset", "rule")))
            found.setdefault(sample.name, {})[labels] = sample.value
    return found


async def values(served: Served) -> Values:
    return values_of((await served.http.get("/metrics")).text)


def test_names_labels_and_buckets_are_what_dashboards_hang_on() -> None:
    """A change here breaks people's dashboards: say it in CHANGELOG.md, and look through deploy/."""
    kinds = {"counter": "cascade_{}_total", "gauge": "cascade_{}", "histogram": "cascade_{}"}
    lines = [
        " ".join([entry.kind, kinds[entry.kind].format(name), f"{{{','.join(entry.labels)}}}", *(f"{bound:g}" for bound in entry.buckets)])
        for name, entry in CATALOGUE.items()
    ]
    assert "\n".join(lines) + "\n" == GOLDEN.read_text("utf-8")


async def test_what_is_exposed_is_the_catalogue(served: Served) -> None:
    await served.complete()
    await served.complete(temperature=-1)
    families = {family.name: family for family in text_string_to_metric_families((await served.http.get("/metrics")).text)}
    families = {name: family for name, family in families.items() if not name.endswith("_created")}
    assert set(families) == {f"cascade_{name}" for name in CATALOGUE}
    assert all(len(family.documentation.split()) >= 4 for family in families.values())
    assert {family.type for family in families.values()} == {"counter", "gauge", "histogram"}


async def test_steps_say_where_their_time_went(served: Served) -> None:
    served.answer_with(parts=ROUNDS)
    await served.complete([5, 6, 7])
    found = await values(served)
    phases = {dict(labels)["phase"]: value for labels, value in found["cascade_step_phase_seconds_total"].items()}
    assert phases == pytest.approx({"schedule": 0.0015, "draft": 0.003, "verify": 0.0075, "wait": 0.75})
    assert found["cascade_undrafted_seconds_total"][()] == pytest.approx(0.018)
    assert found["cascade_draft_lengths_total"] == {(("length", str(i)),): count for i, count in enumerate([1, 0, 1, 0, 1])}
    assert found["cascade_step_sequences_sum"][()] == 3
    assert (await values(served))["cascade_steps_total"][()] == 3, "asking twice counts nothing twice"


async def test_drafts_are_counted_by_position(served: Served) -> None:
    served.answer_with(parts=ROUNDS)
    await served.complete([5, 6, 7])
    found = await values(served)

    def by_position(name: str) -> dict[str, float]:
        return {dict(labels)["position"]: value for labels, value in found[f"cascade_spec_decode_{name}_tokens_per_position_total"].items()}

    assert by_position("draft") == {"0": 2, "1": 2, "2": 1, "3": 1}
    assert by_position("accepted") == {"0": 1, "1": 1}
    assert found["cascade_spec_decode_verified_tokens_total"][()] == 4
    assert found["cascade_saved_target_calls_total"][()] == 2, "five tokens in three passes"


async def test_gauges_are_of_the_last_step_and_end_with_the_last_request(served: Served) -> None:
    assert (await values(served))["cascade_ready"][()] == 1
    served.answer_with(endless=True, delay=0.002)
    task = asyncio.ensure_future(served.complete(max_tokens=400))
    await until(lambda: served.engine.num_steps > 2)
    found = await values(served)
    assert found["cascade_open_requests"][()] == 1
    assert found["cascade_running_sequences"][()] == 1
    assert found["cascade_kv_blocks_by_state"] == {(("state", "used"),): 3, (("state", "cached"),): 5, (("state", "free"),): 56}
    assert set(found["cascade_waiting_by_reason"]) == {(("reason", reason),) for reason in ("place", "memory", "leader", "budget")}
    task.cancel()
    await until(lambda: not served.app.state.draining.num_running)
    found = await values(served)
    assert (found["cascade_open_requests"][()], found["cascade_running_sequences"][()], found["cascade_kv_used_blocks"][()]) == (0, 0, 0)
    assert found["cascade_kv_blocks"][()] == 64


async def test_what_runs_is_said(folder: Path) -> None:
    async with serve(folder, make_deployment(objective_per_token_seconds=0.05)) as served:
        found = await values(served)
    (config,) = map(dict, found["cascade_config_info"])
    assert config["target"] == "some/where/tiny-target"
    assert (config["alpha"], config["max_draft"], config["draft_policy"]) == ("0", "4", "adaptive")
    assert [dict(labels)["version"] for labels in found["cascade_build_info"]] == [served.app.version]
    assert found["cascade_objective_seconds"] == {(("objective", "first_token"),): 2, (("objective", "per_token"),): 0.05}


async def test_a_dial_without_end_does_not_drown_the_others(folder: Path) -> None:
    async with serve(folder, rules=("exact", "opt")) as served:
        served.answer_with(parts=ROUNDS)
        for _ in range(2):
            response = await served.complete([5, 6, 7], speculation={"rule": "opt", "alpha": 1e308})
            assert response.status_code == 200, response.text
        found = await values(served)
    assert sum(found["cascade_request_alpha_sum"].values()) == 20


async def test_vllms_names_are_there_when_asked_for(folder: Path) -> None:
    async with serve(folder, make_deployment(vllm_metric_names=True)) as served:
        served.answer_with(parts=ROUNDS)
        await served.complete([5, 6, 7])
        await served.complete([5, 6, 7], model="tiny:short")
        lines = (await served.http.get("/metrics")).text.splitlines()
    theirs = {line for line in lines if line.startswith("vllm:") and "_created" not in line}
    labels = 'engine="0",model_name="tiny"'
    assert theirs == {
        f"vllm:spec_decode_num_drafts_total{{{labels}}} 4.0",
        f"vllm:spec_decode_num_draft_tokens_total{{{labels}}} 12.0",
        f"vllm:spec_decode_num_accepted_tokens_total{{{labels}}} 4.0",
        f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{labels},position="0"}} 2.0',
        f'vllm:spec_decode_num_accepted_tokens_per_pos_total{{{labels},position="1"}} 2.0',
    }
    assert set(VLLM_NAMES) <= set(CATALOGUE)


async def test_without_the_key_nothing_has_vllms_names(served: Served) -> None:
    await served.complete()
    assert "vllm:" not in (await served.http.get("/metrics")).text


# ---------------------------------------------------------------------- objectives
def record_of(num_tokens: int, first_at: float | None, last_at: float | None) -> ChoiceRecord:
    record = ChoiceRecord(4)
    record.num_tokens, record.first_at, record.last_at = num_tokens, first_at, last_at
    return record


@pytest.mark.parametrize(
    ("record", "has_failed", "met"),
    [
        (record_of(11, 10.5, 11.0), False, (True, True, True)),
        (record_of(11, 11.5, 12.0), False, (False, True, False)),
        (record_of(11, 10.5, 12.0), False, (True, False, False)),
        (record_of(1, 10.5, 10.5), False, (True, True, True)),
        (record_of(11, 10.5, 11.0), True, (False, False, False)),
        (record_of(0, None, None), True, (False, False, False)),
    ],
)
def test_an_answer_meets_what_was_promised_or_not(record: ChoiceRecord, has_failed: bool, met: tuple[bool, bool, bool]) -> None:
    assert OBJECTIVES.met(record, has_failed, arrived_at=10.0) == dict(zip(("first_token", "per_token", "all"), met, strict=True))


def test_who_left_before_the_first_token_was_promised_nothing() -> None:
    assert OBJECTIVES.met(record_of(0, None, None), False, 10.0) == {}


def test_goodput_is_of_answers_that_met_all() -> None:
    metrics = Metrics("tiny", OBJECTIVES)
    of = metrics.request("", "exact")
    of.answer_done(record_of(11, 10.5, 11.0), "stop", 10.0, 0.0)
    of.answer_done(record_of(50, 11.5, 12.0), "stop", 10.0, 0.0)
    of.answer_done(record_of(3, 10.1, 10.2), "error", 10.0, 0.0)
    of.answer_done(record_of(3, 10.1, 10.2), "timeout", 10.0, 0.0)
    found = values_of(metrics.exposition(True).decode())
    assert found["cascade_good_generation_tokens_total"][()] == 11
    results = found["cascade_objective_requests_total"]
    assert results[("objective", "all"), ("result", "met")] == 1
    assert results[("objective", "first_token"), ("result", "missed")] == 3


def test_loops_have_few_different_tokens() -> None:
    record = ChoiceRecord(4)
    record.count(TokenDelta(request_id="r", choice=0, token_ids=(1, 2, 3) * 10), num_kept=30)
    assert record.distinct_share is None, "too short to tell"
    record.count(TokenDelta(request_id="r", choice=0, token_ids=(1, 2, 3) * 10), num_kept=30)
    assert record.distinct_share == 0.05


def test_counters_begin_at_zero_so_that_rates_see_the_first_event() -> None:
    metrics = Metrics("tiny", OBJECTIVES)
    metrics.request("", "exact")
    found = values_of(metrics.exposition(False).decode())
    assert found["cascade_engine_restarts_total"] == found["cascade_preemptions_total"] == {(): 0}
    assert set(found["cascade_step_phase_seconds_total"].values()) == {0}
    assert found["cascade_requests_total"][(("finish_reason", "error"),)] == 0
    assert found["cascade_requests_total"][(("finish_reason", "timeout"),)] == 0
    assert found["cascade_ready"][()] == 0


def test_two_servers_in_one_process_count_apart() -> None:
    one, other = Metrics("one", OBJECTIVES), Metrics("two", OBJECTIVES)
    one.opened()
    assert values_of(one.exposition(True).decode())["cascade_open_requests"] == {(): 1}
    assert values_of(other.exposition(True).decode())["cascade_open_requests"] == {(): 0}
