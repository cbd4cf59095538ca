"""Fields of a request that change nothing, and those that are not implemented."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.server.conftest import Served, error_of, make_deployment, serve


async def test_ignored_fields_are_named(served: Served) -> None:
    fields = {"metadata": {"a": "b"}, "user": "me", "store": None, "no_such": 1, "ü, b\r\n": 2, "stream": False}
    messages = [{"role": "user", "content": "hello", "name": "me", "tag": 1, "refusal": None}]
    response = await served.chat(messages=messages, **fields)
    assert response.status_code == 200
    assert response.headers["x-cascade-ignored"] == "metadata,user,no_such,%C3%BC%2C%20b%0D%0A,messages.tag"
    assert "x-cascade-ignored" not in (await served.chat(user=None)).headers
    many = await served.chat(**{f"unknown_{i}": i for i in range(1000)}, stream=True)
    assert len(many.headers["x-cascade-ignored"]) < 1100
    assert (await served.chat(**{"x" * 5000: 1})).headers["x-cascade-ignored"] == "x" * 64


async def test_fields_within_objects_are_named_too(served: Served) -> None:
    response = await served.chat(
        response_format={"type": "json_object", "foo": 1}, prediction={"type": "content", "content": "x", "bar": 2}
    )
    assert response.status_code == 200, response.text
    assert sorted(response.headers["x-cascade-ignored"].split(",")) == ["prediction.bar", "response_format.foo"]


async def test_each_ignored_field_is_logged_once(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "server.openai.unused")
    for number in range(300):
        await served.chat(user="me", **{f"made_up\n{number}": 1})
    lines = [record.getMessage() for record in caplog.records]
    assert sum("The field user " in line for line in lines) == 1
    assert len(lines) == 256, "a client that makes names up does not fill the log"
    assert not any("\n" in line for line in lines)


async def test_a_deployment_may_refuse_fields_that_change_nothing(folder: Path) -> None:
    async with serve(folder, make_deployment(unused_fields="refuse")) as served:
        assert error_of(await served.chat(user="me"), 400)["param"] == "user"
        assert error_of(await served.chat(no_such=1), 400)["param"] == "no_such"
        assert (await served.chat(user=None, top_logprobs=0)).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{"name": "f"}]),
        ("function_call", {"name": "f"}),
        ("suffix", "x"),
        ("moderation", {}),
        ("audio", {}),
    ],
)
async def test_not_implemented(served: Served, field: str, value: Any) -> None:
    error = error_of(await served.chat(**{field: value}), 400)
    assert error["param"] == field
    assert field in error["message"]
    assert error_of(await served.complete(**{field: value}), 400)["param"] == field


async def test_fields_of_the_other_endpoint_are_not_ignored(served: Served) -> None:
    ours: tuple[tuple[str, Any], ...] = (("echo", True), ("best_of", 2))
    theirs: tuple[tuple[str, Any], ...] = (("top_logprobs", 1), ("continue_final_message", True), ("chat_template_kwargs", {"x": 1}))
    for field, value in ours:
        assert error_of(await served.chat(**{field: value}), 400)["param"] == field
    for field, value in theirs:
        assert error_of(await served.complete(**{field: value}), 400)["param"] == field


async def test_neutral_values_are_served(served: Served) -> None:
    neutral: dict[str, Any] = {
        "logprobs": None,
        "top_logprobs": None,
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "logit_bias": {},
        "frequency_penalty": 0.0,
        "presence_penalty": 0,
        "prediction": None,
        "suffix": None,
        "echo": False,
        "best_of": 1,
        "audio": None,
        "n": 1,
    }
    for response in (await served.chat(**neutral), await served.complete(**neutral)):
        assert response.status_code == 200
        assert "x-cascade-ignored" not in response.headers
