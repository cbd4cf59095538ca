"""A model of the pair: where it is, whether it can be served, and loading it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from engine.config import ModelDrafterConfig, ModelSource, RuntimeConfig
from engine.model.attention import AttentionKind, AttentionShape
from engine.model.attention_choice import choose_attention
from engine.model.draft_vocabulary import read_draft_ids
from engine.model.linear import choose
from engine.model.loader import PairMember, context_length, end_token_ids, load, read_config, resolve_device, resolve_dtype
from engine.model.source import Progress, fetch_config, locate
from engine.model.stack import DecoderStack
from engine.model.state_adapter import StateAdapter, read_adapter
from engine.model.triton_layer import choose_layer_math


@dataclass(frozen=True)
class Member:
    """A loaded model of the pair."""

    stack: DecoderStack
    context_length: int
    path: Path  # folder with tokenizer and configs
    end_token_ids: tuple[int, ...] = ()


def pair_member(source: ModelSource, path: Path) -> PairMember:
    return PairMember(source.source, path, read_config(path).vocab_size)


def refuse_early(source: ModelSource) -> None:
    """Read a hub model's config before its weights are fetched: gigabytes may take an hour, a refusal should not."""
    if locate(source) is None:
        folder = fetch_config(source)
        if folder is not None:
            read_config(folder)


def load_member(source: ModelSource, path: Path, runtime: RuntimeConfig, cache_dir: Path | None, progress: Progress) -> Member:
    config, device = read_config(path), resolve_device(runtime.device)
    dtype = resolve_dtype(source.dtype, device, config)
    kind = choose(source.quantization, dtype, device)
    progress(f"Loading {path.name} as {str(dtype).removeprefix('torch.')} on {device}, {kind.note}")
    model, draft_ids = load(path, dtype, device, cache_dir), read_draft_ids(path, config.vocab_size)
    block_size, math = runtime.block_size, choose_layer_math(dtype, device, progress)
    is_recording = runtime.cuda_graphs != "off"

    def attention(shape: AttentionShape) -> AttentionKind:
        return choose_attention(runtime.attention, shape, block_size, progress, is_recording=is_recording)

    stack = DecoderStack(model, kind, draft_ids, attention, block_size, math)
    if isinstance(source, ModelDrafterConfig) and source.target_states:
        weights = read_adapter(path, stack.config.hidden_size, dtype, device)
        stack.adapter = None if weights is None else StateAdapter(weights, kind)
    return Member(stack, context_length(config), path, end_token_ids(path))
