"""GET /v1/cascade: that what it says can be set can be set, and what it does not say is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from engine.dials import DIALS
from server.openai.cascade import KEEPS
from server.settings import Deployment
from tests.server.conftest import Served, error_of, make_deployment, serve


def deployment(**speculation: Any) -> Deployment:
    presets = {"fast": {"rule": "opt", "alpha": 0.3}, "plain": {"enabled": False}, "short": {"max_draft": 2}}
    return Deployment.model_validate(
        {
            "model": {"name": "tiny", "target": {"source": "anywhere"}, "drafter": {"kind": "model", "source": "anywhere"}},
            "speculation": {"rule": "token_v3", "alpha": 0.3, "presets": presets, **speculation},
        }
    )


async def controls(served: Served) -> dict[str, Any]:
    response = await served.http.get("/v1/cascade")
    assert response.status_code == 200
    json.loads(response.text, parse_constant=lambda name: (_ for _ in ()).throw(ValueError(name)))
    found: dict[str, Any] = response.json()
    return found


async def test_it_says_what_each_model_id_does(folder: Path) -> None:
    async with serve(folder, deployment(), rules=tuple(DIALS), max_draft=4) as served:
        said = await controls(served)
    assert (said["object"], said["model"], said["max_draft"], said["context_length"]) == ("cascade", "tiny", 4, 512)
    assert (said["target"], said["drafter"]) == ("tiny-target", "tiny drafter"), "without their folders"
    assert said["models"] == [
        {"id": "tiny", "preset": None, "enabled": True, "rule": "token_v3", "alpha": 0.3, "max_draft": 4},
        {"id": "tiny:fast", "preset": "fast", "enabled": True, "rule": "opt", "alpha": 0.3, "max_draft": 4},
        {"id": "tiny:plain", "preset": "plain", "enabled": False, "rule": "token_v3", "alpha": 0.3, "max_draft": 4},
        {"id": "tiny:short", "preset": "short", "enabled": True, "rule": "token_v3", "alpha": 0.3, "max_draft": 2},
    ]


async def test_every_rule_is_explained_and_has_its_dial(folder: Path) -> None:
    assert KEEPS.keys() == DIALS.keys()
    async with serve(folder, deployment(), rules=tuple(DIALS)) as served:
        rules = {rule["name"]: rule for rule in (await controls(served))["rules"]}
    assert rules.keys() == DIALS.keys()
    assert all(rule["allowed"] for rule in rules.values())
    assert rules["exact"]["alpha"] is None
    assert rules["token_v3"]["alpha"] == {"low": -1, "high": 1, "default": 0.2, "target_at": -1, "drafter_at": 1}
    assert rules["opt"]["alpha"] == {"low": None, "high": None, "default": 0.1, "target_at": None, "drafter_at": None}


async def test_bounds_are_those_that_requests_meet(folder: Path) -> None:
    bounds = deployment(allow_rules=["exact", "token_v2"], max_alpha={"token_v3": 0.4, "token_v2": 0.05})
    async with serve(folder, bounds, rules=tuple(DIALS)) as served:
        rules = {rule["name"]: rule for rule in (await controls(served))["rules"]}
        assert {name: rule["allowed"] for name, rule in rules.items()} == {
            "exact": True,
            "token_v3": False,
            "token_v2": True,
            "opt": False,
        }
        assert rules["token_v2"]["alpha"]["default"] == 0.05
        for name, rule in rules.items():
            own = {"rule": name} | ({"alpha": rule["alpha"]["high"]} if rule["alpha"] and rule["alpha"]["high"] is not None else {})
            model = {"token_v3": "tiny", "opt": "tiny:fast"}.get(name, "tiny")
            assert (await served.chat(model=model, speculation=own)).status_code == 200
            if not rule["allowed"]:
                error_of(await served.chat(model="tiny:plain" if name == "opt" else "tiny:fast", speculation=own), 400)
        error_of(await served.chat(speculation={"rule": "token_v2", "alpha": 0.06}), 400)


async def test_rules_that_this_engine_cannot_judge_by_are_not_there(folder: Path) -> None:
    async with serve(folder, rules=("exact", "token_v3")) as served:
        assert [rule["name"] for rule in (await controls(served))["rules"]] == ["exact", "token_v3"]


async def test_without_a_drafter_nothing_is_drafted(folder: Path) -> None:
    async with serve(folder, drafter="none", max_draft=0) as served:
        said = await controls(served)
    assert said["drafter"] == "none"
    assert {(model["enabled"], model["max_draft"]) for model in said["models"]} == {(False, 0)}


async def test_a_key_guards_it(folder: Path) -> None:
    async with serve(folder, make_deployment(api_keys=["secret"])) as served:
        error_of(await served.http.get("/v1/cascade"), 401)
        assert (await served.http.get("/v1/cascade", headers={"Authorization": "Bearer secret"})).status_code == 200
