"""What a .gguf file says of its model, and whether transformers' conversion keeps all of it.

The conversion drops entries and tensors that it has no place for, without a word: scaled rotary angles, windows, biases. So what is
known to be kept stands here, and a file that says more is refused. It reads names and numbers, never weights.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

from transformers.integrations.gguf import read_gguf_metadata

from engine.errors import SourceError, UnsupportedModel

_BLOCK = r"blk\.\d+\."
_TENSORS = rf"(token_embd|output_norm|output|{_BLOCK}(attn_(norm|q|k|v|output)|ffn_(norm|gate|up|down)))\.weight"
# by architecture: tensors beside those that all have. Gemma is not here: no entry holds its query_pre_attn_scalar or its local rope_theta
_TENSORS_OF = {
    "llama": _TENSORS,
    "qwen2": rf"{_TENSORS}|{_BLOCK}attn_[qkv]\.bias",
    "qwen3": rf"{_TENSORS}|{_BLOCK}attn_[qk]_norm\.weight",
}
_ENTRIES = frozenset(
    {
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",  # where it is not what the converted config has, the weights' shapes do not fit
        "attention.layer_norm_rms_epsilon",
        "attention.value_length",
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "rope.dimension_count",
        "rope.freq_base",
        "tensor_data_layout",
        "vocab_size",
    }
)


def require_convertible(gguf: Path) -> None:
    """Raises UnsupportedModel where a converted copy would compute something else, SourceError where the file is damaged."""
    try:
        metadata, tensors = read_gguf_metadata(str(gguf))
    except (OSError, ValueError, struct.error) as error:
        raise SourceError(f"{gguf} cannot be read as a GGUF model ({error}).") from error
    architecture = metadata["general.architecture"]
    if architecture not in _TENSORS_OF:
        served = ", ".join(sorted(_TENSORS_OF))
        raise UnsupportedModel(f"{gguf} has architecture {architecture!r}; as GGUF, {served} are served. Name the original weights.")
    own = {key.removeprefix(f"{architecture}."): value for key, value in metadata.items() if key.startswith(f"{architecture}.")}
    lost = [f"{key}: {value!r}" for key, value in own.items() if key not in _ENTRIES and (key, value) != ("rope.scaling.type", "none")]
    lost += [name for name in tensors if not re.fullmatch(_TENSORS_OF[architecture], name)]
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise UnsupportedModel(
            f"{gguf} has what the conversion would drop: {', '.join(sorted(lost)[:3])}{more}. Name the original weights."
        )
