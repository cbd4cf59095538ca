"""What benchmarks have in common on the command line, and what follows from it: prompts, load, fields of a request. Runs nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks import prompts as prompt_files
from benchmarks.body import BodyMaker, Endpoint
from benchmarks.errors import BenchmarkError
from benchmarks.load import Load, closed_loop, open_loop
from benchmarks.prompts import Prompt

Prompts = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="JSON lines with prompt, messages or turns (the first is asked). Default: 24 built-in prompts."),
]
Category = Annotated[str | None, typer.Option(metavar="A,B", help="Only prompts of these categories.")]
RandomInputLen = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Instead of a file: prompts of N random words, about a token each.")
]
NumRequests = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Default: as many as there are prompts. With more than that, prompts come again.")
]
MaxTokens = Annotated[int, typer.Option(metavar="N", min=1, help="Longest answer.")]
Temperature = Annotated[float, typer.Option(metavar="T", min=0, max=2)]
Seed = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Fixes arrival times, order and random prompts (0 does without it), and is sent: request i gets seed N + i.",
    ),
]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Send ignore_eos, which vLLM and SGLang know: answers of full length.")]
Speculation = Annotated[str | None, typer.Option(metavar="JSON", help="Send as `speculation`, such as '{\"enabled\": false}'.")]
EndpointName = Annotated[Endpoint, typer.Option("--endpoint", help="chat, or completions (no template).")]
Warmup = Annotated[int, typer.Option(metavar="N", min=0, help="Requests before the measured ones; the first shows whether it works.")]
Output = Annotated[Path | None, typer.Option(metavar="FILE", help="Write the result there as JSON, with a record of every request.")]
Timeout = Annotated[float, typer.Option(metavar="SECONDS", min=0.001, help="Longest silence of a server within a request.")]


@dataclass(frozen=True)
class PromptOptions:
    """Which prompts are asked, and how many."""

    file: Path | None = None
    category: str | None = None
    random_input_len: int | None = None
    num_requests: int | None = None
    seed: int | None = None

    def choose(self) -> list[Prompt]:
        """The prompts of a run, one a request. Raises BenchmarkError."""
        seed = self.seed or 0
        if self.random_input_len is not None:
            if self.file is not None or self.category is not None:
                raise BenchmarkError("--random-input-len makes its own prompts; leave out --prompts and --category.")
            count = 24 if self.num_requests is None else self.num_requests
            return [prompt_files.random_words(self.random_input_len, seed * 1_000_003 + i) for i in range(count)]
        categories = [part.strip() for part in (self.category or "").split(",") if part.strip()]
        found = prompt_files.read(self.file or prompt_files.BUILT_IN, categories)
        return prompt_files.shuffled(found, len(found) if self.num_requests is None else self.num_requests, seed)


@dataclass(frozen=True)
class LoadOptions:
    """When requests are sent."""

    concurrency: int | None = None
    request_rate: float | None = None
    max_concurrency: int | None = None
    seed: int | None = None

    @property
    def is_open(self) -> bool:
        return self.request_rate is not None

    def plan(self, num_requests: int) -> Load:
        """Raises BenchmarkError for options of both loops."""
        if self.request_rate is None:
            if self.max_concurrency is not None:
                raise BenchmarkError("--max-concurrency bounds an open loop (--request-rate); a closed loop has --concurrency.")
            return closed_loop(num_requests, self.concurrency or 1)
        if self.concurrency is not None:
            raise BenchmarkError("--concurrency is a closed loop and --request-rate an open one; choose one (and --max-concurrency).")
        return open_loop(num_requests, self.request_rate, self.seed or 0, self.max_concurrency)


def extra_fields(ignore_eos: bool, speculation: str | None) -> Mapping[str, Any]:
    """Fields that not every server knows; they are sent only when they were asked for. Raises BenchmarkError."""
    fields: dict[str, Any] = {"ignore_eos": True} if ignore_eos else {}
    if speculation is not None:
        try:
            value = json.loads(speculation)
        except ValueError as error:
            raise BenchmarkError(f"--speculation {speculation}: not JSON ({error}).") from error
        if not isinstance(value, dict):
            raise BenchmarkError(f"--speculation {speculation}: write a JSON object such as '{{\"enabled\": false}}'.")
        fields["speculation"] = value
    return fields


def require_askable(maker: BodyMaker, prompts: list[Prompt]) -> None:
    """Raise BenchmarkError now for a prompt that the endpoint cannot take."""
    for number, prompt in enumerate(prompts):
        maker.body(prompt, number)
