"""The command: recipes, prompt files and the template's words; every mistake is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from engine.errors import ConfigError
from engine.train.config import DataConfig, DistilConfig, DrafterShape, TrainingConfig
from server.cli import app
from server.distil import load_recipe, prompts_of, turns_of
from server.text import TextTokenizer
from tests.train.conftest import recipe_content

runner = CliRunner()
RECIPES = sorted((Path(__file__).parents[2] / "configs" / "train").iterdir())


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.name)
def test_a_recipe_loads_and_shows_every_key(file: Path) -> None:
    load_recipe(file)
    content = yaml.safe_load(file.read_text("utf-8"))
    assert content.keys() == DistilConfig.model_fields.keys()
    for section, model in (("drafter", DrafterShape), ("data", DataConfig), ("training", TrainingConfig)):
        assert content[section].keys() == model.model_fields.keys()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"hidden_sizes": 3}, "drafter.hidden_sizes - unknown key; did you mean hidden_size?"),
        ({"num_layers": 0}, "drafter.num_layers: 0 - must be at least 1"),
        ({"num_heads": 3}, "hidden_size is 8 and must be a multiple of num_heads, which is 3"),
        ({"draft_vocabulary": 4, "tie_embeddings": False}, "draft_vocabulary needs tie_embeddings"),
        ({"model_type": "gpt2"}, "drafter has model_type 'gpt2'; served are"),
        ({"options": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}}}, "drafter has rope type 'dynamic'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(change: dict[str, object], line: str, target: Path, tmp_path: Path) -> None:
    content = recipe_content(target, tmp_path)
    content["drafter"] |= change
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content), "utf-8")
    result = runner.invoke(app, ["train", "distil", str(file)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1
    assert line in result.stderr


def test_a_source_of_the_wrong_kind_is_named(target: Path, tmp_path: Path) -> None:
    content = recipe_content(target, tmp_path)
    file = tmp_path / "recipe.yaml"
    for source, line in (
        ({"kind": "self", "path": "x"}, "data.sources.0.path - unknown key; path belongs to kind file"),
        ({"kind": "web"}, "must be one of 'self', 'file'"),
        ({"kind": "file", "name": "a", "path": str(tmp_path / "no.jsonl")}, "no.jsonl cannot be read: No such file"),
    ):
        content["data"]["sources"] = [source]
        file.write_text(yaml.safe_dump(content), "utf-8")
        result = runner.invoke(app, ["train", "distil", str(file)])
        assert result.exit_code == 2
        assert line in result.stderr


def test_the_whole_command(target: Path, tmp_path: Path) -> None:
    content = recipe_content(target, tmp_path)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"question": "the quick fox"}\n\n{"turns": ["hello", "again"]}\n', "utf-8")
    content["data"]["sources"].append({"kind": "file", "name": "own", "path": str(prompts), "weight": 0.5})
    content["data"]["num_tokens"] = 200
    content["training"]["steps"] = 2
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(content), "utf-8")
    made = runner.invoke(app, ["train", "distil", str(file), "--data-only"])
    assert (made.exit_code, made.stdout) == (0, ""), made.stderr
    assert not Path(content["output"]).exists()
    result = runner.invoke(app, ["train", "distil", str(file)])
    assert result.exit_code == 0, result.stderr
    assert "Validation at step 2" in result.stderr
    card = (Path(content["output"]) / "README.md").read_text("utf-8")
    assert "prompts of prompts.jsonl, answered by the target" in card
    assert "`cascade train distil recipe.yaml`" in card
    assert json.loads((Path(content["output"]) / "training.json").read_text("utf-8"))["position"]["step"] == 2


def test_what_the_template_puts_around_a_question(target: Path) -> None:
    tokenizer = TextTokenizer.from_folder(target)
    around = turns_of(tokenizer)
    assert around is not None
    question = tokenizer.encode("hello world")
    assert [*around[0], *question, *around[1]] == tokenizer.encode_chat([{"role": "user", "content": "hello world"}])
    assert turns_of(TextTokenizer((target / "tokenizer.json").read_text("utf-8"))) is None


@pytest.mark.parametrize(
    ("entry", "texts"),
    [
        ({"prompt": "a"}, ["a"]),
        ({"question": "a", "answer": "b"}, ["a"]),
        ({"turns": ["a", "b"]}, ["a"]),
        ({"instruction": "a"}, ["a"]),
        ({"instruction": "a", "input": "b"}, ["a\n\nb"]),
        ({"instruction": "a", "instances": [{"input": "b"}, {"input": ""}, {"input": "b"}]}, ["a\n\nb", "a"]),
    ],
)
def test_prompts_of_a_line(entry: dict[str, object], texts: list[str]) -> None:
    assert prompts_of(json.dumps(entry), "here") == [[{"role": "user", "content": text}] for text in texts]


def test_a_conversation_stays_one() -> None:
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]
    assert prompts_of(json.dumps({"messages": messages}), "here") == [messages]


@pytest.mark.parametrize("line", ["{", "[]", "{}", '{"prompt": " "}', '{"messages": [{"role": "user"}]}', '{"turns": []}', '{"prompt": 3}'])
def test_a_line_without_a_prompt_is_refused_by_its_place(line: str) -> None:
    with pytest.raises(ConfigError, match=r"^here: "):
        prompts_of(line, "here")
