"""What operators see."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engine.client import Health
from engine.request import Round
from server.deps import Serving
from server.settings import Deployment
from tests.fakes import Part
from tests.server.conftest import Served, serve


async def samples(served: Served) -> dict[tuple[str, tuple[str, ...]], float]:
    """Values by name and label values; those of histograms are their counts and sums."""
    response = await served.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=")
    families = list(text_string_to_metric_families(response.text))
    assert all(family.name.startswith("cascade_") and family.documentation for family in families)
    return {
        (sample.name.removeprefix("cascade_"), tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


async def test_metrics_of_a_request(served: Served) -> None:
    parts = [Part((40,)), Part((40, 41, 42), Round(4, 2, 0b100, 0b1)), Part((40,), Round(4, 0, 0b1, 0))]
    served.answer_with(parts=parts, delay=0.001, num_cached_tokens=2)
    await served.complete([5, 6, 7], model="tiny:short")
    found = await samples(served)
    labels, ruled = ("tiny", "short"), ("tiny", "short", "exact")
    expected: dict[tuple[str, tuple[str, ...]], float] = {
        ("requests_total", ("length", *labels)): 1,
        ("prompt_tokens_total", labels): 3,
        ("cached_prompt_tokens_total", labels): 2,
        ("generation_tokens_total", labels): 5,
        ("queue_seconds_count", labels): 1,
        ("time_to_first_token_seconds_count", labels): 1,
        ("inter_token_seconds_count", labels): 2,
        ("request_seconds_count", labels): 1,
        ("request_prompt_tokens_sum", labels): 3,
        ("request_generation_tokens_sum", labels): 5,
        ("spec_decode_drafts_total", ruled): 2,
        ("spec_decode_draft_tokens_total", ruled): 8,
        ("spec_decode_accepted_tokens_total", ruled): 2,
        ("spec_decode_deferred_tokens_total", ruled): 2,
        ("spec_decode_lossy_kept_tokens_total", ruled): 1,
        ("spec_decode_accepted_tokens_per_position_total", ("tiny", "0", "short", "exact")): 1,
        ("spec_decode_accepted_tokens_per_position_total", ("tiny", "1", "short", "exact")): 1,
        ("request_acceptance_rate_sum", ruled): 0.25,
        ("request_deferral_rate_sum", ruled): 0.5,
        ("steps_total", ("tiny",)): 3,
        ("target_tokens_total", ("tiny",)): 15,
        ("preemptions_total", ("tiny",)): 0,
        ("prefix_queried_tokens_total", ("tiny",)): 10,
        ("prefix_hit_tokens_total", ("tiny",)): 4,
        ("step_seconds_count", ("tiny",)): 3,
        ("running_sequences", ("tiny",)): 0,
        ("waiting_sequences", ("tiny",)): 0,
        ("kv_used_blocks", ("tiny",)): 0,
        ("kv_blocks", ("tiny",)): 64,
    }
    assert {key: found.get(key) for key in expected} == expected


async def test_metrics_of_refusals(served: Served) -> None:
    await served.complete(model="other")
    await served.complete(temperature=-1)
    await served.http.get("/nothing")
    found = await samples(served)
    assert {key[1]: value for key, value in found.items() if key[0] == "refusals_total"} == {
        ("model_not_found", "404"): 1,
        ("invalid_request", "400"): 1,
        ("invalid_request", "404"): 1,
    }


async def test_several_choices_count_their_prompt_once(served: Served) -> None:
    await served.complete([[5, 6], [7, 8, 9]], n=3)
    found = await samples(served)
    assert found["prompt_tokens_total", ("tiny", "")] == 5
    assert found["generation_tokens_total", ("tiny", "")] == 15
    assert found["requests_total", ("length", "tiny", "")] == 6
    assert found["time_to_first_token_seconds_count", ("tiny", "")] == 1


async def test_buckets_begin_at_a_millisecond(served: Served) -> None:
    await served.complete()
    text = (await served.http.get("/metrics")).text
    for name in ("queue", "time_to_first_token", "inter_token", "request", "step"):
        assert f'cascade_{name}_seconds_bucket{{le="0.001"' in text


async def test_health_and_readiness(served: Served) -> None:
    async def both() -> Any:
        return [(await served.http.get(path)).status_code for path in ("/health", "/ready")]

    assert await both() == [200, 200]
    served.engine.health = Health(True, False, "the current step has been running for 40 s")
    assert await both() == [200, 503]
    assert (await served.http.get("/ready")).json()["reason"] == "the current step has been running for 40 s"
    served.engine.health = Health(False, False, "it is dead")
    assert await both() == [503, 503]
    assert (await served.http.get("/health")).json() == {"status": "dead", "reason": "it is dead"}


async def test_version(served: Served) -> None:
    assert (await served.http.get("/version")).json() == {"version": served.app.version}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"speculation": {"max_drafts": 3}}, "speculation.max_drafts: unknown field."),
        ({"stop": [""]}, "stop.0: must not be empty."),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop: must have at most 4 items."),
        ({"messages": []}, "messages: must not be empty."),
    ],
)
async def test_a_refusal_speaks_of_the_field_and_not_of_python(folder: Path, body: dict[str, Any], message: str) -> None:
    async with serve(folder) as served:
        response = await served.chat(**body)
    assert response.status_code == 400
    assert response.json()["error"]["message"] == message


async def test_the_fingerprint_says_how_weights_are_held(served: Served) -> None:
    serving: Serving = served.app.state.serving
    int8 = {"source": "anywhere", "quantization": "int8"}
    model = {"name": "tiny", "target": int8, "drafter": {"kind": "model", **int8}}
    held = replace(serving, deployment=Deployment.model_validate({"model": model}))
    assert held.fingerprint.endswith("-tiny-target-int8+tiny_drafter-int8-float32-cpu")
