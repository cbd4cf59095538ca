"""Each status as the official client sees it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest

from engine.errors import CrashingRequest, EngineDead, EngineRestarting, QueueFull
from engine.request import FinishReason
from server.errors import without_paths
from tests.server.conftest import USER, make_deployment, serve

CASES: list[tuple[int, str | None, type[openai.APIStatusError], dict[str, Any]]] = [
    (400, None, openai.BadRequestError, {"fields": {"temperature": -1}}),
    (400, "context_length_exceeded", openai.BadRequestError, {"fields": {"max_tokens": 600}}),
    (400, "request_crashes_engine", openai.BadRequestError, {"refusal": CrashingRequest(3)}),
    (401, "invalid_api_key", openai.AuthenticationError, {"key": "wrong"}),
    (404, "model_not_found", openai.NotFoundError, {"fields": {"model": "none"}}),
    (408, "request_timeout", openai.APIStatusError, {"hold": asyncio.Event()}),
    (413, "request_too_large", openai.APIStatusError, {"fields": {"user": "x" * 5000}}),
    (500, "engine_dead", openai.InternalServerError, {"refusal": EngineDead("It is dead.")}),
    (503, "queue_full", openai.InternalServerError, {"refusal": QueueFull(3, 1)}),
    (503, "out_of_memory", openai.InternalServerError, {"finish": FinishReason.MEMORY}),
    (503, "engine_restarting", openai.InternalServerError, {"refusal": EngineRestarting(1)}),
]


@pytest.mark.parametrize(("status", "code", "kind", "how"), CASES, ids=[str(case[1] or case[0]) for case in CASES])
async def test_the_client_raises_its_own_class(folder: Path, status: int, code: str | None, kind: type[Any], how: dict[str, Any]) -> None:
    deployment = make_deployment(api_keys=("key",), max_body_bytes=4000, request_timeout_seconds=0.2 if status == 408 else 60)
    async with serve(folder, deployment) as served:
        served.answer_with(**{name: how[name] for name in ("refusal", "hold", "finish") if name in how})
        client = served.openai.with_options(api_key=how.get("key", "key"))
        with pytest.raises(kind) as caught:
            await client.chat.completions.create(**{"model": "tiny", "messages": USER, **how.get("fields", {})})
        error = caught.value
        assert (type(error), error.status_code, error.code) == (kind, status, code)
        assert set(error.body) == {"message", "type", "param", "code"}
        assert error.response.headers["x-request-id"] == error.request_id
        assert ("x-should-retry" in error.response.headers) == (status in (408, 500))
        assert ("retry-after" in error.response.headers) == (status == 503)


LOST = "The folder /root/.cache/models/a b is gone. It was restarted 5 times within 600 s and stays away; restart the server."


async def test_errors_name_no_file_of_this_machine(folder: Path) -> None:
    async with serve(folder) as served:
        served.answer_with(refusal=EngineDead(LOST))
        message = (await served.complete("hello")).json()["error"]["message"]
        assert message == LOST.replace("/root/.cache/models/a", "(a file)")
        served.engine.die(LOST)
        for path in ("/health", "/ready"):
            assert (await served.http.get(path)).json()["reason"] == message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("'/usr/lib/x.so': no", "'(a file)': no"),
        (r"C:\models\x.gguf is gone", "(a file) is gone"),
        ("and/or, 1/2, a / b", "and/or, 1/2, a / b"),
        ("The model 'org/tiny' does not exist", "The model 'org/tiny' does not exist"),
        ("use /v1/completions.", "use /v1/completions."),
        ("tiny; see https://a.example/b/c", "tiny; see https://a.example/b/c"),
    ],
)
def test_what_is_a_path(text: str, said: str) -> None:
    assert without_paths(text) == said
