"""Tools for models whose chat template has no place for them: everything about them becomes text of ordinary messages, in the Hermes form.

Functions are described in the system message; earlier calls stand in the assistant's messages, and their results in the user's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from server.tools.formats import HERMES

Message = Mapping[str, Any]

_DESCRIPTION = """# Tools

You may call one or more of these functions to help with the request. Each line is a function as JSON:

<tools>
{tools}
</tools>

To call a function, write its name and its arguments as one JSON object between marks, and nothing else on these lines:

{opening}
{{"name": "function name", "arguments": {{"argument": "value"}}}}
{closing}

The result of a call comes as a message between <tool_response> and </tool_response>. Answer in plain text where no function is needed."""


def as_text(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation without tools, calls and results as such. Results that follow each other are one message."""
    told: list[dict[str, Any]] = []
    for i, message in enumerate(messages):
        if message["role"] != "tool":
            told.append(_with_calls_as_text(message))
        elif i and messages[i - 1]["role"] == "tool":
            told[-1]["content"] += "\n" + _result(message)
        else:
            told.append({"role": "user", "content": _result(message)})
    return _described(told, tools) if tools else told


def _described(messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """With the functions in the system message, which may have to be made."""
    lines = "\n".join(map(_json, tools))
    description = _DESCRIPTION.format(tools=lines, opening=HERMES.opening, closing=HERMES.closing)
    if messages[0]["role"] not in ("system", "developer"):
        return [{"role": "system", "content": description}, *messages]
    first = messages[0]
    return [{**first, "content": f"{first['content']}\n\n{description}"}, *messages[1:]]


def _with_calls_as_text(message: Message) -> dict[str, Any]:
    calls = [call["function"] for call in message.get("tool_calls", ())]
    texts = [f"{HERMES.opening}\n{_json({key: call[key] for key in ('name', 'arguments')})}\n{HERMES.closing}" for call in calls]
    content = [message["content"]] if message["content"] or not texts else []
    plain = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**plain, "content": "\n".join([*content, *texts])}


def _result(message: Message) -> str:
    return f"<tool_response>\n{message['content']}\n</tool_response>"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
