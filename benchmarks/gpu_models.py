"""Models of real shapes with random weights, made on the device, and a pair that agrees as often as is asked for. Reads nothing.

What a pass costs depends on shapes, not on what weights say. What speculation brings depends on how often drafts stand as well, and
random models never agree. So the pair's agreement is *tuned*: the drafter is the target's own first layer with its embedding, norm and
head, and what the target's later layers add is scaled until the target says what the first layer says as often as is wanted. Such a figure
is right for a drafter of this cost and this agreement. It says nothing of how often real drafters are right; wherever it is shown, it is
said.
"""

from __future__ import annotations

import copy
import logging
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from pydantic import ByteSize
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.errors import BenchmarkError
from benchmarks.programs import EngineProgram
from engine.build import Costs, Extras, assemble
from engine.config import (
    EngineConfig,
    FixedLengthConfig,
    LengthConfig,
    ModelDrafterConfig,
    ModelPair,
    ModelSource,
    NoDrafterConfig,
    RuntimeConfig,
    SpeculationConfig,
)
from engine.model.attention import AttentionKind, AttentionShape
from engine.model.attention_choice import choose_attention
from engine.model.layer_math import LayerMath
from engine.model.linear import AS_THEY_ARE, LinearKind
from engine.model.loader import quiet_transformers
from engine.model.member import Member
from engine.model.paged import kv_bytes_per_token
from engine.model.stack import DecoderStack
from engine.model.triton_layer import choose_layer_math
from engine.request import SpeculationParams

_log = logging.getLogger(__name__)

RANDOM_WEIGHTS = "random-weights"  # in the place of a source
_BLOCK_SIZE = 16
_SPARE = 16  # positions of a sequence behind its last token, for drafts
_DAMPING = 1 / 16  # of later layers, to begin with: a deep model with random weights in bfloat16 would be near chaos

Ids = tuple[int, ...]


@dataclass(frozen=True)
class Shape:
    """What is made, and how much it is asked."""

    name: str
    dtype: torch.dtype
    target: Mapping[str, Any]
    drafter: Mapping[str, Any]
    copy_bytes: int  # of the measure of copying
    matrix: int  # rows of the matrices of the measure of products
    prefill: int  # tokens of a long prompt
    chunk: int  # tokens of a step
    context: int  # of each sequence of a large batch
    prompt: int  # tokens of other prompts
    answer: int  # tokens of an answer
    prompts: int  # of a comparison
    steps: int  # that are timed at once
    probes: tuple[int, int]  # streams and tokens of each that tell how often a pair agrees
    tolerance: float  # of that share


_COMMON = {"max_position_embeddings": 16_384}
FULL = Shape(
    name="full",
    dtype=torch.bfloat16,
    target={  # Llama 3.1 8B
        **_COMMON,
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": False,
    },
    drafter={  # Qwen3 0.6B with the target's vocabulary
        **_COMMON,
        "model_type": "qwen3",
        "vocab_size": 128_256,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
    copy_bytes=2 << 30,
    matrix=8192,
    prefill=8192,
    chunk=2048,
    context=1000,
    prompt=200,
    answer=128,
    prompts=6,
    steps=8,
    probes=(64, 32),
    tolerance=0.015,
)
_TINY = {**_COMMON, "vocab_size": 256, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY = Shape(
    name="tiny",
    dtype=torch.float32,
    target={**_TINY, "model_type": "llama", "num_hidden_layers": 3, "head_dim": 8, "initializer_range": 0.2, "tie_word_embeddings": False},
    drafter={**_TINY, "model_type": "qwen3", "num_hidden_layers": 2, "head_dim": 8, "tie_word_embeddings": True},
    copy_bytes=1 << 20,
    matrix=64,
    prefill=96,
    chunk=64,
    context=40,
    prompt=12,
    answer=10,
    prompts=2,
    steps=2,
    probes=(32, 12),
    tolerance=0.08,
)
SHAPES = {shape.name: shape for shape in (FULL, TINY)}


# ---------------------------------------------------------------------- models
def random_model(shape: Mapping[str, Any], dtype: torch.dtype, device: torch.device) -> Any:
    """A transformers model of this shape whose weights were drawn where they stay."""
    entries = dict(shape)
    config = AutoConfig.for_model(entries.pop("model_type"), **entries)
    torch.manual_seed(0)
    with quiet_transformers(), torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.eval().requires_grad_(False)
    if not config.tie_word_embeddings:  # so that what comes next hangs on the last token, and greedy text does not stand still
        model.model.embed_tokens.weight.div_(config.initializer_range)
    _damp(model, 1)
    return model


def first_layers(model: Any, num: int) -> Any:
    """A model of the first layers of another one, whose weights are the very same."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = num
    with quiet_transformers(), torch.device("meta"):
        small = AutoModelForCausalLM.from_config(config, dtype=model.dtype, attn_implementation="sdpa")
    own = model.state_dict()
    small.load_state_dict({name: own[name] for name in small.state_dict()}, assign=True)
    small.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)  # its angles are no part of the weights
    return small.eval().requires_grad_(False)


def member(model: Any, kind: LinearKind = AS_THEY_ARE, math: LayerMath | None = None) -> Member:
    """The same model for an engine, attention as `auto` has it. Weights are shared as far as the engine does not join them; `model` stays
    of use.

    `math` is what it computes between its products with; None for what a deployment would get.
    """
    shared = {id(weight): weight for weight in model.parameters()}
    math = choose_layer_math(model.dtype, model.device, _log.info) if math is None else math
    stack = DecoderStack(copy.deepcopy(model, shared), kind, None, partial(_attention, _log.info), _BLOCK_SIZE, math)
    return Member(stack, model.config.max_position_embeddings, Path(RANDOM_WEIGHTS))


def _attention(say: Callable[[str], None], shape: AttentionShape) -> AttentionKind:
    return choose_attention("auto", shape, _BLOCK_SIZE, say, is_recording=True)


def read_bytes(model: Any) -> int:
    """Bytes of weights that a pass of one token reads: all but the embedding, of which it is one row, unless that is the head as well."""
    weights = sum(int(weight.nbytes) for weight in model.parameters())
    return weights if model.config.tie_word_embeddings else weights - int(model.model.embed_tokens.weight.nbytes)


def pass_operations(model: Any, num_tokens: int) -> float:
    """Floating-point operations of a prompt: products with the layers' weights, causal attention, and the head for one token."""
    config = model.config
    in_layers = sum(int(weight.numel()) for weight in model.model.layers.parameters() if weight.ndim == 2)
    width = config.num_attention_heads * config.head_dim
    attention = 2.0 * num_tokens**2 * int(width * config.num_hidden_layers)  # half of 4 n^2 width: nobody looks ahead
    return 2.0 * num_tokens * in_layers + attention + 2 * int(model.lm_head.weight.numel())


def _later_weights(model: Any, first: int) -> list[torch.Tensor]:
    """Those through which later layers add to what earlier ones said."""
    return [weight for layer in model.model.layers[first:] for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight)]


def _damp(model: Any, first: int) -> None:
    for weight in _later_weights(model, first):
        weight.mul_(_DAMPING)


# ---------------------------------------------------------------------- agreement
class AgreeingPair:
    """A target, and as its drafter its own first layer. What later layers add can be scaled, in transformers' model and ours alike."""

    def __init__(self, shape: Shape, device: torch.device):
        self._shape = shape
        self.model = random_model(shape.target, shape.dtype, device)
        self.drafting_model = first_layers(self.model, 1)
        self._later = _later_weights(self.model, 1)
        self._full = [weight.clone() for weight in self._later]
        self.target, self.drafter = member(self.model), member(self.drafting_model)
        self._prompts = RandomPrompts(self.model.config.vocab_size, seed=1)
        self._factors: dict[float, tuple[float, float]] = {}  # and the share that was measured with it

    def scale(self, factor: float) -> None:
        """Have later layers add so many times what they added at first."""
        for weight, full in zip(self._later, self._full, strict=True):
            torch.mul(full, factor, out=weight)

    def agree(self, goal: float) -> dict[str, float]:
        """Scale until so large a share of greedy drafts stands. Returns factor and share."""
        if goal not in self._factors:
            self._factors[goal] = bisect(self._share_at, goal, self._shape.tolerance)
        factor, share = self._factors[goal]
        self.scale(factor)
        return {"tuned_agreement": share, "factor": factor}

    def _share_at(self, factor: float) -> float:
        """Of drafts, one at a time so that each has only what stands in front of it."""
        self.scale(factor)
        num_streams, num_tokens = self._shape.probes
        room = self._shape.prompt + num_tokens
        asked = Asked(num_streams, room, FixedLengthConfig(max=1), is_recorded=False)  # recording would take longer than it saves
        program = program_of(self._shape, asked, self.target, self.drafter)
        runs = program.answers([self._prompts.new(self._shape.prompt) for _ in range(num_streams)], num_tokens, stops=False)
        return sum(run.num_accepted for run in runs) / sum(run.num_draft for run in runs)


def bisect(share_at: Callable[[float], float], goal: float, tolerance: float) -> tuple[float, float]:
    """Where a share that falls with its argument, about, is `goal`: (argument, share). Raises BenchmarkError where it is found nowhere."""
    low, high = 0.0, 1.0
    while share_at(high) > goal:
        low, high = high, 4 * high
        if high > 1e4:
            raise BenchmarkError(f"A share of {goal} is reached nowhere: at {low:g} times the weights it is larger still.")
    tried = list[tuple[float, float]]()
    for _ in range(20):
        middle = (low + high) / 2
        tried.append((middle, share_at(middle)))
        if abs(tried[-1][1] - goal) <= tolerance:
            return tried[-1]
        low, high = (middle, high) if tried[-1][1] > goal else (low, middle)
    best = min(tried, key=lambda pair: abs(pair[1] - goal))
    if abs(best[1] - goal) > 2 * tolerance:
        raise BenchmarkError(f"A share of {goal} was not found: the nearest was {best[1]:.3f}.")
    return best


# ---------------------------------------------------------------------- engines and prompts
NONE = FixedLengthConfig(max=0)


@dataclass(frozen=True)
class Asked:
    """What an engine is to hold, and how long it drafts."""

    num_sequences: int
    num_tokens: int  # of each, prompt and answer
    length: LengthConfig = NONE
    costs: Costs | None = None
    is_recorded: bool = True  # small passes, where there is a GPU


def program_of(shape: Shape, asked: Asked, target: Member, drafter: Member | None = None) -> EngineProgram:
    """An engine over models that are there, whose requests are judged by `exact`. Memory is taken for what was asked and no more."""
    members = [target, *([drafter] if drafter else [])]
    blocks = asked.num_sequences * (-(-(asked.num_tokens + _SPARE) // _BLOCK_SIZE) + 1)
    config = EngineConfig(
        model=ModelPair(
            name="random",
            target=ModelSource(source=RANDOM_WEIGHTS),
            drafter=ModelDrafterConfig(source=RANDOM_WEIGHTS) if drafter else NoDrafterConfig(),
        ),
        speculation=SpeculationConfig(rule="exact", draft_length=asked.length),
        engine=RuntimeConfig(
            device=str(target.stack.device),
            max_sequences=asked.num_sequences,
            max_step_tokens=max(shape.chunk, 9 * asked.num_sequences),
            block_size=_BLOCK_SIZE,
            cuda_graphs="auto" if asked.is_recorded else "off",
            kv_cache=ByteSize(blocks * _BLOCK_SIZE * sum(kv_bytes_per_token(each.stack) for each in members)),
        ),
    )
    return EngineProgram(assemble(config, target, drafter, Extras(costs=asked.costs, progress=_log.info)), SpeculationParams(rule="exact"))


class RandomPrompts:
    """Prompts of random tokens, of which no two begin alike."""

    def __init__(self, vocab_size: int, seed: int = 0):
        self._random, self._vocab_size = random.Random(seed), vocab_size

    def new(self, num_tokens: int) -> Ids:
        return tuple(self._random.randrange(self._vocab_size) for _ in range(num_tokens))


class Models:
    """What bars share, each made when it is first asked for."""

    def __init__(self, shape: Shape, device: torch.device):
        self.shape, self.device = shape, device
        self.prompts = RandomPrompts(shape.target["vocab_size"])

    @cached_property
    def pair(self) -> AgreeingPair:
        return AgreeingPair(self.shape, self.device)

    @cached_property
    def small(self) -> Any:
        """The drafter's shape."""
        return random_model(self.shape.drafter, self.shape.dtype, self.device)

    @cached_property
    def drafter(self) -> Member:
        return member(self.small)
