"""How a model writes what is not plain text: calls of functions, and thinking. Found in its chat template, or said by the deployment."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import ConfigError
from server import reasoning
from server.reasoning import ReasoningFormat
from server.tools import formats
from server.tools.formats import ToolFormat


@dataclass(frozen=True)
class Dialect:
    """None where there is no such thing, or none that can be read."""

    tools: ToolFormat | None = None
    reasoning: ReasoningFormat | None = None


def dialect_of(template: str | None, tool_format: formats.FormatName = "auto", reasoning_format: reasoning.FormatName = "auto") -> Dialect:
    """The dialect of a model with this chat template. Raises ConfigError for a format that it would never write."""
    return Dialect(_tools(template, tool_format), _reasoning(template, reasoning_format))


def _tools(template: str | None, name: formats.FormatName) -> ToolFormat | None:
    if name == "none" or template is None:
        return None
    if not formats.has_place_for_tools(template):
        if name not in ("auto", formats.HERMES.name):
            raise ConfigError(
                f"server.tool_format: {name} - the model's chat template has no place for tools; it is told of them in the form "
                f"{formats.HERMES.name}, so this must be auto, {formats.HERMES.name} or none"
            )
        return formats.HERMES
    return formats.detected(template) if name == "auto" else formats.FORMATS[name]


def _reasoning(template: str | None, name: reasoning.FormatName) -> ReasoningFormat | None:
    if name == "none" or template is None:
        return None
    return reasoning.detected(template) if name == "auto" else reasoning.FORMATS[name]


def in_words(
    template: str | None, tool_format: formats.FormatName = "auto", reasoning_format: reasoning.FormatName = "auto"
) -> tuple[str, str]:
    """What the dialect's calls and thinking are, and who says so; for operators. Raises ConfigError as `dialect_of` does."""
    dialect = dialect_of(template, tool_format, reasoning_format)
    if template is None:
        return ("none: the model has no chat template",) * 2
    return _tools_in_words(dialect.tools, template, tool_format), _reasoning_in_words(dialect.reasoning, reasoning_format)


def _tools_in_words(form: ToolFormat | None, template: str, name: formats.FormatName) -> str:
    if name != "auto":
        return f"{name}, by server.tool_format"
    if form is None:
        return "none: the chat template writes calls in a form that is not known"
    if not formats.has_place_for_tools(template):
        return f"{form.name}, told in text: the chat template has no place for tools"
    return f"{form.name}, by the chat template"


def _reasoning_in_words(form: ReasoningFormat | None, name: reasoning.FormatName) -> str:
    if name != "auto":
        return f"{name}, by server.reasoning_format"
    return "none: the chat template marks none" if form is None else f"{form.name}, by the chat template"
