"""A chat's messages and tools as the model is to read them, and how its answer is to be read. Checks what fields say of each other.

Everything that is refused is an InvalidRequest whose `param` names the field.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from engine.errors import InvalidRequest
from server.body import check_shape
from server.deps import Serving
from server.dialect import Dialect
from server.openai.schema import ChatBody, ChatMessage
from server.openai.tool_schema import MAX_LEVELS, AllowedToolsChoice, CalledTool, Tool, ToolReference
from server.openai.values import walkable
from server.reading import Reading
from server.reasoning import Phase, phase_behind, phase_within
from server.template import OWN_VARIABLES, Turn
from server.tools.formats import Function, ToolFormat, ToolUse

_LONG_ARGUMENTS = 1 << 16  # characters of all calls; what is shorter is read in a few milliseconds, whatever it says
_LONGEST_MARK = 32  # tokens at the end of a prompt that are enough to hold one


@dataclass(frozen=True)
class Conversation:
    """What is rendered, and which functions the answer may call."""

    messages: list[dict[str, Any]]
    turn: Turn
    use: ToolUse | None  # None: no calls are looked for

    @property
    def parts(self) -> list[Any]:
        """All that holds texts of the client."""
        return [*self.messages, *self.turn.tools, self.turn.variables]


async def check_arguments(messages: Sequence[ChatMessage]) -> None:
    """JSON within JSON: the body's own bounds took it for text. Raises BodyTooComplex."""
    arguments = [call.function.arguments for message in messages for call in message.tool_calls or ()]
    if sum(map(len, arguments)) > _LONG_ARGUMENTS:
        await asyncio.to_thread(lambda: check_shape(b"[" + ",".join(filter(str.strip, arguments)).encode("utf-8", "replace") + b"]"))


def conversation_of(body: ChatBody, dialect: Dialect) -> Conversation:
    """Raises InvalidRequest."""
    use = tool_use_of(body, dialect)
    turn = _turn(body, tuple(map(_described, body.tools or ())) if use is not None else ())
    return Conversation(_messages(body.messages, dialect.tools), turn, use)


def reading_of(conversation: Conversation, serving: Serving, prompt: Sequence[int], is_eager: bool) -> Reading | None:
    """How answers behind this prompt are read; None where there is nothing but text in them."""
    use, reasoning = conversation.use, serving.dialect.reasoning
    tools = serving.dialect.tools if use is not None else None
    if tools is None and reasoning is None:
        return None
    marks = [*(tools.marks if tools else ()), *((reasoning.opening, reasoning.closing) if reasoning else ())]
    return Reading(
        reasoning=reasoning,
        phase=_phase(conversation, serving, prompt),
        tools=tools,
        names=use.names if use is not None else frozenset(),
        is_forced=use is not None and use.mode == "named",
        is_eager=is_eager,
        literals=serving.tokenizer.literals_of(marks),
    )


def _phase(conversation: Conversation, serving: Serving, prompt: Sequence[int]) -> Phase:
    reasoning, turn = serving.dialect.reasoning, conversation.turn
    if reasoning is None:
        return Phase.CONTENT
    if turn.continues_last:
        return phase_within(conversation.messages[-1]["content"], reasoning)
    if not turn.opens_answer:  # the last message may end like a mark
        return Phase.BEFORE
    return phase_behind(serving.tokenizer.text_of(prompt[-_LONGEST_MARK:]), reasoning)


def _turn(body: ChatBody, tools: tuple[dict[str, Any], ...]) -> Turn:
    """How the conversation is to be rendered. Raises InvalidRequest for wishes that exclude each other."""
    continues, opens = bool(body.continue_final_message), body.add_generation_prompt
    if continues and opens:
        raise InvalidRequest("continue_final_message and add_generation_prompt cannot both be true.", "continue_final_message")
    if continues and body.messages[-1].role != "assistant":
        raise InvalidRequest(
            f"Only a message of the assistant can be continued; the last one is the {body.messages[-1].role}'s.", "messages"
        )
    variables = body.chat_template_kwargs or {}
    if taken := sorted(OWN_VARIABLES & variables.keys()):
        raise InvalidRequest(f"{taken[0]} has a field of its own, or is not implemented.", f"chat_template_kwargs.{taken[0]}")
    return Turn(opens_answer=opens is not False, continues_last=continues, tools=tools, variables=_effort(body) | variables)


def _effort(body: ChatBody) -> dict[str, Any]:
    """What templates call a wish for more or less thinking. Nothing for one that is not there."""
    if body.reasoning_effort is None:
        return {}
    return {"reasoning_effort": body.reasoning_effort} | ({"enable_thinking": False} if body.reasoning_effort == "none" else {})


# ---------------------------------------------------------------------- tools
def tool_use_of(body: ChatBody, dialect: Dialect) -> ToolUse | None:
    """What the answer may call; None for nothing, and then the model is not told of any function, either. Raises InvalidRequest."""
    choice = body.tool_choice
    tools = {tool.function.name: _function(tool) for tool in body.tools or ()}
    if len(tools) < len(body.tools or ()):
        raise InvalidRequest("Two tools have the same name.", "tools")
    if not tools:
        if choice not in (None, "none", "auto"):
            raise InvalidRequest("tool_choice is only allowed when there are tools.", "tool_choice")
        return None
    if choice == "none":
        return None
    if dialect.tools is None:
        raise InvalidRequest("This deployment cannot read calls in the form that its model writes them; leave the tools out.", "tools")
    is_parallel = body.parallel_tool_calls is not False
    if isinstance(choice, ToolReference):
        return ToolUse((_named(choice.function.name, tools),), "named", is_parallel=False, is_narrowed=len(tools) > 1)
    if isinstance(choice, AllowedToolsChoice):
        names = dict.fromkeys(tool.function.name for tool in choice.allowed_tools.tools)
        allowed = tuple(_named(name, tools) for name in names)
        return ToolUse(allowed, choice.allowed_tools.mode, is_parallel, is_narrowed=len(allowed) < len(tools))
    return ToolUse(tuple(tools.values()), choice or "auto", is_parallel)


def _function(tool: Tool) -> Function:
    return Function(tool.function.name, tool.function.parameters or {}, bool(tool.function.strict))


def _named(name: str, tools: dict[str, Function]) -> Function:
    if name not in tools:
        raise InvalidRequest(f"tool_choice names {name}, which is none of the tools.", "tool_choice")
    return tools[name]


def _described(tool: Tool) -> dict[str, Any]:
    """A function as templates know it: what OpenAI's example has, and nothing that only servers read."""
    function = tool.function
    description = {} if function.description is None else {"description": function.description}
    parameters = function.parameters if function.parameters is not None else {"type": "object", "properties": {}}
    return {"type": "function", "function": {"name": function.name, **description, "parameters": parameters}}


# ---------------------------------------------------------------------- messages
def _messages(messages: Sequence[ChatMessage], form: ToolFormat | None) -> list[dict[str, Any]]:
    """As templates know them. Raises InvalidRequest."""
    called: set[str] = set()
    told = []
    for i, message in enumerate(messages):
        place = f"messages.{i}"
        _check_message(message, place, called)
        called |= {call.id for call in message.tool_calls or ()}
        told.append(_message(message, place, form))
    return told


def _check_message(message: ChatMessage, place: str, called: set[str]) -> None:
    if message.tool_calls and message.role != "assistant":
        raise InvalidRequest(f"{place}.tool_calls: only the assistant calls tools.", f"{place}.tool_calls")
    if message.content is None and not message.tool_calls and message.refusal is None:
        raise InvalidRequest(f"{place}.content: required.", f"{place}.content")
    if message.role == "tool":
        if message.tool_call_id is None:
            raise InvalidRequest(f"{place}.tool_call_id: required.", f"{place}.tool_call_id")
        if message.tool_call_id not in called:
            raise InvalidRequest(
                f"{place}.tool_call_id: a tool's message answers a call in the tool_calls of a message before it.", f"{place}.tool_call_id"
            )


def _message(message: ChatMessage, place: str, form: ToolFormat | None) -> dict[str, Any]:
    content = message.content if message.content is not None else message.refusal or ""
    told: dict[str, Any] = {"role": message.role, "content": content}
    for key in ("name", "reasoning_content"):
        if (value := getattr(message, key)) is not None:
            told[key] = value
    if message.tool_calls:
        told["tool_calls"] = [_call(call, f"{place}.tool_calls.{i}", form) for i, call in enumerate(message.tool_calls)]
    if message.tool_call_id is not None:
        told["tool_call_id"] = _id(message.tool_call_id, form)
    return told


def _call(call: CalledTool, place: str, form: ToolFormat | None) -> dict[str, Any]:
    arguments = _arguments(call.function.arguments, f"{place}.function.arguments")
    return {"id": _id(call.id, form), "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


def _arguments(text: str, place: str) -> dict[str, Any]:
    """Most templates want an object. Nothing at all stands for no arguments, as some clients write it."""
    try:
        arguments = json.loads(text) if text.strip() else {}
        if not isinstance(arguments, dict):
            raise ValueError("it is no object")
        walkable(arguments, MAX_LEVELS)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{place}: not the JSON object that a call's arguments are: {error}", place) from error
    return arguments


def _id(name: str, form: ToolFormat | None) -> str:
    """Some templates refuse ids that are not of the length that their models write; which one it is, nobody minds."""
    if form is None or form.id_length is None or (len(name) == form.id_length and name.isascii() and name.isalnum()):
        return name
    return sha256(name.encode()).hexdigest()[: form.id_length]
