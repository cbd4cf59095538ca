"""A .gguf file becomes the same model, or is refused: tiny files, written as llama.cpp writes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.errors import SourceError, UnsupportedModel
from engine.model import gguf_cache, loader
from engine.model.convert import convert
from engine.model.gguf_metadata import require_convertible
from tests.tiny import VOCAB, tiny_config

CPU = torch.device("cpu")
TOKENS = [*(chr(97 + i) for i in range(VOCAB - 1)), "ab"]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass
class Changes:
    """What a file has beside a tiny model, or lacks."""

    entries: dict[str, float | str] = field(default_factory=dict)
    tensors: dict[str, int] = field(default_factory=dict)
    lacks: str | None = None


def random_model(architecture: str) -> Any:
    torch.manual_seed(3)
    changes = {"head_dim": 128} if architecture == "qwen3" else {}  # the only one that Qwen3 was released with
    config = tiny_config(architecture, use_sliding_window=False, layer_types=None, **changes)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for weight in model.parameters():
        weight += 0.2 * torch.randn(weight.shape)
    return model


def gguf_name(name: str) -> str:
    for ours, theirs in NAMES.items():
        name = name.replace(ours, theirs)
    return name.replace("model.layers.", "blk.")


def interleaved(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """The two halves of each head row by row, as llama.cpp wants them of a Llama."""
    return weight.reshape(num_heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write(path: Path, model: Any, changes: Changes) -> Path:
    config, writer = model.config, gguf.GGUFWriter(path, model.config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges([f"{TOKENS[0]} {TOKENS[1]}"])
    writer.add_eos_token_id(2)
    writer.add_bos_token_id(1)
    for key, entry in changes.entries.items():
        add: Callable[[str, Any], None] = writer.add_string if isinstance(entry, str) else writer.add_float32
        add(f"{config.model_type}.{key}", entry)
    for name, weight in model.named_parameters():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        stored = interleaved(weight, heads) if config.model_type == "llama" and heads else weight
        if gguf_name(name) != changes.lacks:
            writer.add_tensor(gguf_name(name), stored.numpy())
    for name, size in changes.tensors.items():
        writer.add_tensor(name, np.ones(size, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_a_converted_copy_computes_the_same(architecture: str, tmp_path: Path) -> None:
    model = random_model(architecture)
    file = write(tmp_path / "tiny.gguf", model, Changes())
    assert loader.read_config(file).model_type == architecture
    convert(file, tmp_path / "copy")
    copy = loader.load(tmp_path / "copy", torch.float32, CPU)
    ids = torch.arange(20).unsqueeze(0) % VOCAB
    torch.testing.assert_close(copy(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("architecture", "changes", "reason"),
    [
        ("mistral", Changes(), "architecture 'mistral'; as GGUF, llama, qwen2, qwen3 are served"),
        (
            "llama",
            Changes({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
            r"rope\.scaling\.factor: 4\.0, rope\.scaling\.type",
        ),
        ("llama", Changes(tensors={"rope_freqs.weight": 2}), r"rope_freqs\.weight"),
        ("llama", Changes(tensors={"blk.0.attn_q.bias": 16}), r"blk\.0\.attn_q\.bias"),
        ("qwen2", Changes({"attention.sliding_window": 4096.0}), r"attention\.sliding_window: 4096"),
        ("qwen3", Changes({"expert_count": 8.0}), "expert_count"),
    ],
)
def test_what_the_conversion_would_drop_is_refused(architecture: str, changes: Changes, reason: str, tmp_path: Path) -> None:
    file = write(tmp_path / "tiny.gguf", random_model(architecture), changes)
    for refuse in (require_convertible, loader.read_config, lambda file: convert(file, tmp_path / "copy")):
        with pytest.raises(UnsupportedModel, match=reason):
            refuse(file)


def test_a_rotary_scale_of_none_is_no_scale(tmp_path: Path) -> None:
    require_convertible(write(tmp_path / "tiny.gguf", random_model("llama"), Changes({"rope.scaling.type": "none"})))


def test_a_weight_that_the_file_lacks_is_not_made_up(tmp_path: Path) -> None:
    file = write(tmp_path / "tiny.gguf", random_model("llama"), Changes(lacks="blk.1.ffn_up.weight"))
    with pytest.raises(UnsupportedModel, match=r"lacks weights .*layers\.1\.mlp\.up_proj"):
        convert(file, tmp_path / "copy")


def test_the_converting_process_says_why(tmp_path: Path) -> None:
    file = write(tmp_path / "tiny.gguf", random_model("mistral"), Changes())
    with pytest.raises(SourceError, match=r"tiny\.gguf cannot be read .* \(.*architecture 'mistral'"):
        gguf_cache.convert_gguf(file, tmp_path / "copy")
