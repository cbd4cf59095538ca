"""The body of one request, the same for a server and for an engine in this process. Knows fields, not transports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.errors import BenchmarkError
from benchmarks.prompts import Prompt

Endpoint = Literal["chat", "completions"]


@dataclass(frozen=True)
class BodyMaker:
    """What all requests of a load have in common."""

    model: str
    endpoint: Endpoint = "chat"
    max_tokens: int = 128
    temperature: float = 0.0
    seed: int | None = None  # of the first request; the next has the next number
    extra: Mapping[str, Any] = field(default_factory=dict)  # fields that not every server knows

    def body(self, prompt: Prompt, number: int) -> dict[str, Any]:
        """A streamed request that asks for usage. Raises BenchmarkError for a conversation that the endpoint cannot take."""
        common = {
            "model": self.model,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({} if self.seed is None else {"seed": self.seed + number}),
            **self.extra,
        }
        if self.endpoint == "chat":
            return common | {"messages": list(prompt.messages)}
        if prompt.text is None:
            raise BenchmarkError("A conversation (messages) needs the chat endpoint; leave out --endpoint completions.")
        return common | {"prompt": prompt.text}
