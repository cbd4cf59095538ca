"""What is asked, and how an answer is judged where a task has right ones: chat, GSM8K, HumanEval. Reads files; runs no model.

Refuses bad lines by file and number.
"""

from __future__ import annotations

import gzip
import random
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TypeVar

import msgspec

from benchmarks import prompts as prompt_files
from benchmarks.errors import BenchmarkError
from benchmarks.evaluate import sandbox
from benchmarks.prompts import BUILT_IN, Message

T = TypeVar("T")

PASSED = "passed"  # the verdict that counts


@dataclass(frozen=True)
class Item:
    """One question. `judge` takes the answer's text and gives a verdict; None where no answer is right or wrong."""

    name: str  # one of a kind within its file
    messages: tuple[Message, ...]
    bare: str  # for a model without a chat template
    category: str | None = None
    judge: Callable[[str], str] | None = None


@dataclass(frozen=True)
class Task:
    """What one `--task` is."""

    name: str
    max_tokens: int  # of an answer, unless the command line says otherwise
    num_items: int | None  # asked unless the command line says otherwise; None: all
    read: Callable[[Path | None], list[Item]]
    judged_by: str | None = None  # what `passed` means


class _Sum(msgspec.Struct):
    """A line of GSM8K."""

    question: str
    answer: str


class Problem(msgspec.Struct):
    """A line of HumanEval."""

    task_id: str
    prompt: str
    entry_point: str
    test: str


# ---------------------------------------------------------------------- chat
def read_chat(path: Path | None) -> list[Item]:
    """The built-in prompts, or a file as `cascade bench --prompts` reads it."""
    found = prompt_files.read(path or BUILT_IN)
    return [
        Item(str(i if prompt.id is None else prompt.id), prompt.messages, prompt.messages[-1]["content"], prompt.category)
        for i, prompt in enumerate(found)
    ]


# ---------------------------------------------------------------------- GSM8K
HOW_TO_ANSWER = 'Think step by step. End with a line "#### " and the number.'
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def read_gsm8k(path: Path | None) -> list[Item]:
    """Lines with question and answer, the number behind "####"."""
    items = []
    for i, line in enumerate(_lines(_required(path, "gsm8k", "JSON lines with question and answer"), _Sum)):
        right = number_in(line.answer)
        if "####" not in line.answer or right is None:
            raise BenchmarkError(f"{path}, line {i + 1}: the answer has no number behind ####.")
        messages = ({"role": "user", "content": f"{line.question}\n\n{HOW_TO_ANSWER}"},)
        items.append(Item(str(i), messages, f"Question: {line.question}\n{HOW_TO_ANSWER}\nAnswer:", judge=_says(right)))
    return items


def number_in(text: str) -> Decimal | None:
    """The number behind the last "####"; where there is none, the last number of the text."""
    _, mark, behind = text.rpartition("####")
    numbers: list[str] = _NUMBER.findall(behind)
    if not numbers:
        return None
    try:
        return Decimal((numbers[0] if mark else numbers[-1]).replace(",", ""))
    except InvalidOperation:
        return None


def _says(right: Decimal) -> Callable[[str], str]:
    return lambda text: PASSED if number_in(text) == right else "failed"


# ---------------------------------------------------------------------- HumanEval
_FENCED = re.compile(r"```[^\n]*\n(.*?)(?:```|\Z)", re.DOTALL)


def read_humaneval(path: Path | None) -> list[Item]:
    """Problems with task_id, prompt, entry_point and test; answers are run in the sandbox."""
    problems = _lines(_required(path, "humaneval", "JSON lines with task_id, prompt, entry_point and test"), Problem)
    return [Item(problem.task_id, (_request_for(problem),), problem.prompt, judge=_passes(problem)) for problem in problems]


def program_of(problem: Problem, text: str) -> str:
    """What is run: the answer's first block of code, or all of it; as the whole function, or as the rest of the one that was begun."""
    fenced = _FENCED.search(text)
    code = fenced[1] if fenced else text
    if re.search(rf"^def {re.escape(problem.entry_point)}\b", code, re.MULTILINE):
        head = problem.prompt[: problem.prompt.rindex(f"def {problem.entry_point}")]  # imports and helpers
        solution = f"{head}\n{code}"
    else:
        solution = problem.prompt + _indented(code)
    return f"{solution}\n\n{problem.test}\n\ncheck({problem.entry_point})\n"


def _indented(code: str) -> str:
    """The lines that still belong to the function: up to the first one that begins at the margin."""
    kept = list[str]()
    for line in code.splitlines():
        if line and not line[0].isspace() and kept:
            break
        kept.append(line)
    return "\n".join(kept)


def _request_for(problem: Problem) -> Message:
    return {"role": "user", "content": f"Complete this Python function. Answer with the whole function.\n\n```python\n{problem.prompt}```"}


def _passes(problem: Problem) -> Callable[[str], str]:
    return lambda text: sandbox.run(program_of(problem, text)).verdict


# ---------------------------------------------------------------------- choosing and reading
TASKS: Mapping[str, Task] = {
    "chat": Task("chat", 128, None, read_chat),
    "gsm8k": Task("gsm8k", 256, 100, read_gsm8k, "exact match"),
    "humaneval": Task("humaneval", 384, None, read_humaneval, "tests passed"),
}


def sample(items: list[Item], count: int | None, seed: int) -> list[Item]:
    """`count` different ones in an order that only the seed decides; None takes all. Raises BenchmarkError where there are too few.

    Never one twice: intervals are over prompts, and the same one again would be no news.
    """
    if len({item.name for item in items}) < len(items):
        raise BenchmarkError("Two prompts have the same question_id or task_id; give each its own.")
    if count is not None and count > len(items):
        raise BenchmarkError(f"--num-prompts {count}: there are {len(items)}, and none is asked twice.")
    return random.Random(seed).sample(items, len(items) if count is None else count)


def of_categories(items: list[Item], categories: str | None) -> list[Item]:
    """Those of a list such as "math,chat"; None takes all. Raises BenchmarkError for a category that no item has."""
    wanted = [part.strip() for part in (categories or "").split(",") if part.strip()]
    known = sorted({item.category for item in items if item.category is not None})
    if unknown := [name for name in wanted if name not in known]:
        raise BenchmarkError(f"--category {unknown[0]}: no prompt has it; there are {', '.join(known) or 'none'}.")
    return [item for item in items if not wanted or item.category in wanted]


def _required(path: Path | None, task: str, what: str) -> Path:
    if path is None:
        raise BenchmarkError(f"--task {task} needs --data FILE: {what}.")
    return path


def _lines(path: Path, kind: type[T]) -> list[T]:
    """The lines of a JSONL file, .gz or not."""
    try:
        content = path.read_bytes()
        lines = (gzip.decompress(content) if path.suffix == ".gz" else content).splitlines()
    except (OSError, EOFError, zlib.error) as error:
        raise BenchmarkError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    found = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(msgspec.json.decode(line, type=kind))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise BenchmarkError(f"{path}, line {number}: {error}.") from error
    if not found:
        raise BenchmarkError(f"{path} holds no lines.")
    return found
