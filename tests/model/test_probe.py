"""What layers ask of attention is observed; what they ask and do not get is refused; a sliding layer reads its window and no more."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch

from engine.errors import UnsupportedModel
from engine.kv.cache import KVCache
from engine.model.attention import Segment
from engine.model.gather_attention import paged_context
from engine.model.paged import PagedModel
from engine.model.stack import DecoderStack
from tests.tiny import VOCAB, WINDOW, target_model

CPU = torch.device("cpu")


def model(architecture: str = "llama") -> Any:
    return copy.deepcopy(target_model(architecture=architecture))


@pytest.mark.parametrize(
    ("architecture", "windows", "kv_shape"),
    [
        ("llama", (None,), (2, 4)),
        ("qwen2", (None, WINDOW), (2, 4)),
        ("qwen3", (WINDOW, None), (2, 6)),
        ("mistral", (WINDOW,), (2, 8)),
        ("gemma3_text", (WINDOW, None), (2, 8)),
    ],
)
def test_windows_and_shapes_are_observed(architecture: str, windows: tuple[int | None, ...], kv_shape: tuple[int, int]) -> None:
    stack = DecoderStack(model(architecture))
    assert stack.windows == windows
    assert stack.kv_shape == kv_shape


@pytest.mark.parametrize("keyword", ["softcap", "s_aux", "position_bias"])
def test_a_keyword_that_changes_attention_is_refused(keyword: str) -> None:
    asking = model("qwen3")
    layer = asking.model.layers[1]
    layer.forward = functools.partial(layer.forward, **{keyword: torch.ones(4)})
    with pytest.raises(UnsupportedModel, match=f"^qwen3: layer 1 asks its attention for {keyword}"):
        DecoderStack(asking)


def test_a_mask_of_its_own_is_refused_where_no_short_text_would_show_it() -> None:
    """The layers speak of 40 positions, the model's masks hide what is 41 back: nine tokens cannot tell."""
    asking = model("mistral")
    asking.config.sliding_window = 40
    DecoderStack(copy.deepcopy(asking))
    for layer in asking.model.layers:
        layer.forward = functools.partial(_with_window, layer, asking.config, 40)
    asking.config.sliding_window = 41
    with pytest.raises(UnsupportedModel, match=r"^mistral: layer 0 hides other keys than those behind its window of 40"):
        DecoderStack(asking)


def _with_window(layer: Any, config: Any, window: int, *args: Any, **kwargs: Any) -> Any:
    masked_with, config.sliding_window = config.sliding_window, window
    try:
        return type(layer).forward(layer, *args, **kwargs)
    finally:
        config.sliding_window = masked_with


def test_a_model_without_a_mask_at_the_edge_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.models.mistral.modeling_mistral.create_sliding_window_causal_mask", lambda **_: None)
    asking = model("mistral")
    asking.config.sliding_window = 40
    with pytest.raises(UnsupportedModel, match=r"^mistral: layer 0 hides other keys"):
        DecoderStack(asking)


def test_a_layer_that_asks_for_no_attention_is_refused() -> None:
    asking = model()
    asking.model.layers[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(UnsupportedModel, match=r"^llama: layers \[1\] ask for no attention"):
        DecoderStack(asking)


def test_layers_of_different_shapes_are_refused() -> None:
    asking = model()
    config = copy.deepcopy(asking.config)
    config.num_key_value_heads = 4
    attention = type(asking.model.layers[1].self_attn)(config, 1).to(torch.float64)
    attention.config = asking.config
    asking.model.layers[1].self_attn = attention
    with pytest.raises(UnsupportedModel, match=r"^llama: layers differ .* \[\(2, 4\), \(4, 4\)\]"):
        DecoderStack(asking)


def test_a_window_costs_its_own_keys_and_a_short_text_no_second_mask() -> None:
    cache = KVCache(1, 2048, (1, 1), torch.float64, CPU)
    long = paged_context([Segment(range(128), 1000, 3)], 16, cache, (None, 8, 4096))
    assert [long.groups[window][0].slots.shape for window in (None, 8)] == [(1, 1003), (1, 10)]
    assert long.groups[4096] is long.groups[None]


def test_what_lies_behind_the_window_is_not_read() -> None:
    """Infinities there would become NaN under any mask."""
    paged = PagedModel(DecoderStack(model("mistral")), 8, 4)
    text = [7 * i % VOCAB for i in range(24)]
    with torch.inference_mode():
        want = target_model(architecture="mistral")(torch.tensor([text]), use_cache=False).logits[0, 20:]
    paged.forward([Segment(range(8), 0, 20)], torch.tensor(text[:20]), [])
    for store in paged._cache.layers:
        store[: 20 - WINDOW + 1] = torch.inf
    got = paged.forward([Segment(range(8), 20, 4)], torch.tensor(text[20:]), range(4))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-10)
