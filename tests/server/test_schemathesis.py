"""What /openapi.json promises, asked by a tool that reads it: no 5xx, and no status, type or shape that is not described."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

from server.app import create_app
from tests.fakes import FakeEngine, Part, make_info
from tests.server.conftest import Served, make_deployment

schemathesis = pytest.importorskip("schemathesis", reason="the extra `test` is not installed in full")
checks = pytest.importorskip("schemathesis.checks")
modes = pytest.importorskip("schemathesis.generation.modes")
specs = pytest.importorskip("schemathesis.specs.openapi.checks")

CHECKS = [
    checks.not_a_server_error,
    specs.status_code_conformance,
    specs.content_type_conformance,
    specs.response_schema_conformance,
]
NUM_CASES = 25
SETTINGS = settings(
    max_examples=NUM_CASES,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def described() -> dict[str, Any]:
    """The description of an app, made to name a model that is served: no generator would guess one."""
    description = create_app(FakeEngine(make_info()), make_deployment()).openapi()
    for name in ("ChatBody", "CompletionBody", "TokenizeBody", "DetokenizeBody"):
        description["components"]["schemas"][name]["properties"]["model"] = {"enum": ["tiny", "tiny:off"]}
    description["paths"]["/v1/models/{model_id}"]["get"]["parameters"][0]["schema"] = {"enum": ["tiny", "org/tiny:off", "other"]}
    return description


DESCRIPTION = described()
OPERATIONS = {operation.ok().label: operation.ok() for operation in schemathesis.openapi.from_dict(DESCRIPTION).get_all_operations()}


def cases_of(strategy: Any) -> list[Any]:
    """The same ones every time; none where there is nothing to get wrong."""
    cases: list[Any] = []

    @settings(
        max_examples=NUM_CASES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(case: Any) -> None:
        cases.append(case)

    run: Callable[[], None] = collect
    try:
        run()
    except Unsatisfiable:
        return []
    return cases


async def send(case: Any, http: httpx.AsyncClient) -> httpx.Response:
    kwargs = case.as_transport_kwargs(base_url="http://test")
    content = json.dumps(kwargs["json"]) if "json" in kwargs else kwargs.get("data")
    return await http.request(kwargs["method"], kwargs["url"], content=content, headers=kwargs["headers"], params=kwargs["params"])


@pytest.mark.parametrize("mode", ["positive", "negative"])
@pytest.mark.parametrize("label", OPERATIONS)
async def test_an_operation_does_what_is_described(served: Served, label: str, mode: str) -> None:
    served.answer_with(parts=[Part((40, 41)), Part((42,))])
    cases = cases_of(OPERATIONS[label].as_strategy(generation_mode=modes.GenerationMode(mode)))
    for case in cases:
        case.validate_response(await send(case, served.http), checks=CHECKS)
    assert not served.engine.streams
    if mode == "positive":
        assert cases


# what most clients send; of everything that is described hardly any random choice fits together
CORE = ("model", "messages", "prompt", "max_tokens", "temperature", "top_p", "seed", "stream", "n")
MESSAGE = {"type": "object", "required": ["role", "content"], "additionalProperties": False}
SAID = {"role": {"const": "user"}, "content": {"type": "string", "minLength": 1, "maxLength": 20}}


def of_simple_requests() -> Any:
    """The operations as they are described, of those fields alone, and with messages that are plain."""
    description = described()
    for name in ("ChatBody", "CompletionBody", "TokenizeBody"):
        schema = description["components"]["schemas"][name]
        schema["properties"] = {key: value for key, value in schema["properties"].items() if key in CORE}
        schema["additionalProperties"] = False
        if "messages" in schema["properties"]:
            schema["properties"]["messages"] = {"type": "array", "minItems": 1, "maxItems": 3, "items": {**MESSAGE, "properties": SAID}}
    return schemathesis.openapi.from_dict(description).get_all_operations()


SIMPLE = {operation.ok().label: operation.ok() for operation in of_simple_requests()}


@pytest.mark.parametrize("label", SIMPLE)
async def test_what_is_described_is_served(served: Served, label: str) -> None:
    served.answer_with(parts=[Part((40, 41)), Part((42,))])
    cases = cases_of(SIMPLE[label].as_strategy(generation_mode=modes.GenerationMode("positive")))
    assert 200 in {(await send(case, served.http)).status_code for case in cases}


def test_what_is_described_holds_no_422_and_every_error() -> None:
    for path, operations in DESCRIPTION["paths"].items():
        for method, operation in operations.items():
            assert "422" not in operation["responses"]
            by_key = {"429"} if method == "post" else set()
            if path.startswith("/v1") or "tokenize" in path:
                assert {"200", "400", "401", "404", "405", "408", "413", "500", "503"} | by_key == set(operation["responses"]), path
    assert {"/v1/cascade", "/v1/models", "/v1/chat/completions"} <= DESCRIPTION["paths"].keys()
    error = {"$ref": "#/components/schemas/ErrorBody"}
    assert DESCRIPTION["paths"]["/v1/completions"]["post"]["responses"]["503"]["content"]["application/json"]["schema"] == error
    assert "ValidationError" not in json.dumps(DESCRIPTION)


def test_the_description_knows_every_kind_of_prompt(folder: Path) -> None:
    fields = DESCRIPTION["components"]["schemas"]["CompletionBody"]["properties"]
    assert [kind["type"] for kind in fields["prompt"]["anyOf"]] == ["string", "array", "array", "array"]
    assert [kind["type"] for kind in fields["stop"]["anyOf"]] == ["string", "array", "null"]
