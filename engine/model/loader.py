"""From a folder in the transformers format to a module that is ready to run, and what its config says without loading it.

What this engine would compute wrongly is refused by name: packing several sequences into one row is silently wrong for rotary types that
look at the whole batch, missing weights would be random, quantised checkpoints need kernels that are not here. Remote code is never run.
What a config cannot tell, probe.py and stack.py see when the model is loaded.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from engine.config import Dtype
from engine.errors import ConfigError, IncompatiblePair, SourceError, UnsupportedModel
from engine.model.borrowed import borrowed_weights
from engine.model.gguf_metadata import require_convertible
from engine.model.memory import ADVICE
from engine.model.parts import joined_weights, read_weights
from engine.model.source import CONFIG_FILE, first_line

# whose packed layers were compared with their own forward pass, in tests/model and in the one matrix
SUPPORTED_MODEL_TYPES = frozenset({"gemma3_text", "llama", "mistral", "qwen2", "qwen3"})
FIXED_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})  # dynamic and longrope look at the largest position in the batch
LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
# entries of a config that change what is computed, and that nothing here computes; absent, None, False and 0 mean no
REFUSED_ENTRIES = {
    "attn_logit_softcapping": "soft-capped attention",
    "final_logit_softcapping": "soft-capped logits",
    "num_kv_shared_layers": "layers that share keys and values",
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "attention_chunk_size": "chunked attention",
    "use_bidirectional_attention": "attention that looks ahead",
    "text_config": "a model of its own for text",
    "vision_config": "a model for images",
    "audio_config": "a model for sounds",
}

_quiet = threading.Lock()  # transformers sets verbosity and default dtype for the whole process while it loads


@dataclass(frozen=True)
class ModelSize:
    """What a model's config says about memory and length, without its weights."""

    num_parameters: int
    kv_values_per_token: int  # keys and values of all layers together; times the dtype's size gives bytes
    context_length: int
    vocab_size: int


@dataclass(frozen=True)
class PairMember:
    """One side of a pair, as far as vocabularies are concerned."""

    name: str  # the configured source, for messages
    path: Path
    vocab_size: int  # rows of its embedding; may be padded beyond the tokenizer's last id


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' own bars and warnings from the terminal: what matters in them is checked here and raised."""
    with _quiet:
        verbosity = transformers_logging.get_verbosity()
        had_bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if had_bars:
                transformers_logging.enable_progress_bar()


# ---------------------------------------------------------------------- config
def read_config(path: Path) -> PretrainedConfig:
    """The config of a folder or a .gguf file that this engine can serve. Raises SourceError or UnsupportedModel."""
    where = {"gguf_file": path.name} if path.is_file() else {}
    folder = path.parent if path.is_file() else path
    if where:
        require_convertible(path)
    else:
        _require_known_type(_read_json(folder / CONFIG_FILE), str(path))  # before transformers, which would ask for remote code
    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False, **where)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SourceError(f"The config of {path} cannot be read: {first_line(error)}") from error
    require_supported(config, str(path))
    return config


def require_supported(config: PretrainedConfig, name: str) -> None:
    """Refuse what would be computed wrongly, with the reason. Raises UnsupportedModel."""
    _require_known_type({"model_type": config.model_type}, name)
    if config.is_encoder_decoder:
        raise UnsupportedModel(f"{name} is an encoder-decoder model; only decoders can be served.")
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel(f"{name} is a quantised checkpoint (quantization_config in its config). Name the original weights.")
    architectures = config.architectures or ()
    if architectures and not any(kind.endswith("ForCausalLM") for kind in architectures):
        raise UnsupportedModel(f"{name} is a {', '.join(architectures)}, not a causal language model.")
    for entry, meaning in REFUSED_ENTRIES.items():
        if value := getattr(config, entry, None):
            raise UnsupportedModel(f"{name} has {meaning} ({entry}: {value!r}), which is not served.")
    _require_known_layers(config, name)
    if has_rope_by_layer_type(config) != has_rope_by_layer_type(type(config)()):
        raise UnsupportedModel(f"{name} has rotary parameters by layer type, or lacks them, unlike other {config.model_type} models.")
    for rope in _rope_entries(config):
        _require_fixed_rope(rope, name)


def _require_known_type(config: dict[str, object], name: str) -> None:
    model_type = config.get("model_type")
    if model_type in SUPPORTED_MODEL_TYPES:
        return
    also = " It is a wrapper around several models." if config.keys() & {"text_config", "vision_config", "audio_config"} else ""
    raise UnsupportedModel(f"{name} has model_type {model_type!r}; served are {', '.join(sorted(SUPPORTED_MODEL_TYPES))}.{also}")


def _require_known_layers(config: PretrainedConfig, name: str) -> None:
    layer_types = set(getattr(config, "layer_types", None) or ())
    if unknown := sorted(layer_types - LAYER_TYPES):
        raise UnsupportedModel(f"{name} has layers of type {', '.join(unknown)}; served are {', '.join(sorted(LAYER_TYPES))}.")
    window = getattr(config, "sliding_window", None)
    if (window is not None or "sliding_attention" in layer_types) and not (isinstance(window, int) and window > 0):
        raise UnsupportedModel(f"{name} has a sliding_window of {window!r}; it must be a positive number of tokens.")
    if getattr(config, "is_causal", True) is False:
        raise UnsupportedModel(f"{name} has attention that looks ahead (is_causal: False), which is not served.")


def has_rope_by_layer_type(config: PretrainedConfig) -> bool:
    """Whether each type of layers has rotary parameters of its own; else one entry counts for all."""
    return not LAYER_TYPES.isdisjoint(config.rope_parameters or ())


def _rope_entries(config: PretrainedConfig) -> list[dict[str, Any]]:
    rope = config.rope_parameters or {}
    return [rope[kind] or {} for kind in sorted(set(config.layer_types))] if has_rope_by_layer_type(config) else [rope]


def _require_fixed_rope(rope: dict[str, Any], name: str) -> None:
    rope_type = rope.get("rope_type")
    if rope_type not in FIXED_ROPE_TYPES:
        raise UnsupportedModel(
            f"{name} has rope type {rope_type!r}, whose angles are absent or depend on the whole batch; "
            f"served are {', '.join(sorted(FIXED_ROPE_TYPES))}."
        )
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise UnsupportedModel(f"{name} rotates a part of each head (partial_rotary_factor: {rope['partial_rotary_factor']!r}).")
    if several := sorted(key for key in rope if key.startswith("mrope")):
        raise UnsupportedModel(f"{name} has positions of several axes ({', '.join(several)}), which is not served.")


def context_length(config: PretrainedConfig) -> int:
    """Positions that the model was made for, with the stretch of linear and yarn rotary embeddings (llama3 states the stretched length).

    With an entry for each type of layers the least counts: such configs stretch some layers and state the stretched length.
    """
    return min(_stretched(int(config.max_position_embeddings), rope) for rope in _rope_entries(config))


def _stretched(positions: int, rope: dict[str, Any]) -> int:
    factor = rope.get("factor", 1.0)
    if rope.get("rope_type") == "linear":
        return int(positions * factor)
    if rope.get("rope_type") == "yarn":
        return max(positions, int((rope.get("original_max_position_embeddings") or positions) * factor))
    return positions


def estimate(config: PretrainedConfig) -> ModelSize:
    """Sizes from the config alone: the modules are built without storage."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelSize(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        kv_values_per_token=2 * config.num_hidden_layers * config.num_key_value_heads * head_dim,
        context_length=context_length(config),
        vocab_size=config.vocab_size,
    )


def end_token_ids(path: Path) -> tuple[int, ...]:
    """Tokens that end an answer: the union of config.json and generation_config.json, in ascending order."""
    found: set[int] = set()
    for file in (path / CONFIG_FILE, path / "generation_config.json"):
        if file.is_file():
            eos = _read_json(file).get("eos_token_id")
            found.update(token_id for token_id in (eos if isinstance(eos, list) else [eos]) if isinstance(token_id, int))
    return tuple(sorted(found))


def _read_json(file: Path) -> dict[str, object]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SourceError(f"{file} cannot be read: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise SourceError(f"{file} does not hold a JSON object.")
    return content


# ---------------------------------------------------------------------- weights
def resolve_device(device: str) -> torch.device:
    """The configured device; auto takes a GPU when there is one. Raises ConfigError when it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"engine.device: {device!r} - must be auto, cpu, cuda or cuda:N") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ConfigError(f"engine.device: {device!r} - must be auto, cpu, cuda or cuda:N")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"engine.device: {device!r} - torch sees {torch.cuda.device_count()} CUDA devices here")
    return chosen


def resolve_dtype(dtype: Dtype, device: torch.device, config: PretrainedConfig) -> torch.dtype:
    """The configured dtype; auto is the checkpoint's own on a GPU and float32 on a CPU, where halves are slow."""
    if dtype != "auto":
        named: torch.dtype = getattr(torch, dtype)
        return named
    if device.type == "cpu":
        return torch.float32
    own = config.dtype
    return own if isinstance(own, torch.dtype) else torch.float32


def load(path: Path, dtype: torch.dtype, device: torch.device, cache_dir: Path | None = None) -> PreTrainedModel:
    """The model in `path` on `device`, in evaluation mode and without gradients. `cache_dir` is that of `resolve`.

    Raises SourceError when files are missing or damaged, UnsupportedModel when weights and architecture do not match.
    """
    config = read_config(path)
    borrowed = borrowed_weights(config, path, cache_dir)
    joined = joined_weights(path) if borrowed is None else read_weights(path) | borrowed
    with quiet_transformers():
        try:
            model, report = (AutoModelForCausalLM if joined is None else _class_of(config)).from_pretrained(
                path if joined is None else None,
                state_dict=joined,
                config=config,
                dtype=dtype,
                device_map=device,
                attn_implementation="sdpa",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise ConfigError(f"{path.name} does not fit into the memory of {device}: {ADVICE}. {first_line(error)}") from error
            raise SourceError(f"The weights in {path} cannot be loaded: {first_line(error)}") from error
    _require_matching_weights(report, path)
    model.eval()
    model.requires_grad_(False)
    return model


def _class_of(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class of a config's model; the one above finds it only for a folder."""
    with torch.device("meta"):
        return type(AutoModelForCausalLM.from_config(config))


def _require_matching_weights(report: dict[str, set[str]], path: Path) -> None:
    """transformers fills missing weights with random numbers and drops unknown ones, with a warning only."""
    for what in ("missing", "unexpected"):
        if keys := sorted(report[f"{what}_keys"]):
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            raise UnsupportedModel(f"{path} has {what} weights for its architecture: {', '.join(keys[:3])}{more}.")


# ---------------------------------------------------------------------- pairs
def check_pair(target: PairMember, drafter: PairMember) -> None:
    """Refuse a drafter whose token ids mean other tokens; rows beyond the tokenizer's last id are padding. Raises IncompatiblePair."""
    target_tokens, drafter_tokens = _tokens(target), _tokens(drafter)
    if target_tokens is None or drafter_tokens is None:
        if target.vocab_size != drafter.vocab_size:
            raise IncompatiblePair(
                f"The vocabularies of target {target.name} ({target.vocab_size} tokens) and drafter {drafter.name} "
                f"({drafter.vocab_size} tokens) differ, and without a tokenizer.json in both nobody can say that this is padding."
            )
        return
    for token_id in sorted(target_tokens.keys() | drafter_tokens.keys()):
        ours, theirs = target_tokens.get(token_id), drafter_tokens.get(token_id)
        if ours != theirs:
            raise IncompatiblePair(
                f"Target {target.name} and drafter {drafter.name} have different tokenizers: "
                f"token {token_id} is {ours!r} in the target and {theirs!r} in the drafter."
            )
    for member in (target, drafter):
        if member.vocab_size <= max(target_tokens, default=-1):
            raise IncompatiblePair(
                f"{member.name} has {member.vocab_size} embedding rows, fewer than the tokenizer shared by target {target.name} and "
                f"drafter {drafter.name} has tokens (last id {max(target_tokens)})."
            )


def _tokens(member: PairMember) -> dict[int, str] | None:
    """Id to token, added tokens included; None without a tokenizer.json."""
    file = member.path / "tokenizer.json"
    if not file.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the tokenizers package raises nothing narrower
        raise SourceError(f"{file} cannot be read: {first_line(error)}") from error
    return {token_id: token for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items()}
