"""`python -m engine.model.convert FILE.gguf FOLDER`: write a GGUF model in float32 and the transformers format.

Run by gguf_cache in a process of its own, which takes the memory of the conversion and transformers' progress bars with it.
It keeps no cache: whatever transformers raises ends it, and its last line of output says why. What transformers would convert into
another model is refused first, and a tensor that the file lacks is not made up.

Its standard input is a pipe whose other end only its parent holds. When the pipe ends, so does this process, however the parent went:
nobody would use the copy, and the next one to ask for it clears the folder away. By hand: `sleep infinity | python -m ...`.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from engine.errors import EngineError, UnsupportedModel
from engine.model.gguf_metadata import require_convertible


def convert(gguf: Path, folder: Path) -> None:
    """Fill `folder` with config, weights, tokenizer and chat template. Raises UnsupportedModel."""
    require_convertible(gguf)
    # Without dequantize=True transformers keeps packed tensors, and refuses to save them.
    model, report = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
    )
    if report["missing_keys"]:
        raise UnsupportedModel(f"{gguf} lacks weights of its architecture: {', '.join(sorted(report['missing_keys'])[:3])}.")
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _end_with_parent() -> None:
    """Block until standard input ends, then end this process, whatever its other threads are doing."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    except EngineError as error:
        sys.exit(str(error))
