"""What is asked, and how answers are judged."""

from __future__ import annotations

import gzip
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from benchmarks.errors import BenchmarkError
from benchmarks.evaluate.tasks import TASKS, Problem, number_in, of_categories, program_of, sample

HEAD = "import math\n\n\ndef half(x):\n    return x / 2\n\n\n"
PROBLEM = Problem("T/0", HEAD + 'def add(a, b):\n    """Add."""\n', "add", "def check(candidate):\n    assert candidate(1, 2) == 3\n")


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So 3 + 4 = 7.\n#### 7", 7),
        ("#### 5\nno:\n#### 1,234 apples, 9", 1234),
        ("She has $1,200.50.", Decimal("1200.5")),
        ("first 3, then -4.", -4),
        ("#### 18.0", 18),
        ("####", None),
        ("none", None),
    ],
)
def test_number_in(text: str, number: int | Decimal | None) -> None:
    assert number_in(text) == number


def write(path: Path, *lines: dict[str, Any]) -> Path:
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def test_gsm8k_is_judged_by_its_number(tmp_path: Path) -> None:
    file = write(tmp_path / "sums.jsonl", {"question": "1 + 1?", "answer": "<<1+1=2>>2\n#### 2"})
    (item,) = TASKS["gsm8k"].read(file)
    assert item.judge is not None
    assert [item.judge(text) for text in ("It is 2.", "#### 2.0", "It is 3.", "")] == ["passed", "passed", "failed", "failed"]
    assert "1 + 1?" in item.messages[0]["content"]


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ("    return a + b\n", True),
        ("    return a + b\n\n\nprint(1 / 0)\n", True),  # what follows the function is not run
        ("```python\ndef add(a, b):\n    return a + b\n```\nThis adds.", True),
        ("Sure!\n```\ndef add(a, b):\n    return int(2 * half(a + b))\n```", True),  # helpers of the problem are there
        ("```python\ndef add(a, b):\n    return a + b", True),  # cut off by max_tokens
        ("def add(a, b):\n    return a - b\n", False),
        ("I cannot.", False),
    ],
)
def test_a_program_is_the_whole_function_or_the_rest_of_it(answer: str, is_right: bool) -> None:
    try:
        exec(program_of(PROBLEM, answer), {})  # of this file alone
    except (AssertionError, SyntaxError):
        assert not is_right
    else:
        assert is_right


def test_humaneval_is_judged_in_the_sandbox(tmp_path: Path) -> None:
    file = write(tmp_path / "problems.jsonl.gz", {"task_id": "T/0", "prompt": PROBLEM.prompt, "entry_point": "add", "test": PROBLEM.test})
    (item,) = TASKS["humaneval"].read(file)
    assert item.judge is not None
    assert item.judge("    return a + b") == "passed"
    assert item.judge("    import os; os._exit(0)") == "failed"
    assert item.bare == PROBLEM.prompt


@pytest.mark.parametrize(
    ("task", "line", "message"),
    [
        ("gsm8k", {"question": "1?"}, r"line 1: .*answer"),
        ("gsm8k", {"question": "1?", "answer": "2"}, "line 1: the answer has no number behind ####"),
        ("humaneval", {"task_id": "a"}, r"line 1: .*prompt"),
    ],
)
def test_bad_lines_are_named(task: str, line: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=message):
        TASKS[task].read(write(tmp_path / "bad.jsonl", line))


def test_files_that_are_not_there_or_not_gzip_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="gsm8k needs --data FILE"):
        TASKS["gsm8k"].read(None)
    with pytest.raises(BenchmarkError, match="cannot be read: No such file"):
        TASKS["gsm8k"].read(tmp_path / "absent.jsonl")
    (tmp_path / "plain.gz").write_text("{}")
    with pytest.raises(BenchmarkError, match="cannot be read: Not a gzipped file"):
        TASKS["humaneval"].read(tmp_path / "plain.gz")


def test_no_prompt_is_asked_twice() -> None:
    items = TASKS["chat"].read(None)
    assert len({item.name for item in sample(items, None, 0)}) == len(items) == 24
    assert sample(items, 5, 1) == sample(items, 5, 1) != sample(items, 5, 2)
    with pytest.raises(BenchmarkError, match="--num-prompts 25: there are 24"):
        sample(items, 25, 0)
    with pytest.raises(BenchmarkError, match="same question_id"):
        sample([items[0], items[0]], None, 0)


def test_categories() -> None:
    items = TASKS["chat"].read(None)
    assert {item.category for item in of_categories(items, "coding, chat")} == {"coding", "chat"}
    with pytest.raises(BenchmarkError, match="--category sports: no prompt has it; there are chat"):
        of_categories(items, "sports")
