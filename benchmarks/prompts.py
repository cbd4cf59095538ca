"""Where prompts come from: the built-in file, a file of the user, or random words. Refuses bad lines by file and number."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.errors import BenchmarkError

BUILT_IN = Path(__file__).with_name("prompts.jsonl")

Message = dict[str, str]  # role and content


@dataclass(frozen=True)
class Prompt:
    """One question. `text` is None for a conversation, which only a chat endpoint can take."""

    messages: tuple[Message, ...]
    text: str | None
    category: str | None = None
    id: int | str | None = None  # the file's question_id


def of_text(text: str, category: str | None = None, id: int | str | None = None) -> Prompt:
    """A text as one message of the user."""
    return Prompt(({"role": "user", "content": text},), text, category, id)


def read(path: Path, categories: Sequence[str] = ()) -> list[Prompt]:
    """The prompts of a file, those of `categories` alone if any are named. Raises BenchmarkError.

    A line is an object with `prompt` (a text), `messages` (a conversation) or `turns` (Spec-Bench: a list of texts, of which the first
    is asked), and perhaps with `category` and `question_id`. Empty lines are skipped.
    """
    try:
        lines = path.read_text("utf-8").splitlines()
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise BenchmarkError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}.") from error
    prompts = [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise BenchmarkError(f"{path} holds no prompts.")
    known = sorted({prompt.category for prompt in prompts if prompt.category is not None})
    if unknown := sorted(set(categories) - set(known)):
        raise BenchmarkError(f"{path} has no category {', '.join(unknown)}; it has {', '.join(known) or 'none'}.")
    return [prompt for prompt in prompts if not categories or prompt.category in categories]


def random_words(num_words: int, seed: int) -> Prompt:
    """Common words in random order; in most tokenizers each is one token. Two seeds share no beginning that a prefix cache could use."""
    draw = random.Random(str(seed))  # of a number it would drop the sign
    return of_text(" ".join([f"{draw.getrandbits(32):08x}", *draw.choices(WORDS, k=max(0, num_words - 1))]))


def shuffled(prompts: Sequence[Prompt], count: int, seed: int) -> list[Prompt]:
    """`count` prompts in an order that only the seed decides; all of them before any comes again."""
    draw, found = random.Random(seed), list[Prompt]()
    while len(found) < count:
        found += draw.sample(prompts, len(prompts))
    return found[:count]


def _parse(line: str, place: str) -> Prompt:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise BenchmarkError(f"{place}: not JSON ({error}).") from error
    if not isinstance(entry, dict):
        raise BenchmarkError(f"{place}: a line is a JSON object, not a {type(entry).__name__}.")
    kinds = [key for key in ("prompt", "messages", "turns") if key in entry]
    if len(kinds) != 1:
        raise BenchmarkError(f"{place}: needs exactly one of prompt, messages and turns; it has {', '.join(kinds) or 'none'}.")
    category, question_id = entry.get("category"), entry.get("question_id")
    if not isinstance(category, str | None):
        raise BenchmarkError(f"{place}: category is {category!r} and must be a text.")
    if kinds == ["messages"]:
        return Prompt(_conversation(entry["messages"], place), None, category, question_id)
    text = entry["prompt"] if kinds == ["prompt"] else _first_turn(entry["turns"])
    if not isinstance(text, str) or not text:
        raise BenchmarkError(f"{place}: {kinds[0]} must be {'a text' if kinds == ['prompt'] else 'a list of texts'} that is not empty.")
    return of_text(text, category, question_id)


def _first_turn(turns: Any) -> Any:
    return turns[0] if isinstance(turns, list) and turns else None


def _conversation(messages: Any, place: str) -> tuple[Message, ...]:
    if not isinstance(messages, list) or not messages or not all(_is_message(message) for message in messages):
        raise BenchmarkError(f"{place}: messages must be a list of objects with role and content, both texts.")
    return tuple({"role": message["role"], "content": message["content"]} for message in messages)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


_COMMON = """
time year people way day man thing woman life child world school state family student group country problem hand part place case
week company system program question work government number night point home water room mother area money story fact month lot
right study book eye job word business issue side kind head house service friend father power hour game line end member law car
city community name president team minute idea body information back parent face others level office door health person art war
history party result change morning reason research girl guy moment air teacher force education foot boy age policy music market
sense nation plan college interest death experience effect use class control field development role effort rate heart drug show
leader light voice wife whole police mind
"""
WORDS = _COMMON.split()
