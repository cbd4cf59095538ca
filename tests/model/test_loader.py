"""What the loader loads, what it refuses by name, and which pairs fit. Tiny random models, no network."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, LlamaConfig

from engine.errors import ConfigError, IncompatiblePair, SourceError, UnsupportedModel
from engine.model import loader
from engine.model.loader import PairMember
from engine.model.paged import kv_bytes_per_token
from engine.model.stack import DecoderStack
from tests import tiny

CPU = torch.device("cpu")


def tiny_config(**changes: Any) -> Any:
    options = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 128}
    return LlamaConfig(**options, num_attention_heads=4, num_key_value_heads=2, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    with loader.quiet_transformers():
        AutoModelForCausalLM.from_config(tiny_config()).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# ---------------------------------------------------------------------- loading
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_model_is_loaded_for_inference(folder: Path, dtype: torch.dtype, capfd: pytest.CaptureFixture[str]) -> None:
    model = loader.load(folder, dtype, CPU)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert capfd.readouterr() == ("", "")


def test_missing_weights_are_not_made_up(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(UnsupportedModel, match=r"missing weights .*model\.layers\.1\.mlp\.up_proj\.weight"):
        loader.load(folder, torch.float32, CPU)


def test_unknown_weights_are_not_dropped(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(16)}))
    with pytest.raises(UnsupportedModel, match=r"unexpected weights .*q_proj\.bias"):
        loader.load(folder, torch.float32, CPU)


def test_old_rotary_buffers_do_no_harm(folder: Path) -> None:
    edit_weights(folder, lambda weights: weights.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}))
    loader.load(folder, torch.float32, CPU)


def test_weights_of_another_shape_are_refused(folder: Path) -> None:
    edit_config(folder, vocab_size=65)
    with pytest.raises(SourceError, match="cannot be loaded"):
        loader.load(folder, torch.float32, CPU)


def test_truncated_weights_are_one_line(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(500)
    with pytest.raises(SourceError, match=r"weights .* cannot be loaded") as caught:
        loader.load(folder, torch.float32, CPU)
    assert "\n" not in str(caught.value)


def test_pickles_are_never_read(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(SourceError, match="cannot be loaded"):
        loader.load(folder, torch.float32, CPU)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"model_type": "my_own", "auto_map": {"AutoConfig": "own.Config"}}, "model_type 'my_own'"),
        ({"model_type": None}, "model_type None"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope type 'dynamic'"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1, 1], "long_factor": [1, 1]}, "original_max_position_embeddings": 64},
            "rope type 'longrope'",
        ),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "quantised checkpoint"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification, not a causal"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused_by_name(folder: Path, changes: dict[str, Any], reason: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(UnsupportedModel, match=reason) as caught:
        loader.load(folder, torch.float32, CPU)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "changes", "reason"),
    [
        (
            "gemma3_text",
            {"model_type": "gemma3", "text_config": {}, "vision_config": {}},
            "model_type 'gemma3'.*wrapper around several models",
        ),
        ("qwen2", {"model_type": "qwen2_vl", "vision_config": {}}, "model_type 'qwen2_vl'.*wrapper around several models"),
        ("qwen2", {"vision_config": {"depth": 2}}, "a model for images"),
        ("qwen3", {"model_type": "qwen3_moe"}, "model_type 'qwen3_moe'"),
        ("gemma3_text", {"model_type": "gemma2"}, "model_type 'gemma2'"),
        ("llama", {"model_type": "gpt_oss"}, "model_type 'gpt_oss'"),
        ("mistral", {"layer_types": ["full_attention"] * 3}, "model_type 'ministral'"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, r"soft-capped attention \(attn_logit_softcapping: 50\.0\)"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "soft-capped logits"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "attention that looks ahead"),
        ("llama", {"is_causal": False}, "attention that looks ahead"),
        ("qwen3", {"num_kv_shared_layers": 2}, "layers that share keys and values"),
        ("llama", {"num_local_experts": 8}, "a mixture of experts"),
        ("llama", {"attention_chunk_size": 128}, "chunked attention"),
        ("qwen3", {"layer_types": ["full_attention", "chunked_attention", "linear_attention"]}, "type chunked_attention, linear_attention"),
        ("gemma3_text", {"sliding_window": None}, "sliding_window of None"),
        ("mistral", {"sliding_window": 0}, "sliding_window of 0"),
        ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_type": "dynamic", "factor": 2.0}}}, "rope type 'dynamic'"),
        ("gemma3_text", {"rope_parameters": {"sliding_attention": {"rope_type": "proportional"}}}, "rope type 'proportional'"),
        (
            "qwen2",
            {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default", "mrope_section": [1, 1]}},
            r"several axes \(mrope_section\)",
        ),
        ("llama", {"partial_rotary_factor": 0.5}, r"a part of each head \(partial_rotary_factor: 0\.5\)"),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}, "rotary parameters by layer type"),
    ],
)
def test_an_architecture_is_refused_from_its_config_alone(architecture: str, changes: dict[str, Any], reason: str, tmp_path: Path) -> None:
    tiny.tiny_config(architecture).save_pretrained(tmp_path)
    loader.read_config(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(UnsupportedModel, match=reason) as caught:
        loader.read_config(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_sizes_of_every_architecture_are_those_of_its_stack(architecture: str, tmp_path: Path) -> None:
    tiny.tiny_config(architecture).save_pretrained(tmp_path)
    size = loader.estimate(loader.read_config(tmp_path))
    model = copy.deepcopy(tiny.target_model(architecture=architecture))
    assert size.num_parameters == sum(weight.numel() for weight in model.parameters())
    stack = DecoderStack(model)
    assert size.kv_values_per_token * stack.dtype.itemsize == kv_bytes_per_token(stack)
    assert size.context_length == 64  # Gemma's stretched layers do not stretch those that slide


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "default"}, 128),
        ({"rope_type": "linear", "factor": 2.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        (
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            128,
        ),
    ],
)
def test_fixed_rope_types_are_served_with_their_context(folder: Path, rope: dict[str, Any], context: int) -> None:
    edit_config(folder, rope_parameters={"rope_theta": 1e4, **rope})
    loader.load(folder, torch.float32, CPU)
    assert loader.context_length(loader.read_config(folder)) == context


@pytest.mark.parametrize("content", ["{", "[]"])
def test_a_damaged_config_is_one_line(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(SourceError, match=r"config\.json") as caught:
        loader.read_config(folder)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------- choices
def test_auto_is_float32_on_a_cpu_and_the_checkpoints_own_on_a_gpu() -> None:
    config = tiny_config(dtype=torch.bfloat16)
    assert loader.resolve_dtype("auto", CPU, config) is torch.float32
    assert loader.resolve_dtype("auto", torch.device("cuda"), config) is torch.bfloat16
    assert loader.resolve_dtype("float16", CPU, config) is torch.float16


def test_auto_takes_a_gpu_when_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert loader.resolve_device("auto") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert loader.resolve_device("auto") == torch.device("cuda")


@pytest.mark.parametrize("device", ["gpu", "mps", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(ConfigError, match=f"engine.device: '{device}'"):
        loader.resolve_device(device)


def test_end_tokens_are_the_union_of_both_configs(folder: Path) -> None:
    edit_config(folder, eos_token_id=2)
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 5, 2]}')
    assert loader.end_token_ids(folder) == (2, 5, 7)
    (folder / "generation_config.json").unlink()
    assert loader.end_token_ids(folder) == (2,)
    edit_config(folder, eos_token_id=None)
    assert loader.end_token_ids(folder) == ()


def test_sizes_are_known_without_weights(folder: Path) -> None:
    model = loader.load(folder, torch.float32, CPU)
    (folder / "model.safetensors").unlink()
    size = loader.estimate(loader.read_config(folder))
    assert size.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert size.kv_values_per_token == 2 * 2 * 2 * 4  # keys and values, layers, key-value heads, head dimension
    assert (size.context_length, size.vocab_size) == (128, 64)


# ---------------------------------------------------------------------- pairs
def member(path: Path, words: list[str], vocab_size: int, added: tuple[str, ...] = ()) -> PairMember:
    path.mkdir()
    tokenizer = Tokenizer(BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.add_special_tokens(list(added))
    tokenizer.save(str(path / "tokenizer.json"))
    return PairMember(path.name, path, vocab_size)


def test_padding_is_no_difference(tmp_path: Path) -> None:
    target = member(tmp_path / "target", ["a", "b"], 8, ("<end>",))
    loader.check_pair(target, member(tmp_path / "drafter", ["a", "b"], 3, ("<end>",)))


@pytest.mark.parametrize(
    ("words", "added", "said"),
    [
        (["a", "c"], ("<end>",), "token 1 is 'b' in the target and 'c' in the drafter"),
        (["a", "b"], ("<stop>",), "token 2 is '<end>' in the target and '<stop>' in the drafter"),
        (["a", "b"], (), "token 2 is '<end>' in the target and None in the drafter"),
        (["a", "b"], ("<end>", "<more>"), "token 3 is None in the target and '<more>' in the drafter"),
    ],
)
def test_the_first_token_that_differs_is_named(words: list[str], added: tuple[str, ...], said: str, tmp_path: Path) -> None:
    target = member(tmp_path / "target", ["a", "b"], 8, ("<end>",))
    with pytest.raises(IncompatiblePair, match=f"Target target and drafter drafter.*{said}"):
        loader.check_pair(target, member(tmp_path / "drafter", words, 8, added))


def test_an_embedding_smaller_than_the_tokenizer_is_refused(tmp_path: Path) -> None:
    target = member(tmp_path / "target", ["a", "b"], 8)
    with pytest.raises(IncompatiblePair, match="drafter has 1 embedding rows"):
        loader.check_pair(target, member(tmp_path / "drafter", ["a", "b"], 1))


def test_without_tokenizers_sizes_must_be_equal(tmp_path: Path) -> None:
    target = member(tmp_path / "target", ["a", "b"], 8)
    loader.check_pair(target, PairMember("bare", tmp_path, 8))
    with pytest.raises(IncompatiblePair, match=r"target target \(8 tokens\) and drafter bare \(9 tokens\)"):
        loader.check_pair(target, PairMember("bare", tmp_path, 9))


def test_a_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    target = member(tmp_path / "target", ["a", "b"], 8)
    (target.path / "tokenizer.json").write_text("{")
    with pytest.raises(SourceError, match=r"tokenizer\.json cannot be read"):
        loader.check_pair(target, target)
