"""A model's chat template: messages in, one text out. Runs in jinja's sandbox, since a template is foreign code."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from engine.errors import InvalidRequest, SourceError
from server.tools.describe import as_text
from server.tools.formats import has_place_for_tools

Message = Mapping[str, Any]  # role and content; of the assistant also tool_calls and reasoning_content, of a tool tool_call_id; a name

OWN_VARIABLES = frozenset(
    {"messages", "add_generation_prompt", "continue_final_message", "tools", "documents", "chat_template", "tokenize"}
)


@dataclass(frozen=True)
class Turn:
    """How a conversation is to be rendered, beside its messages."""

    opens_answer: bool = True  # the text ends where the assistant is to begin
    continues_last: bool = False  # it ends with the last message instead, which is to be written on
    tools: tuple[Mapping[str, Any], ...] = ()  # functions that the model may call, as OpenAI describes them
    variables: Mapping[str, Any] = field(default_factory=dict)  # further ones, for the template


DEFAULT_TURN = Turn()


class ChatTemplate:
    """A model's jinja template, compiled in the sandbox."""

    def __init__(self, source: str, variables: dict[str, str] | None = None):
        """`variables` are bos_token and its kin. Raises SourceError for a template that cannot be parsed."""
        self.source = source
        self._variables = variables or {}
        self._knows_tools = has_place_for_tools(source)  # otherwise all about them is handed over as text
        self.knows_developer = "developer" in source  # otherwise the role is handed over as "system"
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise SourceError(f"The model's chat template cannot be parsed: {error}") from error

    @classmethod
    def from_folder(cls, path: Path) -> ChatTemplate | None:
        """The template of a folder in the transformers format; None if it has none."""
        config_path, template_path = path / "tokenizer_config.json", path / "chat_template.jinja"
        config: dict[str, Any] = json.loads(config_path.read_text("utf-8")) if config_path.exists() else {}
        source = template_path.read_text("utf-8") if template_path.exists() else _default_template(config.get("chat_template"))
        if source is None:
            return None
        tokens = {key: value["content"] if isinstance(value, dict) else value for key, value in config.items() if key.endswith("_token")}
        return cls(source, {key: value for key, value in tokens.items() if isinstance(value, str)})

    def render(self, messages: Sequence[Message], turn: Turn = DEFAULT_TURN) -> str:
        """The prompt as text. Raises InvalidRequest if the template refuses the messages."""
        if not turn.continues_last:
            return self._rendered(messages, turn)
        if "tool_calls" in messages[-1]:
            raise InvalidRequest("A message that calls functions cannot be continued.", "messages")
        end = f"\ue000{secrets.token_hex(8)}\ue001"  # marks where the last message ends, whatever the template puts behind it
        rendered = self._rendered([*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + end}], turn)
        if end not in rendered:
            raise InvalidRequest("The model's chat template does not show the last message, so it cannot be continued.", "messages")
        return rendered[: rendered.rindex(end)]  # a template may show it twice

    def _rendered(self, messages: Sequence[Message], turn: Turn) -> str:
        if not self._knows_tools:
            messages = as_text(messages, turn.tools)
        try:
            return self._template.render(
                **{
                    **self._variables,
                    **turn.variables,
                    "messages": [self._with_known_role(message) for message in messages],
                    "add_generation_prompt": turn.opens_answer and not turn.continues_last,
                    "tools": list(turn.tools) if turn.tools and self._knows_tools else None,
                    "documents": None,
                }
            )
        except Exception as error:  # a template is foreign code; whatever it raises is about these messages
            raise InvalidRequest(f"The model's chat template refuses these messages: {error}", "messages") from error

    def _with_known_role(self, message: Message) -> Message:
        if message["role"] == "developer" and not self.knows_developer:
            return {**message, "role": "system"}
        return message


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; for a prompt it is transparent."""

    tags = {"generation"}  # noqa: RUF012  # declared so by jinja2

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationBlock])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)  # noqa: DTZ005  # templates want local time
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    """jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _default_template(entry: Any) -> str | None:
    """tokenizer_config.json holds one template, or a list of named ones."""
    if isinstance(entry, list):
        named = {item["name"]: item["template"] for item in entry}
        return named.get("default") or next(iter(named.values()), None)
    return entry if isinstance(entry, str) else None
