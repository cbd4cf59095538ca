"""Fake servers on sockets, and a deployment over a tiny random model with a tokenizer."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.model.loader import quiet_transformers
from server.app import create_app
from tests.fakes import FakeEngine, make_info
from tests.server.conftest import TEMPLATE, build_tokenizer, listen, make_deployment


def write_tokenizer(path: Path) -> None:
    build_tokenizer().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}), "utf-8")
    (path / "chat_template.jinja").write_text(TEMPLATE, "utf-8")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with tokenizer and chat template, without weights."""
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    return path


@asynccontextmanager
async def fake_server(folder: Path) -> AsyncIterator[tuple[str, FakeEngine]]:
    """The application over a fake engine on a real socket."""
    engine = FakeEngine(make_info(str(folder), end_token_ids=(2,), max_model_len=4096), max_queued=64)
    async with listen(create_app(engine, make_deployment(max_queued_requests=64))) as (_, url):
        yield url, engine


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployment file whose model takes milliseconds a step."""
    path = tmp_path_factory.mktemp("tiny-model")
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    with quiet_transformers():
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, max_position_embeddings=2048, eos_token_id=2))
        model.save_pretrained(path / "tiny")
    write_tokenizer(path / "tiny")
    file = path / "tiny.yaml"
    file.write_text(
        f"model: {{name: tiny, target: {{source: {path / 'tiny'}, dtype: float32}}, drafter: {{kind: ngram}}}}\n"
        "engine: {device: cpu, kv_cache: 4MiB, max_sequences: 8}\n"
    )
    return file
