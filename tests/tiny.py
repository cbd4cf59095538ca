"""Tiny random models in float64, engines over them, and a driver that checks the bookkeeping after every step."""

from __future__ import annotations

import copy
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from llguidance import LLTokenizer, TokenizerWrapper
from pydantic import ByteSize
from transformers import AutoConfig, AutoModelForCausalLM

from engine.build import Costs, Extras, assemble
from engine.config import (
    CopyingConfig,
    DrafterConfig,
    EngineConfig,
    FixedLengthConfig,
    LengthConfig,
    ModelDrafterConfig,
    ModelPair,
    ModelSource,
    NGramDrafterConfig,
    NoDrafterConfig,
    RuntimeConfig,
    SpeculationConfig,
)
from engine.core import EngineCore
from engine.grammar.automaton import Vocabulary
from engine.model.attention import AttentionKind
from engine.model.gather_attention import GATHER
from engine.model.graphs import Recorder
from engine.model.layer_math import TORCH, LayerMath
from engine.model.member import Member
from engine.model.paged import kv_bytes_per_token
from engine.model.stack import DecoderStack
from engine.model.state_adapter import AdapterWeights, StateAdapter
from engine.plan import LogitsProcessor, RawRows, RowBatch, Rule
from engine.request import FinishReason, Request, Round, TokenLogprobs
from engine.stats import StepStats
from engine.verify.rules import RULES
from tests.reference import NaiveCopying, NaiveModel, Row

VOCAB = 24
END = 23  # ends what a grammar rules; the other tokens are the letters from a on


WINDOW = 5  # shorter than nearly every text of the tests
_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
# what each architecture has beside a common shape; heads are not hidden_size / num_attention_heads wide where that can be said
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 2},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": _MIXED, "head_dim": 6},
    "mistral": {"sliding_window": WINDOW, "head_dim": 8},
    "gemma3_text": {
        "sliding_window": WINDOW,
        "layer_types": _MIXED,
        "head_dim": 8,
        "query_pre_attn_scalar": 11,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 8.0},
        },
    },
}


def tiny_config(architecture: str = "llama", vocab: int = VOCAB, **changes: Any) -> Any:
    """The transformers config of a tiny model."""
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.4,
        "attn_implementation": "sdpa",
        "tie_word_embeddings": False,
    }
    return AutoConfig.for_model(architecture, vocab_size=vocab, **(shape | ARCHITECTURES[architecture] | changes))


@cache
def target_model(dtype: torch.dtype = torch.float64, vocab: int = VOCAB, architecture: str = "llama") -> Any:
    """A random model whose rows are far from uniform."""
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(tiny_config(architecture, vocab)).to(dtype).eval().requires_grad_(False)
    if architecture != "llama":
        for weight in model.parameters():
            if weight.ndim == 1:  # norms and biases, which start as ones and zeros
                weight += 0.3 * torch.randn(weight.shape, dtype=dtype)
    return model


@cache
def drafter_model(dtype: torch.dtype = torch.float64, vocab: int = VOCAB, architecture: str = "llama") -> Any:
    """The target with noise on every weight: it agrees often, and not always."""
    model = copy.deepcopy(target_model(dtype, vocab, architecture))
    generator = torch.Generator().manual_seed(12)
    for weight in model.parameters():
        weight += 0.05 * torch.randn(weight.shape, generator=generator, dtype=dtype)
    return model


@cache
def adapter_weights(is_chained: bool = True) -> AdapterWeights:
    """A random adapter of the pair."""
    torch.manual_seed(13)
    weights = AdapterWeights(16, 6, 16, is_chained).double().requires_grad_(False)
    for weight in weights.parameters():
        weight.normal_(std=0.5)
    return weights


@cache
def naive_target(architecture: str = "llama") -> NaiveModel:
    return NaiveModel(target_model(architecture=architecture))


@cache
def naive_drafter(context: int = 10**9, drafted: tuple[int, ...] | None = None, doubt: float | None = None) -> NaiveModel:
    """`drafted` are the tokens of a reduced vocabulary, None for all; `doubt` is that of copying, None for none."""
    model = NaiveModel(drafter_model() if drafted is None else partial(_never_beside, drafted), context)
    return model if doubt is None else NaiveCopying(model, doubt)


def _never_beside(drafted: tuple[int, ...], ids: torch.Tensor, use_cache: bool) -> Any:
    """The drafter with a head over some tokens, written out."""
    output = drafter_model()(ids, use_cache=use_cache)
    others = [token_id for token_id in range(VOCAB) if token_id not in drafted]
    output.logits[..., others] = -1e4
    return output


class KeepNone:
    """A test rule that keeps nothing, and does not say so beforehand: pi = p, computed the long way."""

    needs_q = False
    is_lossless = False
    is_lenient = False

    def keep(self, raw: RawRows, alpha: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(raw.p, dtype=torch.bool)


class KeepAll:
    """Never defers: the drafter alone writes."""

    needs_q = True
    is_lossless = False
    is_lenient = False

    def keep(self, raw: RawRows, alpha: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(alpha, dtype=torch.bool)


class ForbidByPosition:
    """A hard mask that forbids two tokens, other ones at every position."""

    is_mask = True

    def apply(self, logits: torch.Tensor, rows: RowBatch) -> torch.Tensor:
        lengths = [len(seq.tokens) + offset for seq, offset in zip(rows.seqs, rows.offsets, strict=True)]
        forbidden = torch.tensor([[7 * n % VOCAB, (3 * n + 1) % VOCAB] for n in lengths]).reshape(-1, 2)
        return logits.scatter(-1, forbidden, -torch.inf)


def forbid_by_position(tokens: list[int], logits: Row) -> Row:
    """The same for the oracle."""
    forbidden = (7 * len(tokens) % VOCAB, (3 * len(tokens) + 1) % VOCAB)
    return tuple(-math.inf if i in forbidden else x for i, x in enumerate(logits))


class PenaliseRepeats:
    """A soft penalty on every token of the text so far, the drafts in front of the row included."""

    is_mask = False

    def apply(self, logits: torch.Tensor, rows: RowBatch) -> torch.Tensor:
        penalties = torch.zeros_like(logits)
        for row, (seq, offset, draft) in enumerate(zip(rows.seqs, rows.offsets, rows.draft_index, strict=True)):
            text = [*seq.tokens, *rows.draft_ids[draft, :offset].tolist()]
            penalties[row] = 0.5 * torch.bincount(torch.tensor(text), minlength=VOCAB)
        return logits - penalties


def penalise_repeats(tokens: list[int], logits: Row) -> Row:
    """The same for the oracle."""
    counts = Counter(tokens)
    return tuple(x - 0.5 * counts[i] for i, x in enumerate(logits))


TEST_RULES: dict[str, Rule] = {
    **RULES,
    "keep_none": KeepNone(),
    "keep_all": KeepAll(),
}


@dataclass(frozen=True)
class Setup:
    """One configuration of the engine under test."""

    architecture: str = "llama"
    drafter: str = "model"  # none, ngram, model
    drafter_context: int = 10**9
    drafted: tuple[int, ...] | None = None  # the tokens of a drafter's reduced vocabulary; None for all
    doubt: float | None = None  # of copying; None for none
    reads_states: Literal["", "first", "all"] = ""  # whose rows of a round the drafter's adapter changes, if it has one
    policy: LengthConfig = field(default_factory=lambda: FixedLengthConfig(max=4))
    verification: Literal["token", "block"] = "token"
    num_blocks: int = 64
    block_size: int = 4
    max_step_tokens: int = 32
    max_drafter_tokens: int | None = None
    max_sequences: int = 8
    device: str = "cpu"
    dtype: torch.dtype = torch.float64
    attention: AttentionKind = GATHER
    recorder: Recorder | None = None  # of passes
    cuda_graph_memory: int = 1 << 30
    math: LayerMath = TORCH
    vocab: int = VOCAB
    path: Path = Path("target")  # folder with the tokenizer, for tests that have one
    end_token_ids: tuple[int, ...] = ()
    processors: tuple[LogitsProcessor, ...] = ()


class _Letters:
    """The tiny vocabulary as llguidance asks for it."""

    eos_token_id = END
    bos_token_id = None
    tokens = tuple(b"<end>" if i == END else bytes([ord("a") + i]) for i in range(VOCAB))
    special_token_ids = (END,)

    def __call__(self, text: bytes | str) -> list[int]:
        return [byte - ord("a") for byte in (text.encode() if isinstance(text, str) else text)]


@cache
def letters() -> Vocabulary:
    """For grammars."""
    return Vocabulary(LLTokenizer(TokenizerWrapper(_Letters())), (END,))


def drafter_config(setup: Setup) -> DrafterConfig:
    copying = None if setup.doubt is None else CopyingConfig(doubt=setup.doubt)
    kinds: dict[str, DrafterConfig] = {
        "none": NoDrafterConfig(),
        "ngram": NGramDrafterConfig(),
        "model": ModelDrafterConfig(source="drafter", copying=copying),
    }
    return kinds[setup.drafter]


# an adaptive policy begins with these, and what it then sees of the tiny models is noise: its lengths differ from run to run
DRAFTS_PAY = Costs({1: 1.0, 64: 1.2}, {1: 0.05})


def make_core(setup: Setup) -> EngineCore:
    """An engine over the tiny models."""
    # the paged attention is set on a shallow copy's config, so that the naive model keeps its own
    own = target_model(setup.dtype, setup.vocab, setup.architecture)
    target = Member(
        DecoderStack(copy.deepcopy(own).to(setup.device), choose_attention=lambda _: setup.attention, math=setup.math),
        64,
        setup.path,
        setup.end_token_ids,
    )
    drafter = None
    if setup.drafter == "model":
        model = copy.deepcopy(drafter_model(setup.dtype, setup.vocab, setup.architecture)).to(setup.device)
        draft_ids = None if setup.drafted is None else torch.tensor(setup.drafted)
        stack = DecoderStack(model, draft_ids=draft_ids, choose_attention=lambda _: setup.attention, math=setup.math)
        stack.adapter = (
            StateAdapter(copy.deepcopy(adapter_weights(setup.reads_states == "all")).to(setup.device, setup.dtype))
            if setup.reads_states
            else None
        )
        drafter = Member(stack, min(64, setup.drafter_context), Path("drafter"))
    bytes_per_token = kv_bytes_per_token(target.stack) * (2 if drafter else 1)
    config = EngineConfig(
        model=ModelPair(name="tiny", target=ModelSource(source="target"), drafter=drafter_config(setup)),
        speculation=SpeculationConfig(draft_length=setup.policy, verification=setup.verification),
        engine=RuntimeConfig(
            device=setup.device,
            max_sequences=setup.max_sequences,
            max_step_tokens=setup.max_step_tokens,
            max_drafter_tokens=setup.max_drafter_tokens,
            block_size=setup.block_size,
            kv_cache=ByteSize(bytes_per_token * setup.block_size * setup.num_blocks),
            cuda_graph_memory=ByteSize(setup.cuda_graph_memory),
        ),
    )
    return assemble(config, target, drafter, Extras(TEST_RULES, setup.processors, DRAFTS_PAY, letters(), setup.recorder))


@dataclass
class Outcome:
    """What an engine made of some requests."""

    tokens: dict[tuple[str, int], tuple[int, ...]] = field(default_factory=lambda: defaultdict(tuple))
    logprobs: dict[tuple[str, int], tuple[TokenLogprobs, ...]] = field(default_factory=lambda: defaultdict(tuple))
    prompt_logprobs: dict[str, tuple[TokenLogprobs, ...]] = field(default_factory=lambda: defaultdict(tuple))
    reasons: dict[tuple[str, int], FinishReason] = field(default_factory=dict)
    rounds: list[Round] = field(default_factory=list)
    steps: list[StepStats] = field(default_factory=list)


def drive(core: EngineCore, requests: Iterable[Request], max_steps: int = 3000) -> Outcome:
    """Run requests to their end; after every step the bookkeeping is checked, and that the oldest sequence advanced."""
    outcome = Outcome()
    for request in requests:
        core.add(request)
    scheduler = core._parts.scheduler
    while core.has_work:
        oldest = [(seq, seq.num_computed + seq.drafter_computed) for seq in scheduler.running[:1]]
        output = core.step()
        core.check()
        outcome.steps.append(output.stats)
        assert len(outcome.steps) < max_steps, "no progress"
        for delta in output.deltas:
            outcome.tokens[delta.request_id, delta.choice] += delta.token_ids
            outcome.logprobs[delta.request_id, delta.choice] += delta.logprobs
            if delta.prompt_logprobs:
                assert not any(outcome.tokens[key] for key in list(outcome.tokens) if key[0] == delta.request_id), "an answer came first"
                assert not delta.token_ids, "a delta with two purposes"
                assert delta.finish_reason is None
                outcome.prompt_logprobs[delta.request_id] += delta.prompt_logprobs
            if delta.finish_reason:
                outcome.reasons[delta.request_id, delta.choice] = delta.finish_reason
            if delta.round:
                outcome.rounds.append(delta.round)
        for seq, work in oldest:
            assert not scheduler.holds(seq) or seq.num_computed + seq.drafter_computed > work, "the oldest did not advance"
    assert scheduler.pool.num_used == 0
    return outcome
