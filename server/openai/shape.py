"""The many names under which clients ask for structure, as one Structure: OpenAI's, vLLM's old and new ones, llama.cpp's and SGLang's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from engine.errors import InvalidRequest
from server.openai.schema import GenerationBody, ResponseFormat, StructuredOutputs
from server.structure import Structure


def structure_of(body: GenerationBody) -> Structure | None:
    """What the answer must be; None where it may be anything. Raises InvalidRequest for two wishes at once."""
    wishes = list(_wishes(body))
    if len(wishes) > 1:
        raise InvalidRequest(f"{wishes[0].param} and {wishes[1].param} both say what the answer must be; give one.", wishes[1].param)
    return wishes[0] if wishes else None


def _wishes(body: GenerationBody) -> Iterator[Structure]:
    if body.response_format is not None:
        yield from _of_format(body.response_format)
    if body.structured_outputs is not None:
        yield from _of_outputs(body.structured_outputs)
    for param, schema in (("guided_json", body.guided_json), ("json_schema", body.json_schema)):
        if schema is not None:
            yield Structure("json", _schema(schema, param), param, body.guided_whitespace_pattern)
    for param, kind, value in (
        ("guided_regex", "regex", body.guided_regex),
        ("regex", "regex", body.regex),
        ("guided_choice", "choice", body.guided_choice),
        ("guided_grammar", "grammar", body.guided_grammar),
        ("grammar", "grammar", body.grammar or None),
        ("ebnf", "grammar", body.ebnf),
    ):
        if value is not None:
            yield Structure(kind, value, param)


def _of_format(wish: ResponseFormat) -> Iterator[Structure]:
    param = "response_format"
    if wish.type == "json_schema":
        if wish.json_schema is None:
            raise InvalidRequest("response_format of type json_schema wants json_schema: {name, schema}.", f"{param}.json_schema")
        yield Structure("json", wish.json_schema.schema_, f"{param}.json_schema.schema")
    elif wish.json_schema is not None:
        raise InvalidRequest(f"json_schema goes with the type json_schema, and the type is {wish.type}.", f"{param}.json_schema")
    elif wish.type == "json_object":
        yield Structure("json", wish.schema_, f"{param}.schema")


def _of_outputs(wish: StructuredOutputs) -> Iterator[Structure]:
    param = "structured_outputs"
    space = None if wish.disable_any_whitespace else wish.whitespace_pattern
    if wish.json_ is not None:
        yield Structure("json", _schema(wish.json_, f"{param}.json"), f"{param}.json", space)
    if wish.json_object:
        yield Structure("json", None, f"{param}.json_object", space)
    for kind in ("regex", "choice", "grammar"):
        if (value := getattr(wish, kind)) is not None:
            yield Structure(kind, value, f"{param}.{kind}")


def _schema(value: Any, param: str) -> Any:
    """A schema that may come as a text. Raises InvalidRequest."""
    if not isinstance(value, str):
        return value
    try:
        schema = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("The schema is no JSON.", param) from error
    if not isinstance(schema, dict | bool):
        raise InvalidRequest("A schema is a JSON object, true or false.", param)
    return schema
