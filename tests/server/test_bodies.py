"""Bodies built to cost much: a refusal with a reason, soon, in little memory, and never an error of the server's."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.body import MAX_DEPTH, MAX_KEYS, MAX_VALUES, check_shape
from server.errors import BodyTooComplex
from server.openai.schema import MAX_MESSAGES
from server.openai.values import MAX_CHARACTERS
from tests.server.conftest import Served, error_of, serve_socket

JSON = {"content-type": "application/json"}
PLAIN = b'{"model": "tiny", "prompt": "hello", "messages": [{"role": "user", "content": "hello"}], "x": %s}'
SIZE = 16 << 20


def deep(levels: int, opening: bytes = b"[", closing: bytes = b"]") -> bytes:
    return opening * levels + closing * levels


@pytest.mark.parametrize(
    "value",
    [
        deep(10_000),
        deep(MAX_DEPTH),  # and the object around it
        deep(10_000, b'{"a":', b"}").replace(b":}", b":1}"),
        b'"\\\\", ' + deep(10_000),
        b"[" * 1_000_000,
        b"[" + b"{}," * MAX_VALUES + b"1]",
        b"[" + b"1," * (MAX_VALUES + 1) + b"1]",
        b"{" + b",".join(b'"%d":1' % i for i in range(MAX_KEYS + 1)) + b"}",
    ],
    ids=["10,000 deep", "one too deep", "deep objects", "behind a backslash", "open", "objects", "values", "keys"],
)
async def test_monsters_are_refused(served: Served, value: bytes) -> None:
    for path in ("/v1/completions", "/v1/chat/completions"):
        response = await served.http.post(path, content=PLAIN % value, headers=JSON)
        error = error_of(response, 400)
        assert (error["code"], error["type"]) == ("request_too_complex", "invalid_request_error")
        assert "this server takes" in error["message"]


async def test_what_only_looks_like_a_monster_is_served(served: Served) -> None:
    marks = '[{"a": \\" : [' * 30_000 + "\\"
    for value in (
        deep(MAX_DEPTH - 1).decode(),
        json.dumps(marks),
        json.dumps({marks: [marks, "\\", '"']}),
        json.dumps("\\" * 9 + "[" * 99),
    ):
        response = await served.http.post("/v1/completions", content=PLAIN % value.encode(), headers=JSON)
        assert response.status_code == 200, response.text
        assert response.headers["x-cascade-ignored"] == "messages,x"


@pytest.mark.parametrize("coding", ["utf-16", "utf-16-le", "utf-32-be"])
async def test_json_comes_in_utf_8(served: Served, coding: str) -> None:
    """In another coding a character such as U+5B5B would look like two brackets, and U+0122 would hide them."""
    text = '{"model": "tiny", "prompt": "hello"}'
    assert "UTF-8" in error_of(await served.http.post("/v1/completions", content=text.encode(coding), headers=JSON), 400)["message"]
    assert (await served.http.post("/v1/completions", content=text.encode("utf-8-sig"), headers=JSON)).status_code == 200


def depth_of(value: Any) -> int:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if parts is None else 1 + max(map(depth_of, parts), default=0)


TEXTS = st.text(st.sampled_from('[]{},:"\\a\n\u2028é'), max_size=6)
VALUES = st.recursive(
    TEXTS | st.integers(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=25
)


@given(VALUES, st.booleans())
def test_depth_is_measured_as_it_is(value: Any, is_ascii: bool) -> None:
    text = json.dumps(value, ensure_ascii=is_ascii).encode()
    above = MAX_DEPTH - depth_of(value)
    check_shape(deep(above).replace(b"[]", b"[" + text + b"]"))
    with pytest.raises(BodyTooComplex):
        check_shape(deep(above + 1).replace(b"[]", b"[" + text + b"]"))


@pytest.mark.parametrize(
    "unit",
    [b'"', b'\\"', b"\\", b'"",', b'"a",', b"[],", b"[", b"{", b'"[', b'\\"[', b"\\[", b",", b":", b'"a":1,', b"1,", b"][", b'[""', b"a"],
    ids=repr,
)
def test_measuring_takes_one_look_at_each_byte(unit: bytes) -> None:
    body = b'{"prompt":[' + unit * (SIZE // len(unit))
    tracemalloc.start()
    begin = time.process_time()
    with contextlib.suppress(BodyTooComplex):
        check_shape(body)
    seconds, (_, most) = time.process_time() - begin, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 4, "some 0.1 s; 4 s for machines that are busy"
    assert most < 6 * SIZE


async def test_a_large_body_does_not_hold_up_others(folder: Path) -> None:
    """Bodies of the largest size, built to be slow, one after the other, while others are served."""
    async with serve_socket(folder) as served:
        bodies = [b"[" + unit * (SIZE // len(unit)) for unit in (b"[],", b'"a",', b'{"a":1},')]
        slow = asyncio.gather(*(served.http.post("/v1/completions", content=body, headers=JSON) for body in bodies))
        longest, begin = 0.0, time.monotonic()
        while not slow.done():
            await asyncio.sleep(0.005)
            longest, begin = max(longest, time.monotonic() - begin), time.monotonic()
        assert [response.status_code for response in await slow] == [400] * 3
        assert longest < 1.5, "whole megabytes are searched at once, and no more than that"


# ---------------------------------------------------------------------- fields
async def test_fields_have_bounds(served: Served) -> None:
    messages = [{"role": "user", "content": "a"}] * (MAX_MESSAGES + 1)
    error = error_of(await served.post("chat/completions", messages=messages), 400)
    assert (error["param"], error["message"]) == ("messages", f"messages: must have at most {MAX_MESSAGES} items.")
    long = "a" * (MAX_CHARACTERS + 1)
    parts = [{"type": "text", "text": "a" * (MAX_CHARACTERS // 2)}] * 3
    for endpoint, param, fields in (
        ("completions", "prompt", {"prompt": long}),
        ("completions", "prompt", {"prompt": ["a", long]}),
        ("chat/completions", "messages.0.content", {"messages": [{"role": "user", "content": long}]}),
        ("chat/completions", "messages.0.content", {"messages": [{"role": "user", "content": parts}]}),
    ):
        error = error_of(await served.post(endpoint, **fields), 400)
        assert (error["param"], error["message"]) == (param, f"{param}: must have at most {MAX_CHARACTERS} characters.")
    error = error_of(await served.post("completions", prompt="a", model="a" * 10_000), 404)
    assert len(error["message"]) < 400
