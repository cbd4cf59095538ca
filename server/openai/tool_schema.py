"""OpenAI's requests as far as they are about tools: functions, which of them may be called, and calls that were made."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

from server.openai.values import Body, Text, walkable

MAX_LEVELS = 64  # of a function's parameters, and of arguments for it
MAX_TOOLS = 128


def _schema_of_object(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type", "object") != "object":
        raise ValueError("a function's parameters are a JSON Schema of type object")
    walked: dict[str, Any] = walkable(schema, MAX_LEVELS)
    return walked


def _choice_or_mistake(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    """One message for a union, whose own would be one for each member."""
    try:
        return validate(value)
    except ValidationError as error:
        raise ValueError(
            "it is none, auto, required, {'type': 'function', 'function': {'name': '...'}}, or {'type': 'allowed_tools', "
            "'allowed_tools': {'mode': 'auto' or 'required', 'tools': [...]}}"
        ) from error


Parameters = Annotated[dict[str, Any], AfterValidator(_schema_of_object)]
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]


class FunctionDefinition(Body):
    name: FunctionName
    description: Text | None = None
    parameters: Parameters | None = Field(None, description="a JSON Schema of an object; none: the function takes no arguments")
    strict: bool | None = Field(None, description="true: arguments follow the schema")


class Tool(Body):
    type: Literal["function"]
    function: FunctionDefinition


class FunctionReference(Body):
    name: FunctionName


class ToolReference(Body):
    type: Literal["function"]
    function: FunctionReference


class AllowedTools(Body):
    mode: Literal["auto", "required"]
    tools: list[ToolReference] = Field(min_length=1, max_length=MAX_TOOLS)


class AllowedToolsChoice(Body):
    """Some of the tools, without a change of the prompt."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Annotated[
    Literal["none", "auto", "required"] | ToolReference | AllowedToolsChoice,
    WrapValidator(_choice_or_mistake),
]


class CalledFunction(Body):
    name: FunctionName
    arguments: Text = Field(description="JSON")


class CalledTool(Body):
    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction
