"""Whatever a client sends, the server is not to blame."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from server.openai.convert import header_safe
from server.openai.schema import ChatBody, CompletionBody
from server.openai.unused import NOT_IMPLEMENTED
from tests.server.conftest import serve

KNOWN = sorted({*ChatBody.model_fields, *CompletionBody.model_fields, *NOT_IMPLEMENTED})
NUMBERS = ("max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "n")
# Python reads and writes integers of up to 4300 digits. One that it cannot write stands in a body as a text until the body is written.
HUGE = st.integers(-3, 3).map(lambda i: 10**4300 + i if i < 0 else f"@{i}@") | st.sampled_from([10**4299, -(10**4300) + 1, 2**31, 2**63])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | HUGE | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)
CALL = st.fixed_dictionaries({"id": st.sampled_from("ab"), "type": st.just("function"), "function": JSON}) | st.builds(
    lambda arguments: {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}},
    JSON | JSON.map(lambda value: body_of(value).decode()),
)
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "system", "assistant", "developer", "tool"]) | JSON, "content": st.text(max_size=20) | JSON},
    optional={"tool_calls": st.lists(CALL, max_size=2), "tool_call_id": st.sampled_from("ab"), "reasoning_content": st.text(max_size=3)},
)
TOOL = st.builds(
    lambda name, schema, strict: {"type": "function", "function": {"name": name, "parameters": schema, "strict": strict}},
    st.sampled_from("fg"),
    JSON | st.dictionaries(st.text(max_size=6), JSON, max_size=3),
    st.booleans(),
)
NAMED = {"type": "function", "function": {"name": "f"}}
CHOICE = st.sampled_from(
    ["auto", "none", "required", NAMED, {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [NAMED]}}]
)
VALID: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["tiny", "tiny:off"]),
    "messages": st.lists(MESSAGE, min_size=1, max_size=3),
    "prompt": st.text(max_size=20) | st.lists(st.integers(0, 300) | HUGE, max_size=5),
}


def body_of(value: Any) -> bytes:
    return re.sub(rb'"@(\d)@"', rb"1" + b"0" * 4299 + rb"\1", json.dumps(value).encode())


OBJECT = st.builds(
    dict.__or__,
    st.fixed_dictionaries(VALID, optional={"tools": st.lists(TOOL, max_size=2), "tool_choice": CHOICE}),
    st.dictionaries(st.sampled_from(KNOWN) | st.text(max_size=5), JSON, max_size=3),
)
PLAIN = {"model": "tiny", "prompt": "hello", "messages": [{"role": "user", "content": "hello"}]}
NUMBERED = st.builds(lambda name, value: {**PLAIN, name: value}, st.sampled_from(NUMBERS), HUGE | st.integers(-2, 20))
BODY = st.binary(max_size=60) | (JSON | OBJECT | NUMBERED).map(body_of)
PATHS = st.sampled_from(["/v1/completions", "/v1/chat/completions"])


@given(st.lists(st.tuples(PATHS, BODY), min_size=20, max_size=20))
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[
        HealthCheck.function_scoped_fixture,
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.large_base_example,
    ],
)
def test_no_request_gets_a_5xx(folder: Path, requests: list[tuple[str, bytes]]) -> None:
    async def send_all() -> None:
        async with serve(folder, max_model_len=2048) as served:
            for path, body in requests:
                response = await served.http.post(path, content=body, headers={"content-type": "application/json"})
                check(response)
            assert not served.engine.streams

    asyncio.run(send_all())


def check(response: httpx.Response) -> None:
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert list(response.json()["error"]) == ["message", "type", "param", "code"]
    response.headers.get("x-cascade-ignored", "").encode("ascii")


@given(st.lists(st.text(st.characters(), min_size=1)))
def test_header_values_are_safe(names: list[str]) -> None:
    value = header_safe(names)
    assert all(0x21 <= ord(char) <= 0x7E for char in value)
    assert len(value) <= 1028
