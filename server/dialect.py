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
