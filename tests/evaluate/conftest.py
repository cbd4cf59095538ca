"""A tiny pair with a tokenizer: a random target, and a drafter that is the target with noise on every weight."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner, Result

from engine.model.loader import quiet_transformers
from server.cli import app
from tests.benchmarks.conftest import write_tokenizer

SIZES = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="session")
def pair_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployment file; both models take milliseconds a step."""
    path = tmp_path_factory.mktemp("pair")
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_key_value_heads=1, max_position_embeddings=1024, eos_token_id=2, initializer_range=0.3)
    with quiet_transformers():
        model = LlamaForCausalLM(config)
        model.save_pretrained(path / "target")
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.03 * torch.randn(weight.shape)
        model.save_pretrained(path / "drafter")
    for name in ("target", "drafter"):
        write_tokenizer(path / name)
    return write_config(path / "pair.yaml", {"kind": "model", "source": str(path / "drafter"), "dtype": "float32"}, path / "target")


def write_config(file: Path, drafter: dict[str, Any], target: Path) -> Path:
    file.write_text(
        f"model: {{name: tiny, target: {{source: {target}, dtype: float32}}, drafter: {json.dumps(drafter)}}}\n"
        "speculation: {draft_length: {policy: fixed, max: 3}}\n"  # others look at the clock
        "engine: {device: cpu, kv_cache: 4MiB, max_sequences: 8}\n"
    )
    return file


@dataclass(frozen=True)
class Ran:
    """What a run of the command left behind."""

    result: Result
    folder: Path

    @property
    def summary(self) -> dict[str, Any]:
        assert self.result.exit_code == 0, self.result.output
        line: dict[str, Any] = json.loads(self.result.stdout)
        return line

    @property
    def table(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.folder / "table.json").read_text())
        return content

    @property
    def points(self) -> dict[str, Any]:
        return {figures["point"]: figures for figures in self.table["points"]}


Evaluate = Callable[..., Ran]


@pytest.fixture
def evaluate(tmp_path: Path) -> Evaluate:
    """Run `cascade evaluate` on a deployment; plots only where they are asked for."""

    def run(config: Path, *options: str, folder: str = "out", plots: bool = False) -> Ran:
        command = ["evaluate", str(config), "--output", str(tmp_path / folder), *([] if plots else ["--no-plots"]), *options]
        return Ran(CliRunner().invoke(app, command), tmp_path / folder)

    return run
