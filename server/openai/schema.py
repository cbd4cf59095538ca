"""OpenAI's requests as types, with what this server adds. Checks the shape of each field and nothing between fields.

Fields that are not declared are kept: server/openai/convert.py refuses or reports them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from engine.config import RuleName
from server.openai.tool_schema import MAX_LEVELS, MAX_TOOLS, CalledTool, Tool, ToolChoice
from server.openai.values import Body, Text, encodable, walkable

# ---------------------------------------------------------------------- values


INT_MAX = 2**31 - 1  # integers are small from here on: Python refuses to write one of thousands of digits, in messages, too
MAX_MESSAGES = 4096


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _join_parts(content: Any) -> Any:
    """Text parts become one text, a line each."""
    if not isinstance(content, list):
        return content
    return "\n".join(_text_of(part) for part in content)


def _text_of(part: Any) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("text", "refusal") or not isinstance(part.get(kind), str):
        raise ValueError("this model reads text; each part of a content array must be {'type': 'text', 'text': '...'}")
    text: str = part[kind]
    return text


def _as_prompts(value: Any) -> Any:
    """OpenAI's four kinds of prompt (a text, several, token ids, several lists of them) as one list."""
    if isinstance(value, str) or (_is_list_of(value, int) and value):
        return [value]
    if _is_list_of(value, str) or (isinstance(value, list) and all(_is_list_of(item, int) for item in value)):
        return value
    raise ValueError("a prompt is a string, a list of strings, a list of token ids, or a list of lists of token ids")


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(type(item) is kind for item in value)  # a bool is no token id


def _servable_prompts(prompts: Sequence[Any]) -> Sequence[Any]:
    for prompt in prompts:
        if isinstance(prompt, str):
            encodable(prompt)
        elif prompt and not (min(prompt) >= 0 and max(prompt) <= INT_MAX):
            raise ValueError(f"a token id is at least 0 and at most {INT_MAX}")
    return prompts


_TEXT, _IDS = {"type": "string"}, {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": INT_MAX}, "minItems": 1}
_PROMPTS = {"anyOf": [_TEXT, *({"type": "array", "items": kind, "minItems": 1} for kind in (_TEXT, _IDS["items"], _IDS))]}
JsonSchema = Annotated[dict[str, Any] | bool, AfterValidator(lambda value: walkable(value, MAX_LEVELS))]
Variables = Annotated[dict[str, Any], AfterValidator(walkable)]
Wish = Annotated[str, Field(min_length=1, max_length=2**17), AfterValidator(encodable)]
Choices = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=2**16), AfterValidator(encodable)]], Field(min_length=1, max_length=4096)
]
Content = Annotated[str, BeforeValidator(_join_parts), AfterValidator(encodable)]
Prompts = Annotated[
    list[Any], Field(min_length=1), BeforeValidator(_as_prompts), AfterValidator(_servable_prompts), WithJsonSchema(_PROMPTS)
]
Stop = Annotated[Text, Field(min_length=1, max_length=1024)]
Stops = Annotated[list[Stop], Field(max_length=4), BeforeValidator(_as_list, json_schema_input_type=Stop | list[Stop])]
TokenId = Annotated[int, Field(ge=0, le=INT_MAX)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
LogitBias = Annotated[dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], Bias], Field(max_length=1024)]


# ---------------------------------------------------------------------- requests
class StreamOptions(Body):
    include_usage: bool | None = None


class Speculation(BaseModel):
    """This request's own settings of speculative decoding; they win over the preset's."""

    model_config = ConfigDict(strict=True, extra="forbid")

    enabled: bool | None = Field(None, description="false: no drafts, every token is the target's")
    rule: RuleName | None = Field(None, description="which drafts may stand; of those that the deployment allows")
    alpha: Annotated[float, Field(allow_inf_nan=False)] | None = Field(None, description="the rule's dial; none: its default")
    provenance: bool | None = Field(None, description="true: choices say of each token who wrote it")
    max_draft: int | None = Field(None, ge=0, le=INT_MAX, description="at most this many drafts a step; the deployment's bound holds, too")


class NamedSchema(Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: Text | None = None
    schema_: JsonSchema | None = Field(None, alias="schema", description="none: any JSON object")
    strict: bool | None = Field(None, description="answers are held to the schema in any case")


class ResponseFormat(Body):
    """OpenAI's way to ask for structure."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    schema_: JsonSchema | None = Field(None, alias="schema", description="with json_object: as llama.cpp has it")


class StructuredOutputs(BaseModel):
    """vLLM's way: one of the first five."""

    model_config = ConfigDict(strict=True, extra="forbid")

    json_: JsonSchema | Wish | None = Field(None, alias="json", description="a schema, or its text")
    json_object: bool | None = None
    regex: Wish | None = None
    choice: Choices | None = None
    grammar: Wish | None = Field(None, description="in Lark's notation, or llama.cpp's")
    disable_any_whitespace: bool | None = Field(None, description="true: no whitespace_pattern counts")
    whitespace_pattern: Wish | None = Field(
        None, description="white space between JSON's signs, as an expression; none: a blank or nothing behind a comma and a colon"
    )


class GenerationBody(Body):
    """What both endpoints take."""

    model: Text
    max_tokens: int | None = Field(None, ge=1, le=INT_MAX)
    max_completion_tokens: int | None = Field(None, ge=1, le=INT_MAX, description="wins over max_tokens, which it replaces")
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(None, ge=-1, le=INT_MAX, description="0 or -1: off")
    min_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    min_tokens: int | None = Field(None, ge=0, le=INT_MAX, description="no end token and no stop string counts in front of that many")
    logit_bias: LogitBias | None = Field(None, description="added to the logits of tokens, by id")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False, description="for each time that the answer has a token")
    presence_penalty: float | None = Field(None, ge=-2, le=2, allow_inf_nan=False, description="for a token that the answer has")
    repetition_penalty: float | None = Field(None, ge=0.01, le=100, allow_inf_nan=False, description="over prompt and answer; 1: off")
    ignore_eos: bool | None = Field(None, description="true: the model's end tokens do not end the answer")
    stop_token_ids: list[TokenId] | None = Field(None, max_length=64, description="end the answer, beside the model's own")
    include_stop_str_in_output: bool | None = Field(None, description="true: what ended the answer is part of it, if it has a text")
    priority: int | None = Field(None, ge=-INT_MAX - 1, le=INT_MAX, description="a lower one is served earlier; equal ones as they come")
    cache_salt: Annotated[Text, Field(min_length=1, max_length=1024)] | None = Field(
        None, description="a secret: the prompt is cached for requests with the same one alone; none: for all that have none"
    )
    seed: int | None = Field(None, ge=-(2**63), lt=2**64, description="every prompt of the request uses it; none: each has a random one")
    stop: Stops | None = None
    n: int | None = Field(None, ge=1, le=128)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: JsonSchema | Wish | None = None
    guided_regex: Wish | None = None
    guided_choice: Choices | None = None
    guided_grammar: Wish | None = None
    guided_whitespace_pattern: Wish | None = None
    json_schema: JsonSchema | Wish | None = None
    regex: Wish | None = None
    grammar: Text | None = Field(None, max_length=2**17)
    ebnf: Wish | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    speculation: Speculation | None = None


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content | None = Field(None, description="may be left out by an assistant that called tools")
    name: Text | None = None
    reasoning_content: Text | None = Field(None, description="what the assistant thought; for the chat template")
    refusal: Text | None = Field(None, description="stands for a content that is not there")
    tool_calls: list[CalledTool] | None = Field(None, max_length=MAX_TOOLS, description="of the assistant")
    tool_call_id: Text | None = Field(None, description="which call a tool's message answers")


class Prediction(Body):
    """What the client expects the answer to be."""

    type: Literal["content"]
    content: Content


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    prediction: Prediction | None = Field(None, description="drafted as long as the answer follows it; it changes the speed, never the law")

    add_generation_prompt: bool | None = Field(None, description="false: the prompt ends with the last message's end")
    continue_final_message: bool | None = Field(
        None, description="true: the answer writes the last message on, which must be the assistant's"
    )
    reasoning_effort: str | None = Field(
        None, max_length=32, description="handed to the model's chat template, where that asks for it; none: without thinking"
    )
    chat_template_kwargs: Variables | None = Field(None, max_length=64, description="further variables for the model's chat template")
    logprobs: bool | None = Field(None, description="true: say of each token how likely the target itself found it")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="and of so many others; wants logprobs")
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS, description="functions that the model may call")
    tool_choice: ToolChoice | None = Field(None, description="whether it may, or must; none: auto, where there are tools")
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call in an answer")
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)


class CompletionBody(GenerationBody):
    """POST /v1/completions."""

    best_of: int | None = Field(
        None, ge=1, le=128, description="write so many answers and give the n likeliest, by the mean of log-probabilities"
    )
    echo: bool | None = Field(None, description="true: the prompt stands in front of its answer, its tokens in front of its logprobs")
    logprobs: int | None = Field(None, ge=0, le=20, description="say of each token, and of so many others, how likely the target finds it")
    max_tokens: int | None = Field(None, ge=0, le=INT_MAX, description="0: the prompt is run, and nothing written")
    prompt: Prompts
