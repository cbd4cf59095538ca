"""Responses and chunks of many kinds of requests, against the schema that OpenAI publishes.

The schema is read as JSON Schema, with OpenAPI 3.0's `nullable` taken for what it says. Where it is wrong about OpenAI's own answers,
MENDED says how. What responses hold beyond it is OURS, and nothing else.
"""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.request import FinishReason, Round
from tests.fakes import Part, Script
from tests.server.conftest import chunks_of, serve

FILE = Path(__file__).parents[3] / "shared" / "data" / "openai_openapi.yml.gz"
pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"{FILE} is not there")

# A completion's chunks "share the same shape" as its response, in which finish_reason and usage may not be null. Both are in every chunk
# but the last, as the schema of a chat's chunks says itself.
_LOGPROBS = ("CreateCompletionResponse", "properties", "choices", "items", "properties", "logprobs", "anyOf", 0, "properties")
MENDED: dict[tuple[str | int, ...], Any] = {
    ("CreateCompletionResponse", "properties", "choices", "items", "properties", "finish_reason"): {
        "enum": ["stop", "length", "content_filter", None]
    },
    ("CreateCompletionResponse", "properties", "usage"): {"anyOf": [{"$ref": "#/components/schemas/CompletionUsage"}, {"type": "null"}]},
    # Nothing is in front of the first token of a prompt that is echoed, and OpenAI's own answers say null.
    (*_LOGPROBS, "token_logprobs", "items"): {"type": ["number", "null"]},
    (*_LOGPROBS, "top_logprobs", "items"): {"type": ["object", "null"], "additionalProperties": {"type": "number"}},
}
OURS = {"metrics", "choices.provenance", "root", "parent", "max_model_len", "data.root", "data.parent", "data.max_model_len"}


# ---------------------------------------------------------------------- the schema
@cache
def schemas(is_mended: bool) -> dict[str, Any]:
    """OpenAI's components as JSON Schema."""
    with gzip.open(FILE, "rt", encoding="utf-8") as file:
        found: dict[str, Any] = yaml.load(file, getattr(yaml, "CSafeLoader", yaml.SafeLoader))["components"]["schemas"]
    for path, mended in MENDED.items() if is_mended else ():
        *way, last = path
        node: Any = found
        for key in way:
            node = node[key]
        node[last] = mended
    read: dict[str, Any] = nullable(found)
    return read


def nullable(node: Any) -> Any:
    if isinstance(node, list):
        return [nullable(part) for part in node]
    if not isinstance(node, dict):
        return node
    plain = {key: nullable(value) for key, value in node.items() if key != "nullable"}
    return {"anyOf": [plain, {"type": "null"}]} if node.get("nullable") is True else plain


@cache
def validator(name: str, is_mended: bool = True) -> jsonschema.Draft202012Validator:
    root = {"$ref": f"#/components/schemas/{name}", "components": {"schemas": schemas(is_mended)}}
    return jsonschema.Draft202012Validator(root, format_checker=jsonschema.FormatChecker())


def check(value: Any, name: str, is_mended: bool = True) -> None:
    validator(name, is_mended).validate(value)
    assert set(unknown(value, schemas(True)[name])) <= OURS


def unknown(value: Any, schema: Any, place: str = "") -> Iterator[str]:
    """Names of what a response holds and its schema does not, two levels down."""
    schema = schemas(True)[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    for key, inner in value.items():
        if key not in schema["properties"]:
            yield place + key
        elif key in ("choices", "data"):
            for item in inner:
                yield from unknown(item, schema["properties"][key]["items"], f"{key}.")


# ---------------------------------------------------------------------- requests
def optional(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


TEXT = st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(["hello world", "<|im_end|>", "🦊\u2028é"])
COMMON: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.integers(1, 9),
    "max_completion_tokens": st.integers(1, 9),
    "temperature": st.sampled_from([None, 0, 0.5, 2]),
    "top_p": st.sampled_from([None, 0.1, 1]),
    "top_k": st.integers(-1, 5),
    "min_p": st.floats(0, 1),
    "min_tokens": st.integers(0, 1),
    "seed": st.integers(-9, 9),
    "stop": st.none() | st.sampled_from(["o", ["l", "wor"], []]),
    "n": st.integers(1, 2),
    "logit_bias": st.sampled_from([{}, {"5": -100, "7": 3.5}]),
    "frequency_penalty": st.floats(-2, 2),
    "presence_penalty": st.floats(-2, 2),
    "repetition_penalty": st.floats(0.5, 2),
    "ignore_eos": st.booleans(),
    "stop_token_ids": st.lists(st.integers(0, 300), max_size=2),
    "include_stop_str_in_output": st.booleans(),
    "user": TEXT,
    "speculation": optional(enabled=st.booleans(), max_draft=st.integers(0, 4), provenance=st.booleans()),
}
STREAMED = optional(stream=st.booleans()) | st.fixed_dictionaries(
    {"stream": st.just(True), "stream_options": optional(include_usage=st.booleans() | st.none())}
)
MESSAGES = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "developer"]),
            "content": TEXT | st.lists(st.builds(lambda text: {"type": "text", "text": text}, TEXT), min_size=1, max_size=2),
        }
    ),
    min_size=1,
    max_size=3,
)
CHAT_LOGPROBS: st.SearchStrategy[dict[str, Any]] = st.just({}) | st.fixed_dictionaries(
    {"logprobs": st.just(True)}, optional={"top_logprobs": st.integers(0, 3)}
)
CHAT_FIELDS: dict[str, st.SearchStrategy[Any]] = COMMON | {
    "add_generation_prompt": st.booleans(),
    "chat_template_kwargs": st.just({"x": 1}),
}
TEXT_FIELDS: dict[str, st.SearchStrategy[Any]] = COMMON | {
    "logprobs": st.integers(0, 3),
    "max_tokens": st.integers(0, 9),
    "echo": st.booleans(),
    "best_of": st.integers(1, 3),
}
PROMPTS = TEXT | st.lists(TEXT, min_size=1, max_size=2) | st.lists(st.integers(0, 250), min_size=1, max_size=4)
MODEL = {"model": st.sampled_from(["tiny", "org/tiny", "tiny:off", "other"])}


def request_of(path: str, required: dict[str, Any], fields: dict[str, Any], more: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    body = st.builds(lambda a, b, c, d: a | b | c | d, st.fixed_dictionaries(MODEL | required), optional(**fields), STREAMED, more)
    return st.tuples(st.just(path), body)


REQUESTS = request_of("chat/completions", {"messages": MESSAGES}, CHAT_FIELDS, CHAT_LOGPROBS) | request_of(
    "completions", {"prompt": PROMPTS}, TEXT_FIELDS, st.just({})
)
PARTS = st.builds(
    lambda token_ids, drafted: Part(tuple(token_ids), Round(2, drafted and 1, 0, 0) if len(token_ids) > 1 else None, 1, 1, drafted),
    st.lists(st.integers(3, 299), min_size=1, max_size=3),
    st.integers(0, 1),
)
SCRIPTS = st.builds(
    Script,
    parts=st.lists(PARTS, min_size=1, max_size=4),
    finish=st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]),
    at_once=st.booleans(),
)


@given(st.lists(st.tuples(SCRIPTS, REQUESTS), min_size=20, max_size=20))
@settings(max_examples=20, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_whatever_is_asked_the_answer_has_openais_shape(folder: Path, asked: list[tuple[Script, tuple[str, dict[str, Any]]]]) -> None:
    async def ask_all() -> None:
        async with serve(folder) as served:
            for script, (path, body) in asked:
                served.engine.script = script
                response = await served.http.post(f"/v1/{path}", content=json.dumps(body), headers={"content-type": "application/json"})
                check_answer(response, path, body)

    asyncio.run(ask_all())


def check_answer(response: httpx.Response, path: str, body: dict[str, Any]) -> None:
    is_chat = path.startswith("chat")
    if response.status_code != 200:
        assert response.status_code in (400, 404), response.text
        check(response.json(), "ErrorResponse")
    elif not body.get("stream"):
        is_scored = body.get("echo") is True and body.get("logprobs") is not None
        check(response.json(), "CreateChatCompletionResponse" if is_chat else "CreateCompletionResponse", is_mended=is_scored)
    else:
        for chunk in chunks_of(response):
            check(chunk, "CreateChatCompletionStreamResponse" if is_chat else "CreateCompletionResponse")


async def test_models_and_errors(folder: Path) -> None:
    async with serve(folder) as served:
        check((await served.http.get("/v1/models")).json(), "ListModelsResponse")
        check((await served.http.get("/v1/models/org/tiny:off")).json(), "Model")
        for response in (await served.http.get("/v1/models/none"), await served.http.get("/v1/none"), await served.complete(n=0)):
            assert response.status_code >= 400
            check(response.json(), "ErrorResponse")


def test_the_validator_would_see_it() -> None:
    """What the schema is asked for is really refused by it."""
    choice = {"index": 0, "delta": {}, "finish_reason": None, "logprobs": None}
    chunk = {"id": "a", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    check(chunk, "CreateChatCompletionStreamResponse")
    wrongs: list[dict[str, Any]] = [
        {"choices": None},
        {"object": "x"},
        {"created": "1"},
        {"choices": [choice | {"finish_reason": "abort"}]},
        {"usage": {}},
    ]
    for wrong in wrongs:
        with pytest.raises(jsonschema.ValidationError):
            check(chunk | wrong, "CreateChatCompletionStreamResponse")
    with pytest.raises(AssertionError):
        check(chunk | {"more": 1}, "CreateChatCompletionStreamResponse")


def test_what_is_mended_is_wrong() -> None:
    """When OpenAI mends its schema, these go."""
    chunk = {"id": "a", "object": "text_completion", "created": 1, "model": "m"}
    last: dict[str, Any] = {"choices": [], "usage": None}
    choice: dict[str, Any] = {"index": 0, "text": "", "finish_reason": "stop"}
    scored = [{"choices": [choice | {"logprobs": {key: [None]}}]} for key in ("token_logprobs", "top_logprobs")]
    for more in ({"choices": [choice | {"logprobs": None, "finish_reason": None}]}, last, *scored):
        with pytest.raises(jsonschema.ValidationError):
            check(chunk | more, "CreateCompletionResponse", is_mended=False)
        check(chunk | more, "CreateCompletionResponse")
