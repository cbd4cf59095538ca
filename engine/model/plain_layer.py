"""Decoder layers as the layer loop calls them, and which of them are of the plain build.

A plain layer is h + attention(norm(h)), then h + feed-forward(norm(h)), and nothing else. Its forward is not needed: the loop itself holds
the states and what is still to be added to them, so that a sum and the norm behind it, which may be the next layer's, are one operation.
No layer is known by name, nor by its class: a layer's own forward is run over stand-ins for its parts, and has to give the bits of the
plain build. Layers of any other build keep their own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from engine.model.attention import PagedContext
from engine.model.layer_math import Rotary

Stream = tuple[Tensor, Tensor | None]  # states [N, hidden], and what is to be added to them yet

_PARTS = ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")
_ROWS = 8  # of the trial


class PlainLayer(nn.Module):
    """The plain build, of a layer's own parts."""

    def __init__(self, own: Any):
        super().__init__()
        self.input_layernorm, self.self_attn = own.input_layernorm, own.self_attn
        self.post_attention_layernorm, self.mlp = own.post_attention_layernorm, own.mlp

    def forward(self, stream: Stream, rotary: Rotary, paged: PagedContext) -> Stream:
        """Overwrites the states."""
        h, delta = stream
        delta = self.self_attn.attend(self.input_layernorm(h, delta), rotary, paged)
        return h, self.mlp(self.post_attention_layernorm(h, delta))


class OwnLayer(nn.Module):
    """A layer that keeps its forward."""

    def __init__(self, own: nn.Module):
        super().__init__()
        self.own = own

    def forward(self, stream: Stream, rotary: Rotary, paged: PagedContext) -> Stream:
        """States with nothing left to be added."""
        h = stream[0] if stream[1] is None else stream[0].add_(stream[1])
        positions = paged.positions.unsqueeze(0)
        return self.own(h.unsqueeze(0), position_embeddings=rotary, position_ids=positions, attention_mask=None, paged=paged)[0], None


def _wave(frequency: float) -> Callable[[Tensor], Tensor]:
    return lambda x: (frequency * x + frequency).sin_()


_NORM, _ATTENTION, _OTHER_NORM, _MLP = (_wave(frequency) for frequency in (1.3, 2.1, 3.7, 4.9))
_STAND_INS: Mapping[str, Callable[..., Any]] = {
    "input_layernorm": _NORM,
    "self_attn": lambda hidden_states, **_: (_ATTENTION(hidden_states), None),
    "post_attention_layernorm": _OTHER_NORM,
    "mlp": _MLP,
}


@torch.inference_mode()
def why_not_plain(layer: nn.Module, like: Tensor) -> str | None:
    """Why a transformers layer, its parts still its own, is not of the plain build; None if it is. `like` [..., hidden] is as its states.

    The stand-ins are functions of which none is another's inverse, multiple or power: whatever else a layer does to what its parts give,
    or in another order, shows in its dtype's bits, or is too little to have any.
    """
    children = sorted(name for name, _ in layer.named_children())
    if children != sorted(_PARTS):
        return f"{type(layer).__name__} is made of {', '.join(children)}"
    h = torch.linspace(-3, 3, _ROWS * like.shape[-1], device=like.device).view(1, _ROWS, -1).to(like.dtype)
    between = h + _ATTENTION(_NORM(h))
    wanted = between + _MLP(_OTHER_NORM(between))
    with _stood_in_for(layer):
        got = layer(h.clone(), position_embeddings=None, position_ids=None, attention_mask=None, paged=None)
    if isinstance(got, Tensor) and torch.equal(got, wanted):
        return None
    return f"{type(layer).__name__} does more with what its parts give than to add it up"


@contextmanager
def _stood_in_for(layer: nn.Module) -> Iterator[None]:
    """Have the stand-ins in the places of what its parts compute, until the end of the block."""
    parts = [getattr(layer, name) for name in _PARTS]
    before = [part.__dict__.get("forward") for part in parts]
    for name, part in zip(_PARTS, parts, strict=True):
        part.forward = _STAND_INS[name]
    try:
        yield
    finally:
        for part, forward in zip(parts, before, strict=True):
            del part.forward
            if forward is not None:
                part.forward = forward
