"""What operators are told of how a model writes calls and thinking: in `cascade check` and at the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from engine.config import ModelSource
from engine.errors import ConfigError
from engine.model import source
from engine.model.loader import quiet_transformers
from server import report
from server.cli import app
from server.dialect import in_words
from server.launch import _understood
from tests.server.conftest import TEMPLATE, make_deployment, serve, write_folder
from tests.server.families import TEMPLATES

runner = CliRunner()


@pytest.mark.parametrize(
    ("template", "how", "calls", "thinking"),
    [
        (TEMPLATES["llama3"], {}, "llama3, by the chat template", "none: the chat template marks none"),
        (TEMPLATE, {}, "hermes, told in text: the chat template has no place for tools", "none: the chat template marks none"),
        ("{{ tools }}<tool_call><think>", {}, "hermes, by the chat template", "think, by the chat template"),
        (
            "{{ tools }}<function=f>[THINK]",
            {},
            "none: the chat template writes calls in a form that is not known",
            "mistral, by the chat template",
        ),
        (
            TEMPLATES["json"],
            {"tool_format": "hermes", "reasoning_format": "seed"},
            "hermes, by server.tool_format",
            "seed, by server.reasoning_format",
        ),
        (
            TEMPLATES["json"],
            {"tool_format": "none", "reasoning_format": "none"},
            "none, by server.tool_format",
            "none, by server.reasoning_format",
        ),
        (None, {"tool_format": "hermes"}, "none: the model has no chat template", "none: the model has no chat template"),
    ],
)
def test_what_is_said_of_a_template(template: str | None, how: Any, calls: str, thinking: str) -> None:
    assert in_words(template, **how) == (calls, thinking)


def test_a_form_that_a_model_would_never_write_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"server\.tool_format: llama3"):
        in_words(TEMPLATE, "llama3")


async def test_the_start_says_it(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, TEMPLATES["hermes"])
    async with serve(folder, make_deployment(reasoning_format="think")) as served:
        told = _understood(served.app.state.serving)
    assert told == "Tool calls: hermes, by the chat template. Thinking: think, by server.reasoning_format"


@pytest.fixture
def deployment(tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    sizes = {"vocab_size": 320, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    with quiet_transformers():
        LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, max_position_embeddings=64)).save_pretrained(folder)
    write_folder(folder, TEMPLATES["mistral"])
    file = tmp_path / "tiny.yaml"
    file.write_text(
        f"model: {{name: tiny, target: {{source: {folder}, dtype: float32}}, drafter: {{kind: ngram}}}}\n"
        "engine: {device: cpu, kv_cache: 16KiB, block_size: 8, max_sequences: 2}\nserver: {reasoning_format: none}\n"
    )
    return file


@pytest.mark.parametrize("mode", [["--no-load"], []])
def test_check_says_it_with_and_without_loading(mode: list[str], deployment: Path) -> None:
    result = runner.invoke(app, ["check", str(deployment), *mode], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    shown = {cells[1].strip(): cells[2].strip() for line in result.stdout.splitlines() if len(cells := line.split("│")) == 4}
    assert shown["tool calls"] == "mistral, by the chat template"
    assert shown["thinking"] == "none, by server.reasoning_format"


def test_check_says_what_only_loading_would_show(tmp_path: Path) -> None:
    settings = make_deployment().server
    assert report._dialect(settings, None) == ("unknown offline", "unknown offline")
    (tmp_path / "model.gguf").touch()
    assert report._dialect(settings, tmp_path / "model.gguf") == ("known when it is loaded", "known when it is loaded")


def test_the_chat_template_is_fetched_with_the_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Newer checkpoints have it in a file of its own."""
    asked: list[str] = []

    def snapshot(*_: Any, allow_patterns: list[str], **__: Any) -> str:
        asked.extend(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(source, "snapshot_download", snapshot)
    assert source.fetch_config(ModelSource(source="owner/name")) is None
    assert {"*.json", "*.jinja"} <= set(asked)


def test_check_refuses_a_form_that_the_model_would_never_write(deployment: Path) -> None:
    (deployment.parent / "tiny" / "chat_template.jinja").write_text(TEMPLATE)
    deployment.write_text(deployment.read_text().replace("{reasoning_format: none}", "{tool_format: llama3}"))
    result = runner.invoke(app, ["check", str(deployment), "--no-load"])
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: server.tool_format: llama3 - the model's chat template has no place for tools")
