"""Which layers are of the plain build is seen in what they compute; those of any other build keep their own forward."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from engine.kv.cache import KVCache
from engine.model.attention import Segment
from engine.model.layer_math import TorchMath
from engine.model.plain_layer import OwnLayer, PlainLayer, why_not_plain
from engine.model.stack import DecoderStack
from tests.tiny import ARCHITECTURES, target_model, tiny_config

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


class Noting(TorchMath):
    """Torch's way, with a log."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, note: str) -> None:
        self.said.append(note)


def reason_of(layer: Any, dtype: torch.dtype = torch.float64) -> str | None:
    return why_not_plain(layer.to(dtype), torch.ones(3, 16, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_plain_build_is_known_by_what_it_computes(architecture: str, dtype: torch.dtype) -> None:
    model = copy.deepcopy(target_model(architecture=architecture))
    reasons = {reason_of(layer, dtype) for layer in model.model.layers}
    if architecture == "gemma3_text":
        assert [reason for reason in reasons if reason and "pre_feedforward_layernorm" in reason]
        assert len(reasons) == 1
    else:
        assert reasons == {None}


class _Llama(LlamaDecoderLayer):  # type: ignore[misc]  # transformers' classes are untyped
    def __init__(self) -> None:
        super().__init__(tiny_config(), 0)

    def parts(self, h: Tensor, called: dict[str, Any]) -> tuple[Tensor, Tensor]:
        attended = self.self_attn(hidden_states=self.input_layernorm(h), **called)[0]
        return attended, self.mlp(self.post_attention_layernorm(h + attended))


class _Plain(_Llama):
    def forward(self, h: Tensor, **called: Any) -> Any:
        attended, fed = self.parts(h, called)
        return h + attended + fed


class _Multiplied(_Llama):
    def forward(self, h: Tensor, **called: Any) -> Any:
        attended, fed = self.parts(h, called)
        return h + attended + 1.05 * fed


class _Parallel(_Llama):
    def forward(self, h: Tensor, **called: Any) -> Any:
        return h + self.parts(h, called)[0] + self.mlp(self.post_attention_layernorm(h))


class _OneNorm(_Llama):
    def forward(self, h: Tensor, **called: Any) -> Any:
        h = h + self.parts(h, called)[0]
        return h + self.mlp(self.input_layernorm(h))


class _Swapped(_Llama):
    def forward(self, h: Tensor, **called: Any) -> Any:
        h = h + self.self_attn(hidden_states=self.post_attention_layernorm(h), **called)[0]
        return h + self.mlp(self.input_layernorm(h))


class _Behind(_Llama):
    def forward(self, h: Tensor, **called: Any) -> Any:
        h = h + self.input_layernorm(self.self_attn(hidden_states=h, **called)[0])
        return h + self.post_attention_layernorm(self.mlp(h))


class _Clamped(_Llama):
    def forward(self, h: Tensor, **called: Any) -> Any:
        attended, fed = self.parts(h, called)
        return (h + attended + fed).clamp(-3, 3)


class _Residual(_Llama):
    def forward(self, h: Tensor, **called: Any) -> Any:
        normed = self.input_layernorm(h)
        h = normed + self.self_attn(hidden_states=normed, **called)[0]
        return h + self.mlp(self.post_attention_layernorm(h))


class _Pair(_Plain):
    def forward(self, h: Tensor, **called: Any) -> Any:
        return (super().forward(h, **called),)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("build", [_Multiplied, _Parallel, _OneNorm, _Swapped, _Behind, _Clamped, _Residual, _Pair])
def test_any_other_build_of_the_same_parts_is_told_from_it(build: type[_Llama], dtype: torch.dtype) -> None:
    assert reason_of(_Plain(), dtype) is None
    assert reason_of(build(), dtype) == f"{build.__name__} does more with what its parts give than to add it up"


def test_a_part_more_or_less_is_another_build() -> None:
    layer = _Plain()
    layer.dropout = torch.nn.Identity()
    assert reason_of(layer) == "_Plain is made of dropout, input_layernorm, mlp, post_attention_layernorm, self_attn"


def test_parts_compute_what_they_did_again() -> None:
    layer = _Plain()
    layer.mlp.forward = lambda x: 2 * x
    forwards = [child.forward for child in layer.children()]
    assert reason_of(layer) is None
    assert [child.forward for child in layer.children()] == forwards
    assert "forward" not in layer.self_attn.__dict__
    assert torch.equal(layer.mlp(torch.ones(3)), torch.full((3,), 2.0))


@pytest.mark.parametrize(("multiplier", "kind"), [(1.0, PlainLayer), (0.5, OwnLayer)])
def test_a_model_with_a_multiplier_keeps_its_forward_and_it_is_said(multiplier: float, kind: type[torch.nn.Module]) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.4}
    granite = AutoConfig.for_model("granite", vocab_size=24, num_hidden_layers=2, residual_multiplier=multiplier, **sizes)
    model = AutoModelForCausalLM.from_config(granite).to(torch.float64).eval().requires_grad_(False)
    math = Noting()
    stack = DecoderStack(model, math=math)  # whose logits are compared with the model's own
    assert {type(layer) for layer in stack._body.layers} == {kind}
    why = "Layers keep their own forward, which sums and norms one after another: GraniteDecoderLayer does more"
    assert [said.startswith(why) for said in math.said] == ([True, True] if kind is OwnLayer else [])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_can_be_run_a_few_at_a_time(architecture: str) -> None:
    stack = DecoderStack(copy.deepcopy(target_model(architecture=architecture)))
    ids, cache = torch.arange(7), KVCache(stack.num_layers, 16, stack.kv_shape, stack.dtype, stack.device)
    context = stack.attention.over(cache, 4, stack.attention_shape).context([Segment([2, 1], 0, 7)])
    with torch.inference_mode():
        want = stack.hidden(ids, context)
        stream = stack.layers(stack.embed(ids), context, 0, 1)
        stream = stack.layers(stream, context, 1, stack.num_layers)
        assert torch.equal(stack._body.norm(*stream), want)
