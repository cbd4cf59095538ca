"""`cascade train distil`: reads a recipe, turns its prompts into token ids, and shows how far the work is. What is done is engine.train's.

Text stays here: the template's words around a question, and prompt files. Torch is loaded only once all of that is in order.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from engine.errors import ConfigError, InvalidRequest
from engine.train.config import DistilConfig, FileSource
from server.settings import read_yaml, validated
from server.template import Message
from server.text import TextTokenizer

EXAMPLE = "configs/train/smollm2-135m-drafter.yaml"


def load_recipe(path: Path) -> DistilConfig:
    """The recipe in a file. Raises ConfigError with one line for each mistake."""
    return validated(DistilConfig, read_yaml(path, "a recipe", EXAMPLE), path)


@dataclass(frozen=True)
class Parts:
    """Which parts of the work are wanted."""

    is_data_only: bool = False
    is_export_only: bool = False


def run(path: Path, parts: Parts, console: Console, say: Callable[[str], None]) -> None:
    """Make data, train and export, as far as that is not done. Raises ConfigError and its kin."""
    config = load_recipe(path)
    contents = {source.name: _read_file(source) for source in config.data.sources if isinstance(source, FileSource)}
    from engine.train.data import Material, PromptFile, Turns  # torch and transformers take seconds
    from engine.train.run import Watch, distil, make_data, target_folder

    folder = target_folder(config, Watch(say))
    tokenizer = TextTokenizer.from_folder(folder)
    around = turns_of(tokenizer)
    files = {name: PromptFile(_encoded(content.prompts, tokenizer, name), content.digest) for name, content in contents.items()}
    material = Material(Turns(*around) if around else None, files)
    with _Bars(console, say).shown() as bars:
        shards = make_data(config, material, Watch(say, on_data=lambda made: bars.data(made.num_tokens, made.num_tokens_now, config)))
    say(f"The data is there: {len(shards)} shards in {config.data.folder}")
    if parts.is_data_only:
        return
    command = f"cascade train distil {path.name if path.is_absolute() else path}"
    with _Bars(console, say).shown() as bars:
        watch = Watch(say, on_states=bars.states, on_report=bars.report)
        output = distil(config, material, shards, command, watch, parts.is_export_only)
    say(f"The drafter is in {output}; its README.md says how good it is")


# ---------------------------------------------------------------------- prompts
@dataclass(frozen=True)
class Prompts:
    """A prompt file, read."""

    prompts: list[list[Message]]
    digest: str  # SHA-256 of its bytes


def _read_file(source: FileSource) -> Prompts:
    path = Path(source.path)
    try:
        content = path.read_bytes()
        lines = content.decode("utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"data.sources: {source.name!r} - {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"data.sources: {source.name!r} - {path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    prompts = [prompt for number, line in enumerate(lines, 1) if line.strip() for prompt in prompts_of(line, f"{path}, line {number}")]
    if not prompts:
        raise ConfigError(f"data.sources: {source.name!r} - {path} holds no prompts.")
    return Prompts(prompts, hashlib.sha256(content).hexdigest())


def prompts_of(line: str, place: str) -> list[list[Message]]:
    """The conversations of one line of a prompt file. `place` names it in messages. Raises ConfigError.

    A line is an object with `messages` (a conversation that ends with the user), `prompt` or `question` (a text), `turns` (a list of
    texts, of which the first is asked), or `instruction` with `input`, or with `instances` of which each has an `input`.
    """
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{place}: not JSON ({error}).") from error
    if not isinstance(entry, dict):
        raise ConfigError(f"{place}: a line is a JSON object, not a {type(entry).__name__}.")
    if isinstance(messages := entry.get("messages"), list):
        if not messages or not all(map(_is_message, messages)):
            raise ConfigError(f"{place}: messages must be a list of objects with role and content, both texts.")
        return [[{"role": message["role"], "content": message["content"]} for message in messages]]
    texts = [text for text in _texts(entry) if isinstance(text, str) and text.strip()]
    if not texts:
        raise ConfigError(f"{place}: needs one of prompt, question, turns, messages and instruction, with a text that is not empty.")
    return [[{"role": "user", "content": text}] for text in texts]


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _texts(entry: dict[str, Any]) -> list[Any]:
    for key in ("prompt", "question"):
        if key in entry:
            return [entry[key]]
    if isinstance(turns := entry.get("turns"), list):
        return list(turns[:1])
    instances = entry.get("instances")
    inputs = [i.get("input") for i in instances if isinstance(i, dict)] if isinstance(instances, list) else [entry.get("input")]
    if "instruction" not in entry:
        return []
    return list(dict.fromkeys(f"{entry['instruction']}\n\n{text}" if text else entry["instruction"] for text in inputs))


def turns_of(tokenizer: TextTokenizer) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """What the chat template puts before a first question, and between it and the answer; None without a template.

    Two questions that have nothing in common are rendered: what is the same at both ends is the template's. Raises ConfigError where
    nothing is.
    """
    if not tokenizer.has_chat_template:
        return None
    one, other = (tokenizer.encode_chat([{"role": "user", "content": text}]) for text in ("x", "7"))
    before = _common(one, other)
    behind = _common(one[:before:-1], other[:before:-1])
    if not before or not behind:
        raise ConfigError("target: its chat template puts nothing around a question, so the target cannot ask itself; name prompt files.")
    return tuple(one[:before]), tuple(one[-behind:])


def _common(one: list[int], other: list[int]) -> int:
    """Leading ids that two lists share."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _encoded(prompts: list[list[Message]], tokenizer: TextTokenizer, name: str) -> tuple[tuple[int, ...], ...]:
    """Under the template where there is one; else a prompt is its last text, as it stands."""
    try:
        if tokenizer.has_chat_template:
            return tuple(tuple(tokenizer.encode_chat(messages)) for messages in prompts)
        return tuple(tuple(tokenizer.encode(messages[-1]["content"])) for messages in prompts)
    except InvalidRequest as error:
        raise ConfigError(f"data.sources: {name!r} - {error}") from error


# ---------------------------------------------------------------------- what is shown
LINE_SECONDS = 60.0  # how often a run without a terminal says how far it is


@dataclass
class _Bars:
    """One bar at a time on a terminal; elsewhere a line now and then."""

    console: Console
    say: Callable[[str], None]
    _progress: Progress | None = None
    _task: TaskID | None = None
    _began: float = field(default_factory=time.monotonic)
    _said: float = field(default_factory=time.monotonic)
    _first_tokens: int | None = None

    @contextmanager
    def shown(self) -> Iterator[_Bars]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as self._progress:
            self._task = self._progress.add_task("", total=1.0, note="", visible=False)
            yield self

    def data(self, num_tokens: int, num_now: int, config: DistilConfig) -> None:
        """Shards count when they are whole; the rate is that of all that is written, questions included."""
        rate = num_now / max(time.monotonic() - self._began, 1e-9)
        total = config.data.num_tokens
        self._show("Data", num_tokens / total, f"{num_tokens:,} of {total:,} tokens of answers, {rate:,.0f} tokens/s")

    def states(self, done: int, total: int) -> None:
        self._show("States", done / total, f"{done} of {total} shards")

    def report(self, report: Any) -> None:
        """An engine.train.distil.Report."""
        position = report.position
        if self._first_tokens is None:
            self._first_tokens, self._began = position.tokens, time.monotonic()
        rate = (position.tokens - self._first_tokens) / max(time.monotonic() - self._began, 1e-9)
        note = f"step {position.step:,}, {position.tokens:,} tokens, {rate:,.0f} tokens/s, loss {report.loss:.3f}"
        self._show("Training", report.progress, note)
        if report.scores:
            self.console.print(_table(position.step, report.scores))

    def _show(self, what: str, share: float, note: str) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=what, completed=min(share, 1.0), note=note, visible=True)
        now = time.monotonic()
        if not self.console.is_terminal and now - self._said >= LINE_SECONDS:
            self._said = now
            self.say(f"{what}: {100 * share:.1f} %, {note}")


def _table(step: int, scores: dict[str, Any]) -> Table:
    """How good the drafter is by source."""
    table = Table(title=f"Validation at step {step:,}", title_justify="left")
    for name in ("prompts", "tokens", "accepted at temperature 1", "at temperature 0", "loss"):
        table.add_column(name, justify="left" if name == "prompts" else "right")
    for name, score in scores.items():
        table.add_row(name, f"{score.num_tokens:,}", f"{score.acceptance:.3f}", f"{score.agreement:.3f}", f"{score.loss:.3f}")
    return table
