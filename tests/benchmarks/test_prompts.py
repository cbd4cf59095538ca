"""Where prompts come from, and what is said about a bad file."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.body import BodyMaker
from benchmarks.errors import BenchmarkError
from benchmarks.options import LoadOptions, PromptOptions, extra_fields
from benchmarks.prompts import BUILT_IN, Prompt, random_words, read, shuffled


def test_the_built_in_prompts_are_three_of_each_category() -> None:
    counts = Counter(prompt.category for prompt in read(BUILT_IN))
    assert len(counts) == 8
    assert set(counts.values()) == {3}


def test_three_kinds_of_lines_are_read(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text(
        '{"prompt": "one", "category": "x"}\n\n{"turns": ["two", "three"], "question_id": 7}\n'
        '{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}\n'
    )
    one, two, three = read(file)
    assert (one.text, one.category) == ("one", "x")
    assert (two.text, two.id, two.messages) == ("two", 7, ({"role": "user", "content": "two"},))
    assert (three.text, [message["role"] for message in three.messages]) == (None, ["system", "user"])


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "not JSON"),
        ("[1]", "a line is a JSON object, not a list"),
        ("{}", "exactly one of prompt, messages and turns; it has none"),
        ('{"prompt": "a", "turns": ["b"]}', "it has prompt, turns"),
        ('{"prompt": 3}', "prompt must be a text"),
        ('{"turns": []}', "turns must be a list of texts"),
        ('{"messages": [{"role": "user"}]}', "messages must be a list of objects with role and content"),
        ('{"prompt": "a", "category": 1}', "category is 1 and must be a text"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number(line: str, what: str, tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "good"}\n' + line + "\n")
    with pytest.raises(BenchmarkError) as caught:
        read(file)
    assert str(caught.value).startswith(f"{file}, line 2: ")
    assert what in str(caught.value)


def test_categories_filter_and_an_unknown_one_is_refused() -> None:
    assert {prompt.category for prompt in read(BUILT_IN, ["math", "qa"])} == {"math", "qa"}
    with pytest.raises(BenchmarkError, match="has no category poetry; it has chat, coding"):
        read(BUILT_IN, ["poetry"])


def test_order_is_the_seeds_alone_and_all_come_before_any_comes_again() -> None:
    prompts = read(BUILT_IN)
    asked = shuffled(prompts, 30, seed=4)
    assert asked == shuffled(prompts, 30, seed=4)
    assert asked != shuffled(prompts, 30, seed=5)
    assert len({prompt.text for prompt in asked[:24]}) == 24


def test_random_prompts_have_their_length_and_no_common_beginning() -> None:
    texts = [random_words(50, seed).messages[0]["content"] for seed in (1, 2, -1, -2)]
    assert {len(text.split()) for text in texts} == {50}
    assert len({text[:8] for text in texts}) == 4


def test_a_conversation_needs_the_chat_endpoint() -> None:
    conversation = Prompt(({"role": "user", "content": "u"},), None)
    assert BodyMaker("m").body(conversation, 0)["messages"] == [{"role": "user", "content": "u"}]
    with pytest.raises(BenchmarkError, match="chat endpoint"):
        BodyMaker("m", "completions").body(conversation, 0)


def test_a_seed_counts_up_with_the_requests() -> None:
    prompt = random_words(3, 0)
    assert "seed" not in BodyMaker("m").body(prompt, 5)
    assert BodyMaker("m", seed=10).body(prompt, 5)["seed"] == 15


def test_options_that_exclude_each_other_are_refused() -> None:
    with pytest.raises(BenchmarkError, match="choose one"):
        LoadOptions(concurrency=2, request_rate=1.0).plan(1)
    with pytest.raises(BenchmarkError, match="--max-concurrency bounds an open loop"):
        LoadOptions(max_concurrency=2).plan(1)
    with pytest.raises(BenchmarkError, match="makes its own prompts"):
        PromptOptions(random_input_len=3, category="math").choose()


def test_an_open_loop_is_a_poisson_process_of_its_seed() -> None:
    due = LoadOptions(request_rate=10.0, seed=3).plan(4000).due
    assert due == LoadOptions(request_rate=10.0, seed=3).plan(4000).due
    gaps = [after - before for before, after in itertools.pairwise(due)]
    assert due[0] == 0
    assert sum(gaps) / len(gaps) == pytest.approx(0.1, rel=0.05)
    assert sum(gap > 0.1 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.02)  # 1/e


@pytest.mark.parametrize("text", ["{", "3"])
def test_speculation_is_a_json_object(text: str) -> None:
    with pytest.raises(BenchmarkError, match=r"--speculation"):
        extra_fields(False, text)
    assert extra_fields(True, '{"enabled": false}') == {"ignore_eos": True, "speculation": {"enabled": False}}
