"""Training data: what is in a shard, that it depends on seed and number alone, and that a run that was ended goes on."""

from __future__ import annotations

import dataclasses
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch

from engine.errors import ConfigError, SourceError
from engine.model.loader import load, resolve_device
from engine.request import Request, SamplingParams
from engine.train.data import Made, Material, PromptFile, shares
from engine.train.run import Watch, make_data
from engine.train.shards import Example, is_held_out, num_answer_tokens, provenance_of, read_shard, write_shard
from tests.reference import NaiveModel, answer
from tests.train.conftest import END, MATERIAL, Recipe

FILE = Material(MATERIAL.turns, {"file": PromptFile(tuple((9, 5, i) for i in range(5)), "abc")})
BOTH = [{"kind": "self", "max_tokens": 6, "weight": 3}, {"kind": "file", "name": "file", "path": "some/prompts.jsonl", "weight": 1}]


def contents(paths: list[Path]) -> list[bytes]:
    return [path.read_bytes() for path in paths]


def test_a_shard_gives_back_what_was_written(tmp_path: Path) -> None:
    examples = [Example((1, 2, 3), (4,), "b", 0.0), Example((5,), (6, 7, 8), "a", 1.0)]
    write_shard(tmp_path / "x", examples, {"seed": 3})
    found = read_shard(tmp_path / "x")
    assert [dataclasses.replace(e, prompt_ids=tuple(e.prompt_ids), answer_ids=tuple(e.answer_ids)) for e in found] == examples
    assert num_answer_tokens(tmp_path / "x") == 4
    assert provenance_of(tmp_path / "x")["seed"] == 3
    (tmp_path / "x").write_bytes(b"half")
    with pytest.raises(SourceError, match="Remove it"):
        read_shard(tmp_path / "x")


def test_examples_are_the_targets_own_questions_and_answers(target: Path, shards: list[Path]) -> None:
    assert MATERIAL.turns is not None
    before, between = MATERIAL.turns.user_start_ids, MATERIAL.turns.assistant_start_ids
    naive = NaiveModel(load(target, torch.float64, resolve_device("cpu")))
    examples = [example for shard in shards for example in read_shard(shard)]
    assert {example.temperature for example in examples} == {0.0, 1.0}
    greedy = 0
    for example in examples:
        prompt, made = tuple(example.prompt_ids), tuple(example.answer_ids)
        question = prompt[len(before) : -len(between)]
        assert (prompt[: len(before)], prompt[-len(between) :]) == (before, between)
        assert 1 <= len(question) <= 6
        assert END not in question
        assert len(made) == 12 or made[-1] == END
        assert END not in made[:-1]
        if example.temperature == 0 and greedy < 5:
            greedy += 1
            sampling = SamplingParams(max_tokens=12, temperature=0, stop_token_ids=(END,))
            assert made == answer(Request(id="a", prompt_ids=prompt, sampling=sampling), naive)
    assert greedy == 5


def test_a_run_that_was_ended_goes_on_and_makes_the_same_bytes(recipe: Recipe, shards: list[Path]) -> None:
    config = recipe()
    folder = Path(config.data.folder)

    class Killed(BaseException):
        pass

    before: list[int] = []  # tokens written when the first shard was whole

    def kill(made: Made) -> None:
        if made.num_shards == 1:
            before.append(made.num_tokens_now)
            if made.num_tokens_now > before[0] + 40:
                raise Killed

    with pytest.raises(Killed):
        make_data(config, MATERIAL, Watch(on_data=kill))
    assert [path.name for path in folder.iterdir()] == ["shard-00000.safetensors"]
    first = (folder / "shard-00000.safetensors").stat().st_mtime_ns
    assert contents(make_data(config, MATERIAL, Watch())) == contents(shards)
    assert (folder / "shard-00000.safetensors").stat().st_mtime_ns == first, "a shard that was there was made again"


def test_a_shard_depends_on_nothing_made_before_it_nor_on_the_batch(recipe: Recipe, shards: list[Path]) -> None:
    config = recipe(data__batch=3)
    shutil.copytree(shards[0].parent, config.data.folder)
    (Path(config.data.folder) / shards[1].name).unlink()
    assert contents(make_data(config, MATERIAL, Watch())) == contents(shards)


def test_more_tokens_only_add_shards_and_another_seed_makes_others(recipe: Recipe, shards: list[Path]) -> None:
    shutil.copytree(shards[0].parent, recipe().data.folder)
    more = make_data(recipe(data__num_tokens=700), MATERIAL, Watch())
    assert len(more) > len(shards)
    assert contents(more[: len(shards)]) == contents(shards)
    with pytest.raises(ConfigError, match=r"data\.seed is 1 now and was 0"):
        make_data(recipe(data__seed=1), MATERIAL, Watch())
    with pytest.raises(ConfigError, match=r"shard-00000\.safetensors was made by another recipe: data\.max_tokens is 11 now and was 12"):
        make_data(recipe(data__max_tokens=11), MATERIAL, Watch())


def test_sources_have_their_shares_and_a_file_comes_around(recipe: Recipe) -> None:
    paths = make_data(recipe(data__sources=BOTH, data__num_tokens=400), FILE, Watch())
    examples = [example for path in paths for example in read_shard(path)]
    counts = Counter(example.source for example in examples)
    assert counts["file"] == 4 * len(paths)
    assert counts["self"] > 8 * len(paths)
    asked = Counter(example.prompt_ids[2] for example in examples if example.source == "file")
    assert set(asked) == set(range(5))
    assert max(asked.values()) - min(asked.values()) <= 1, "a prompt came again before all others had come"


def test_prompts_that_are_too_long_are_left_out(recipe: Recipe) -> None:
    files = {"file": PromptFile(((9,) * 31, (9, 5)), "abc")}
    sources = [{"kind": "file", "name": "file", "path": "prompts.jsonl"}]
    paths = make_data(recipe(data__sources=sources, data__num_tokens=20), Material(None, files), Watch())
    assert {tuple(example.prompt_ids) for example in read_shard(paths[0])} == {(9, 5)}
    assert provenance_of(paths[0])["num_dropped"] == 8
    with pytest.raises(ConfigError, match="shard 0 has no example"):
        make_data(
            recipe(data__sources=sources, data__folder=str(paths[0].parent / "x")),
            Material(None, {"file": PromptFile(((9,) * 31,), "a")}),
            Watch(),
        )


def test_what_cannot_be_made_is_refused(recipe: Recipe) -> None:
    with pytest.raises(ConfigError, match="has no chat template"):
        make_data(recipe(), Material(None), Watch())
    with pytest.raises(ConfigError, match="must be at most 64 together"):
        make_data(recipe(data__max_tokens=40), MATERIAL, Watch())
    with pytest.raises(ConfigError, match="no room for a question"):
        make_data(recipe(data__max_prompt_tokens=7), MATERIAL, Watch())


def test_shares_add_up() -> None:
    assert shares([1, 1, 1], 16) == [6, 5, 5]
    assert shares([0.7, 0.2, 0.1], 10) == [7, 2, 1]
    assert shares([1e-9, 1], 4) == [0, 4]


def test_equal_prompts_are_on_one_side() -> None:
    sides = [is_held_out(Example((i, 7), (1,), "a", 0.0), 0.2) for i in range(500)]
    assert 60 < sum(sides) < 140
    assert sides == [is_held_out(Example([i, 7], (2, 3), "b", 1.0), 0.2) for i in range(500)]
    assert not any(is_held_out(Example((i, 7), (1,), "a", 0.0), 0.0) for i in range(500))
