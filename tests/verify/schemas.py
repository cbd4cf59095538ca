"""JSON schemas for the test that no answer is ever invalid: of every keyword that is supported, by hand, and nested at random."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

Schema = dict[str, Any]

_NODE: Schema = {
    "type": "object",
    "properties": {"v": {"type": "integer", "minimum": 0, "maximum": 9}, "next": {"$ref": "#/$defs/next"}},
    "required": ["v", "next"],
    "additionalProperties": False,
}
_TREE: Schema = {"$defs": {"node": _NODE, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}}, "$ref": "#/$defs/node"}
_SUM: Schema = {
    "type": "array",
    "prefixItems": [{"enum": ["+", "*"]}, {"$ref": "#/definitions/e"}, {"$ref": "#/definitions/e"}],
    "minItems": 3,
    "items": False,
}
_EXPRESSION: Schema = {"definitions": {"e": {"anyOf": [{"type": "integer", "minimum": -3, "maximum": 3}, _SUM]}}, "$ref": "#/definitions/e"}
_BOTH: Schema = {
    "allOf": [
        {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]},
        {"properties": {"b": {"const": 2}}, "required": ["b"]},
    ],
    "maxProperties": 2,
}

BY_HAND: tuple[Schema, ...] = (
    {},
    {"type": "object"},
    {"type": "string"},
    {"type": "string", "maxLength": 3},
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": "string", "minLength": 4},
    {"type": "string", "pattern": "^[a-c]{2,4}$"},
    {"type": "string", "pattern": "x+y"},
    {"type": "string", "pattern": "^(äö|ü{2}|日本)+$"},
    {"type": "string", "pattern": "^\\d{3}-\\d{4}$"},
    {"type": "string", "pattern": '^"q\\\\"$'},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "time"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": "integer"},
    {"type": "integer", "minimum": 7, "maximum": 7},
    {"type": "integer", "minimum": -12, "maximum": 103},
    {"type": "integer", "exclusiveMinimum": 99, "exclusiveMaximum": 102},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 100},
    {"type": "number"},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": "number", "exclusiveMinimum": -0.5, "exclusiveMaximum": 0.25},
    {"type": "boolean"},
    {"type": "null"},
    {"type": ["string", "null"], "maxLength": 4},
    {"type": ["integer", "boolean"]},
    {"const": {"a": [1, "zwei", None, True, 2.5]}},
    {"const": 'a "quoted" \\ text\nwith lines\t\u0001 and ünicode 😀'},
    {"enum": ["red", "green", "grün", "", "a b"]},
    {"enum": [1, "1", None, [1], {"one": 1}]},
    {"enum": ["r", "re", "red", "reds"]},
    {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 3}},
    {"type": "array", "items": {"enum": ["x", "y"]}, "minItems": 2, "maxItems": 4},
    {"type": "array", "maxItems": 0},
    {"type": "array", "prefixItems": [{"type": "boolean"}, {"const": "b"}], "items": {"type": "null"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "items": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}, "minItems": 1, "maxItems": 2},
    {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"const": 1}}, "required": ["a"], "additionalProperties": False},
    {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"const": 1}}, "additionalProperties": False},
    {"type": "object", "properties": {"z": {"const": 0}, "a": {"const": 1}}, "required": ["a", "z"], "additionalProperties": False},
    {"type": "object", "properties": {"a": {"type": "integer", "maximum": 9, "minimum": 0}}, "required": ["a"]},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 2},
    {"type": "object", "additionalProperties": {"type": "null"}, "minProperties": 1, "maxProperties": 2},
    {"type": "object", "patternProperties": {"^i_": {"type": "integer", "minimum": 0, "maximum": 5}}, "additionalProperties": False},
    {"type": "object", "properties": {"größe": {"enum": ["klein", "groß"]}}, "required": ["größe"], "additionalProperties": False},
    {"type": "object", "properties": {'qu"ote': {"const": 1}}, "required": ['qu"ote'], "additionalProperties": False},
    {"type": "object", "properties": {"": {"const": ""}}, "required": [""], "additionalProperties": False},
    {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "object", "maxProperties": 0}]},
    {"oneOf": [{"type": "boolean"}, {"type": "array", "maxItems": 1, "items": {"type": "null"}}]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 5}]},
    _BOTH,
    _TREE,
    _EXPRESSION,
)


def at_random(num: int) -> Iterator[Schema]:
    """Nested ones."""
    rng = random.Random(5)
    for _ in range(num):
        yield _nested(rng, depth=rng.randrange(1, 4))


def _nested(rng: random.Random, depth: int) -> Schema:
    kind = rng.choice(("object", "array", "anyOf")) if depth else "leaf"
    if kind == "object":
        names = rng.sample(("id", "name", "tags", "größe", "a b", "Änderung", "x_1", "日付"), rng.randrange(1, 4))
        properties = {name: _nested(rng, depth - 1) for name in names}
        required = [name for name in names if rng.random() < 0.7]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if kind == "array":
        low = rng.randrange(3)
        return {"type": "array", "items": _nested(rng, depth - 1), "minItems": low, "maxItems": low + rng.randrange(3)}
    if kind == "anyOf":
        return {"anyOf": [_nested(rng, depth - 1), _nested(rng, 0)]}
    return rng.choice(_leaves(rng))


def _leaves(rng: random.Random) -> tuple[Schema, ...]:
    low = rng.randrange(-30, 30)
    return (
        {"type": "integer", "minimum": low, "maximum": low + rng.randrange(200)},
        {"type": "number", "minimum": low, "exclusiveMaximum": low + 1},
        {"type": "string", "maxLength": rng.randrange(1, 6)},
        {"type": "string", "pattern": f"^[a-f]{{{rng.randrange(1, 3)},3}}$"},
        {"enum": rng.sample(["on", "off", "óff", None, 0, 1.5, True, ["x"]], 3)},
        {"type": "boolean"},
        {"type": "null"},
    )
