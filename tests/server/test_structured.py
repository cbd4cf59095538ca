"""Asking for structure and for a prediction to be used: every name under which clients do, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import BaseModel

from engine.request import FinishReason, Round
from server.text import TextTokenizer
from tests.fakes import Part
from tests.server.conftest import USER, Served, chunks_of, error_of

NUMBER: dict[str, Any] = {"type": "integer"}


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": NUMBER, "strict": True}}},
        {"response_format": {"type": "json_object", "schema": NUMBER}},
        {"structured_outputs": {"json": NUMBER}},
        {"structured_outputs": {"json": json.dumps(NUMBER)}},
        {"guided_json": NUMBER},
        {"json_schema": json.dumps(NUMBER)},
    ],
)
async def test_one_schema_under_many_names_is_one_grammar(served: Served, fields: dict[str, Any]) -> None:
    for response in (await served.chat(**fields), await served.complete(**fields)):
        assert response.status_code == 200
        assert "x-cascade-ignored" not in response.headers
    grammars = {request.grammar for request in served.engine.requests}
    assert len(grammars) == 1
    assert '"type": "integer"' in str(grammars.pop())


@pytest.mark.parametrize(
    ("fields", "grammar"),
    [
        ({"regex": "[ab]+"}, "start: /[ab]+/"),
        ({"guided_regex": "[ab]+"}, "start: /[ab]+/"),
        ({"structured_outputs": {"regex": "[ab]+"}}, "start: /[ab]+/"),
        ({"guided_choice": ["yes", "no"]}, 'start: "yes" | "no"'),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, 'start: "yes" | "no"'),
        ({"grammar": 'root ::= "a" | "b"'}, None),
        ({"ebnf": 'root ::= "a" | "b"'}, None),
        ({"guided_grammar": 'start: "a" | "b"'}, 'start: "a" | "b"'),
    ],
)
async def test_expressions_choices_and_grammars(served: Served, fields: dict[str, Any], grammar: str | None) -> None:
    assert (await served.chat(**fields)).status_code == 200
    given = served.engine.requests[0].grammar
    assert given is not None
    assert grammar is None or grammar in given


async def test_no_structure_is_no_grammar(served: Served) -> None:
    for fields in ({}, {"response_format": {"type": "text"}}, {"response_format": None}, {"grammar": ""}, {"structured_outputs": None}):
        assert (await served.chat(**fields)).status_code == 200
    assert [request.grammar for request in served.engine.requests] == [None] * 5


@pytest.mark.parametrize(
    ("fields", "param", "reason"),
    [
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json", "uniqueItems"),
        ({"guided_json": {"type": "array", "uniqueItems": True, "x-guidance": {"lenient": True}}}, "guided_json", "uniqueItems"),
        ({"guided_json": False}, "guided_json", "nothing"),
        ({"guided_json": "{"}, "guided_json", "no JSON"),
        ({"guided_json": "[]"}, "guided_json", "object"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "wants"),
        ({"response_format": {"type": "text", "json_schema": {"name": "n"}}}, "response_format.json_schema", "type"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a b"}}}, "response_format.json_schema.name", "pattern"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"enum": []}}}},
            "response_format.json_schema.schema",
            "Unsatisfiable",
        ),
        ({"regex": "(ab"}, "regex", "unclosed"),
        ({"grammar": "root ::= ((("}, "grammar", "Expected"),
        ({"guided_grammar": "start: foo"}, "guided_grammar", "foo"),
        ({"guided_choice": []}, "guided_choice", ""),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag", ""),
        ({"regex": "a", "guided_choice": ["a"]}, "guided_choice", "both"),
        ({"regex": "a", "min_tokens": 2}, "min_tokens", "grammar"),
        ({"regex": "a", "ignore_eos": True}, "ignore_eos", "end token"),
    ],
)
async def test_what_cannot_be_held_to_is_refused_with_the_reason(served: Served, fields: dict[str, Any], param: str, reason: str) -> None:
    error = error_of(await served.chat(**fields), 400)
    assert error["param"] == param
    assert reason in error["message"]
    assert "%json" not in error["message"], "what the server wrote is no news"
    assert not served.engine.requests


async def test_a_schema_nested_too_deeply_is_refused(served: Served) -> None:
    schema: dict[str, Any] = {}
    for _ in range(80):
        schema = {"items": schema}
    assert "deeply" in error_of(await served.chat(guided_json=schema), 400)["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"regex": "a"}, "regex"),
        ({"guided_choice": ["a"]}, "guided_choice"),
        ({"structured_outputs": {"grammar": 'start: "a"'}}, "structured_outputs.grammar"),
        ({"response_format": {"type": "json_object"}}, "response_format.schema"),
    ],
)
async def test_a_grammar_that_gets_too_complex_ends_as_the_clients_mistake(served: Served, fields: Any, param: str) -> None:
    """The field is named that asked for it; tests/server/test_held.py has tools."""
    served.answer_with(parts=[Part(())], finish=FinishReason.ERROR)
    error = error_of(await served.chat(**fields), 400)
    assert error["message"].startswith(f"What {param} asked of the answer became too complex")
    assert error["param"] == param
    assert error_of(await served.complete(**fields), 400) == error
    response = await served.chat(stream=True, **fields)
    assert response.status_code == 200, "it was not known before"
    assert next(chunk for chunk in chunks_of(response) if "error" in chunk)["error"] == error
    counted = (await served.http.get("/metrics")).text
    assert 'finish_reason="refused",model="tiny",preset=""} 3.0' in counted
    assert 'finish_reason="error",model="tiny",preset=""} 0.0' in counted, "an alert goes by these"


async def test_the_sdk_parses_a_pydantic_model(served: Served, tokenizer: TextTokenizer) -> None:
    class Card(BaseModel):
        name: str
        tags: list[str]

    text = '{"name": "a", "tags": ["b"]}'
    served.answer_with(parts=[Part((*tokenizer.encode(text), 2))], finish=FinishReason.STOP)
    completion = await served.openai.chat.completions.parse(model="tiny", messages=USER, response_format=Card)
    assert completion.choices[0].message.parsed == Card(name="a", tags=["b"])
    assert '"required": ["name", "tags"]' in str(served.engine.requests[0].grammar)


# ---------------------------------------------------------------------- predictions
async def test_a_prediction_reaches_the_engine_as_the_answers_tokens(served: Served, tokenizer: TextTokenizer) -> None:
    for content in ("quick fox<|im_end|>", [{"type": "text", "text": "quick fox<|im_end|>"}]):
        assert (await served.chat(prediction={"type": "content", "content": content})).status_code == 200
    first, second = served.engine.requests
    assert first.prediction_ids == second.prediction_ids
    assert 2 not in first.prediction_ids, "special tokens in it are text"
    assert tokenizer.decode(first.prediction_ids) == "quick fox<|im_end|>"


async def test_usage_counts_what_was_predicted_and_stands(served: Served) -> None:
    """Drafts from the prediction that stand, and the one that was judged and refused; what was drafted behind it was not judged."""
    parts = [Part((5, 6, 7), Round(4, 2, predicted_mask=0b1111)), Part((8, 9), Round(3, 1, predicted_mask=0b001)), Part((5,), Round(1, 0))]
    served.answer_with(parts=parts)
    predicted = {"prediction": {"type": "content", "content": "the fox"}}
    usage = (await served.chat(**predicted)).json()["usage"]
    assert usage["completion_tokens_details"] == {"accepted_prediction_tokens": 3, "rejected_prediction_tokens": 1}
    assert "completion_tokens_details" not in (await served.chat()).json()["usage"]
    streamed = await served.chat(**predicted, stream=True, stream_options={"include_usage": True})
    assert chunks_of(streamed)[-1]["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] == 3


async def test_a_prediction_that_nobody_drafts_from_is_reported(served: Served) -> None:
    predicted = {"prediction": {"type": "content", "content": "the fox"}}
    assert "x-cascade-ignored" not in (await served.chat(**predicted)).headers
    served.engine.given_info = type(served.engine.given_info)(**{**_fields(served.engine.given_info), "drafter": "none"})
    assert (await served.chat(**predicted)).headers["x-cascade-ignored"] == "prediction"


@pytest.mark.parametrize("prediction", [{"type": "text", "content": "a"}, {"type": "content"}, {"type": "content", "content": 1}, "a"])
async def test_a_prediction_of_another_shape_is_refused(served: Served, prediction: Any) -> None:
    assert str(error_of(await served.chat(prediction=prediction), 400)["param"]).startswith("prediction")


async def test_a_prediction_longer_than_any_answer_is_refused(served: Served) -> None:
    error = error_of(await served.chat(prediction={"type": "content", "content": "x " * 600}), 400)
    assert error["param"] == "prediction"
    assert "no answer" in error["message"]


def _fields(info: Any) -> dict[str, Any]:
    return {name: getattr(info, name) for name in info.__struct_fields__}
