"""The composition root: from a config to an EngineCore. All choices between plug-ins are made here, and only here.

Refuses what cannot work before anything is served, naming both sides of an impossible combination.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch

from engine.config import (
    AdaptiveLengthConfig,
    ConfidenceLengthConfig,
    EngineConfig,
    HeuristicLengthConfig,
    ModelDrafterConfig,
    ModelSource,
    NGramDrafterConfig,
    NoDrafterConfig,
)
from engine.core import EngineCore, Parts
from engine.draft.adaptive import AdaptiveLength
from engine.draft.confidence import ConfidenceLength
from engine.draft.copying import Copying
from engine.draft.costs import PassCosts
from engine.draft.foresight import First, Forced
from engine.draft.length import FixedLength, HeuristicLength
from engine.draft.model import Aids, ModelDrafter
from engine.draft.ngram import NGramDrafter, NoDrafter
from engine.draft.prediction import Prediction
from engine.draft.worth import WithoutDrafts
from engine.errors import ConfigError
from engine.grammar.automaton import Automata, Vocabulary
from engine.grammar.masks import GrammarMasks
from engine.kv.block_pool import BlockPool
from engine.model.borrowed import lender_of
from engine.model.budget import Footprint, kv_budget, plan_memory, require_memory
from engine.model.cuda_graphs import recorder_of
from engine.model.graphs import Bound, Passes, Recorder
from engine.model.loader import check_pair, read_config
from engine.model.member import Member, load_member, pair_member, refuse_early
from engine.model.memory import ADVICE, is_out_of_memory, let_go
from engine.model.paged import PagedModel, kv_bytes_per_token, rows_run
from engine.model.runner import ModelRunner
from engine.model.source import Progress, default_cache_dir, first_line, resolve, silent
from engine.model.timing import pass_seconds
from engine.plan import Drafter, DraftLengthPolicy, Foresight, LogitsProcessor, Rule
from engine.request import Choice, FinishReason, Request, SamplingParams
from engine.sampling.distributions import Distributions
from engine.sampling.processors import STANDARD
from engine.sched.scheduler import Limits, Scheduler
from engine.stats import EngineInfo
from engine.verify.block import BlockVerifier
from engine.verify.rules import RULES
from engine.verify.verifier import Verifier

_DRAFTER_WINDOW = 2  # tokens of a sequence in a pass of the drafter: a draft, and in front of it the one token that it lags by
VERIFIERS = {"token": Verifier, "block": BlockVerifier}


@dataclass(frozen=True)
class Costs:
    """Seconds of a pass of each model, by rows; and how many rows a pass runs."""

    target: Mapping[int, float] = field(default_factory=dict)
    drafter: Mapping[int, float] = field(default_factory=dict)
    target_rows: Callable[[int], int] = rows_run
    drafter_rows: Callable[[int], int] = rows_run


@dataclass(frozen=True)
class Extras:
    """What code may plug in that no config names; tests do."""

    rules: Mapping[str, Rule] = field(default_factory=lambda: RULES)
    processors: ListLike[LogitsProcessor] = ()
    costs: Costs | None = None
    vocabulary: Vocabulary | None = None  # for grammars; None: that of the target's tokenizer
    recorder: Recorder | None = None  # of passes; None: the device's own, if the config wants it
    progress: Progress = silent


def build(config: EngineConfig, progress: Progress = silent, cache_dir: Path | None = None) -> EngineCore:
    """Load everything, warm up, and return an engine that is ready. Raises ConfigError and its kin."""
    try:
        return _build(config, progress, cache_dir)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(f"The deployment does not fit into the memory of this machine: {ADVICE}. {first_line(error)}") from None


def _build(config: EngineConfig, progress: Progress, cache_dir: Path | None) -> EngineCore:
    if config.engine.threads is not None:
        torch.set_num_threads(config.engine.threads)
    drafter_source = config.model.drafter if isinstance(config.model.drafter, ModelDrafterConfig) else None
    for source in filter(None, (config.model.target, drafter_source)):
        refuse_early(source)
    target_path = resolve(config.model.target, cache_dir, progress)
    drafter_path = resolve(drafter_source, cache_dir, progress) if drafter_source else None
    if drafter_source and drafter_path:  # before minutes are spent on weights
        lender_of(read_config(drafter_path), drafter_path, cache_dir, progress)
        check_pair(pair_member(config.model.target, target_path), pair_member(drafter_source, drafter_path))
    target = load_member(config.model.target, target_path, config.engine, cache_dir, progress)
    drafter = load_member(drafter_source, drafter_path, config.engine, cache_dir, progress) if drafter_source and drafter_path else None
    recorder = recorder_of(config.engine.cuda_graphs, target.stack.device)
    progress("Warming up")
    costs = _measured(config, target, drafter, _Measuring(cache_dir or default_cache_dir(), recorder))
    core = assemble(config, target, drafter, Extras(costs=costs, recorder=recorder, progress=progress))
    _warm_up(core)
    return core


def assemble(config: EngineConfig, target: Member, drafter: Member | None = None, extras: Extras | None = None) -> EngineCore:
    """An engine over models that are already loaded."""
    extras = extras or Extras()
    stacks = [target.stack, *([drafter.stack] if drafter else [])]
    vocab_size = min(stack.vocab_size for stack in stacks)
    _require_readable(target, drafter)
    block_size = config.engine.block_size
    footprints = [Footprint.of(own.config, own.dtype, kv_bytes_per_token(own), own.attention.is_recordable) for own in stacks]
    kv_bytes = kv_budget(config.engine, target.stack.device, make_policy(config).max_length, footprints)
    memory = plan_memory(config.engine, sum(map(kv_bytes_per_token, stacks)), target.context_length, kv_bytes)
    require_memory(memory.bytes_per_token * memory.num_blocks * block_size, target.stack.device)
    vocabulary = extras.vocabulary or Vocabulary.from_folder(target.path, target.end_token_ids)
    automata = Automata(vocabulary, vocab_size)
    distributions = Distributions((*STANDARD, GrammarMasks(automata), *extras.processors))
    foresight = First((Forced(automata.next), Prediction()))
    running = PagedModel(target.stack, memory.num_blocks, block_size, vocab_size)
    drafting = None if drafter is None else PagedModel(drafter.stack, memory.num_blocks, block_size, vocab_size)
    _record(config, {"target": running} | ({"drafter": drafting} if drafting else {}), memory.max_model_len, extras)
    costs = replace(extras.costs or Costs(), target_rows=running.rows_run, drafter_rows=drafting.rows_run if drafting else rows_run)
    policy = make_policy(config, costs, foresight)
    parts = Parts(
        scheduler=Scheduler(
            BlockPool(memory.num_blocks, block_size),
            Limits(config.engine.max_sequences, config.engine.max_step_tokens),
            policy,
            automata,
        ),
        drafter=_make_drafter(config, drafter, drafting, _Drafting(distributions, extras.rules, policy, foresight)),
        runner=ModelRunner(running),
        distributions=distributions,
        verifier=VERIFIERS[config.speculation.verification](extras.rules),
        max_drafter_tokens=config.engine.max_drafter_tokens or config.engine.max_step_tokens,
        without_drafts=WithoutDrafts(PassCosts(costs.target, costs.target_rows)),
        let_go=partial(_let_go, [running, *([drafting] if drafting else [])]),
    )
    info = EngineInfo(
        incarnation=uuid.uuid4().hex,
        target=config.model.target.source,
        drafter=_drafter_name(config),
        target_path=str(target.path),
        device=str(target.stack.device),
        dtype=str(target.stack.dtype).removeprefix("torch."),
        vocab_size=vocab_size,
        max_model_len=memory.max_model_len,
        end_token_ids=target.end_token_ids,
        has_grammars=vocabulary is not None,
        rules=tuple(name for name, rule in extras.rules.items() if config.model.drafter.has_probabilities or not rule.needs_q),
        max_draft=policy.max_length,
        max_sequences=config.engine.max_sequences,
        num_blocks=memory.num_blocks,
        block_size=block_size,
        weight_bytes=sum(stack.num_weight_bytes for stack in stacks),
        kv_bytes=memory.num_blocks * block_size * memory.bytes_per_token,
    )
    return EngineCore(parts, info)


def _require_readable(target: Member, drafter: Member | None) -> None:
    """Refuse a drafter that reads states of another width than the target's. Raises ConfigError."""
    adapter, width = drafter and drafter.stack.adapter, target.stack.config.hidden_size
    if adapter and adapter.target_hidden_size != width:
        raise ConfigError(
            f"model.drafter: has learnt to read states of width {adapter.target_hidden_size}, and model.target has {width}; "
            "set model.drafter.target_states to false, and it drafts from the text alone"
        )


def make_policy(config: EngineConfig, costs: Costs | None = None, foresight: Foresight | None = None) -> DraftLengthPolicy:
    """The draft-length policy of a config. Without a drafter no slots are reserved."""
    length, costs = config.speculation.draft_length, costs or Costs()
    if isinstance(config.model.drafter, NoDrafterConfig):
        return FixedLength(0)
    match length:
        case HeuristicLengthConfig():
            return HeuristicLength(length.start, length.max)
        case ConfidenceLengthConfig():
            return ConfidenceLength(length.max, length.threshold, length.cumulative)
        case AdaptiveLengthConfig():
            drafter = PassCosts(costs.drafter, costs.drafter_rows) if isinstance(config.model.drafter, ModelDrafterConfig) else None
            return AdaptiveLength(length.max, PassCosts(costs.target, costs.target_rows), drafter, foresight)
    return FixedLength(length.max)


def _record(config: EngineConfig, models: Mapping[str, PagedModel], max_model_len: int, extras: Extras) -> None:
    """Record small passes of both models. The drafter's come first: there are more of them in a step, and they take less memory."""
    stack, runtime = models["target"].stack, config.engine
    recorder = extras.recorder or recorder_of(runtime.cuda_graphs, stack.device)
    if recorder is None:
        return
    window = make_policy(config).max_length + 1
    free = recorder.free_bytes()
    bound = min(int(runtime.cuda_graph_memory), free // 2)  # where kv_cache is said, steps need of what it leaves
    drafter_tokens = runtime.max_drafter_tokens or runtime.max_step_tokens
    for name, num_tokens, usual in (("drafter", drafter_tokens, _DRAFTER_WINDOW), ("target", runtime.max_step_tokens, window)):
        if (model := models.get(name)) is not None:
            left = bound - (free - recorder.free_bytes())
            passes = Passes(runtime.max_sequences, usual, num_tokens, max_model_len)
            model.record(recorder, passes, Bound(left, name, extras.progress))


@dataclass(frozen=True)
class _Measuring:
    """Where times of passes are kept, and how passes are repeated."""

    cache_dir: Path
    recorder: Recorder | None


def _measured(config: EngineConfig, target: Member, drafter: Member | None, how: _Measuring) -> Costs | None:
    """What passes cost, if the policy asks."""
    if not isinstance(config.speculation.draft_length, AdaptiveLengthConfig) or isinstance(config.model.drafter, NoDrafterConfig):
        return None

    def seconds(member: Member, source: ModelSource) -> dict[int, float]:
        stack = member.stack
        key = {
            "path": str(member.path),
            "dtype": str(stack.dtype),
            "quantization": source.quantization,
            "attention": stack.attention.name,
            "adapter": str(stack.adapter and stack.adapter.shape),
        }
        return pass_seconds(stack, key, how.cache_dir, how.recorder)

    source = config.model.drafter
    own = seconds(drafter, source) if drafter is not None and isinstance(source, ModelDrafterConfig) else {}
    return Costs(seconds(target, config.model.target), own)


@dataclass(frozen=True)
class _Drafting:
    """What a drafter shares with the rest of the engine."""

    distributions: Distributions
    rules: Mapping[str, Rule]
    policy: DraftLengthPolicy
    foresight: Foresight


def _make_drafter(config: EngineConfig, member: Member | None, model: PagedModel | None, shared: _Drafting) -> Drafter:
    kind = config.model.drafter
    if isinstance(kind, NGramDrafterConfig):
        return NGramDrafter(kind.max_n, kind.min_n, shared.foresight)
    if member is None or model is None:
        return NoDrafter()
    copying = Copying(kind.copying.doubt) if isinstance(kind, ModelDrafterConfig) and kind.copying else None
    aids = Aids(copying, shared.foresight, VERIFIERS[config.speculation.verification].numbers_are_by_round)
    return ModelDrafter(model, shared.distributions, member.context_length, shared.rules, shared.policy, aids)


def _let_go(models: ListLike[PagedModel]) -> None:
    """Have everything given back that is only kept for the next step."""
    for model in models:
        model.let_go()
    let_go(models[0].stack.device)


def _drafter_name(config: EngineConfig) -> str:
    drafter = config.model.drafter
    return f"model:{drafter.source}" if isinstance(drafter, ModelDrafterConfig) else drafter.kind


def _warm_up(core: EngineCore) -> None:
    """Run two short answers, one that needs q and one that does not, so that the first client does not pay for lazy initialisation.
    Raises ConfigError where memory runs out."""
    length = min(16, core.info.max_model_len - 1)
    for is_seeded in (True, False):
        sampling = SamplingParams(max_tokens=min(4, core.info.max_model_len - length), temperature=1.0, is_seeded=is_seeded)
        core.add(Request(id=f"warm-up {is_seeded}", prompt_ids=(0,) * length, sampling=sampling, choices=(Choice(),)))
    while core.has_work:
        if any(delta.finish_reason is FinishReason.MEMORY for delta in core.step().deltas):
            raise ConfigError(f"Weights and KV cache leave no memory for a step: {ADVICE}.")
