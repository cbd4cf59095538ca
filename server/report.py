"""What `cascade check` prints: what a deployment would serve, and the memory it needs. Serves nothing.

Without loading, the numbers come from the models' configs; what only the hub could say is "unknown offline", which is no mistake.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from engine.build import build, make_policy
from engine.config import EngineConfig, ModelDrafterConfig, ModelSource
from engine.model.budget import Footprint, kv_budget, plan_memory
from engine.model.linear import choose
from engine.model.loader import ModelSize, PairMember, check_pair, estimate, read_config, resolve_device, resolve_dtype
from engine.model.source import fetch_config
from engine.stats import EngineInfo
from server.dialect import in_words
from server.keys import digests_of
from server.settings import Deployment, ServerSettings
from server.text import TextTokenizer
from server.units import UNKNOWN, in_bytes


@dataclass(frozen=True)
class Figures:
    """Memory, length and where the tokenizer is; None where it is not known."""

    device: str
    dtype: str
    weight_bytes: int | None = None
    kv_bytes_per_token: int | None = None
    num_blocks: int | None = None
    max_model_len: int | None = None
    unread: tuple[str, ...] = ()  # models whose configs could not be had
    place: Path | None = None  # the target's folder, or a .gguf file that becomes one when it is loaded


@dataclass(frozen=True)
class Prospect:
    """A model as far as its config tells."""

    member: PairMember
    size: ModelSize
    dtype: str
    footprint: Footprint


def loaded_figures(config: EngineConfig, progress: Callable[[str], None]) -> Figures:
    """Load everything as `cascade serve` would. Raises ConfigError."""
    return figures_of(build(config, progress).info)


def figures_of(info: EngineInfo) -> Figures:
    """The figures of an engine that is loaded."""
    per_token = info.kv_bytes // (info.num_blocks * info.block_size)
    return Figures(info.device, info.dtype, info.weight_bytes, per_token, info.num_blocks, info.max_model_len, place=Path(info.target_path))


def estimated_figures(config: EngineConfig) -> Figures:
    """What can be said without weights. Raises ConfigError for what could not be served."""
    device = resolve_device(config.engine.device)
    sources: list[ModelSource] = [config.model.target]
    if isinstance(config.model.drafter, ModelDrafterConfig):
        sources.append(config.model.drafter)
    prospects = [_prospect(source, config) for source in sources]
    known = [prospect for prospect in prospects if prospect is not None]
    if len(known) < len(sources):
        unread = tuple(source.source for source, prospect in zip(sources, prospects, strict=True) if prospect is None)
        return Figures(str(device), config.model.target.dtype, unread=unread)
    if len(known) == 2 and all((prospect.member.path / "tokenizer.json").is_file() for prospect in known):
        check_pair(known[0].member, known[1].member)
    footprints = [prospect.footprint for prospect in known]
    per_token = sum(footprint.kv_bytes_per_token for footprint in footprints)
    weights = sum(prospect.size.num_parameters * prospect.footprint.itemsize for prospect in known)
    kv_bytes = kv_budget(config.engine, device, make_policy(config).max_length, footprints, weights)
    plan = plan_memory(config.engine, per_token, known[0].size.context_length, kv_bytes)
    return Figures(str(device), known[0].dtype, weights, per_token, plan.num_blocks, plan.max_model_len, place=known[0].member.path)


def _prospect(source: ModelSource, config: EngineConfig) -> Prospect | None:
    """None when the hub alone knows the model and cannot be asked. Raises ConfigError for what could not be served."""
    place = fetch_config(source)
    if place is None:
        return None
    model = read_config(place)
    device = resolve_device(config.engine.device)
    dtype = resolve_dtype(source.dtype, device, model)
    choose(source.quantization, dtype, device)
    size = estimate(model)
    member = PairMember(source.source, place, size.vocab_size)
    return Prospect(member, size, str(dtype).removeprefix("torch."), Footprint.of(model, dtype, size.kv_values_per_token * dtype.itemsize))


def table_of(path: Path, deployment: Deployment, figures: Figures) -> Table:
    """What would be served, for people."""
    table = Table(title=f"{path}", show_header=False, title_justify="left")
    table.add_column("what", no_wrap=True)
    table.add_column("value", overflow="fold")
    for what, value in _rows(deployment, figures):
        table.add_row(what, value)
    return table


def doubt_of(figures: Figures) -> str | None:
    """What was not checked for want of the models' configs, or None."""
    if not figures.unread:
        return None
    names = " and ".join(figures.unread)
    return f"Not verified: whether this version supports {names}. The hub's configs cannot be read here (offline, or gated)."


def _rule(deployment: Deployment) -> str:
    rule, alpha = deployment.speculation.judged_by()
    how = "" if deployment.speculation.verification == "token" else ", verified in blocks"
    return f"{rule}{how}" if rule == "exact" else f"{rule}, alpha {alpha:g}{how}"


def _quantizations(deployment: Deployment) -> list[str]:
    """What the dtype does not say of how weights are held."""
    model = deployment.model
    sides = [("target", model.target), *([("drafter", model.drafter)] if isinstance(model.drafter, ModelDrafterConfig) else [])]
    return [f"{name} {side.quantization}" for name, side in sides if side.quantization != "none"]


def _dialect(server: ServerSettings, place: Path | None) -> tuple[str, str]:
    """How the model writes calls and thinking. Raises ConfigError for a form that it would never write."""
    if place is None:
        return UNKNOWN, UNKNOWN
    if place.is_file():
        return ("known when it is loaded",) * 2
    return in_words(TextTokenizer.from_folder(place).template_source, server.tool_format, server.reasoning_format)


def _kv_cache(deployment: Deployment, figures: Figures) -> str:
    asked = deployment.engine.kv_cache
    if asked is not None:
        return in_bytes(int(asked))
    if figures.num_blocks is None or figures.kv_bytes_per_token is None:
        return "auto"
    return f"auto: {in_bytes(figures.num_blocks * deployment.engine.block_size * figures.kv_bytes_per_token)}"


def _rows(deployment: Deployment, figures: Figures) -> list[tuple[str, str]]:
    engine, server, drafter = deployment.engine, deployment.server, deployment.model.drafter
    blocks = UNKNOWN if figures.num_blocks is None else f"{figures.num_blocks:,} of {engine.block_size} tokens"
    calls, thinking = _dialect(server, figures.place)
    return [
        ("model ids", ", ".join(deployment.model_ids)),
        ("target", deployment.model.target.source),
        ("drafter", drafter.source if isinstance(drafter, ModelDrafterConfig) else drafter.kind),
        ("rule", _rule(deployment)),
        ("draft length", f"{deployment.speculation.draft_length.policy}, at most {deployment.speculation.draft_length.max}"),
        ("device, dtype", ", ".join([figures.device, figures.dtype, *_quantizations(deployment)])),
        ("weights", in_bytes(figures.weight_bytes)),
        ("KV cache", _kv_cache(deployment, figures)),
        ("KV of a token", in_bytes(figures.kv_bytes_per_token)),
        ("blocks", blocks),
        ("served context", UNKNOWN if figures.max_model_len is None else f"{figures.max_model_len:,} tokens"),
        ("tool calls", calls),
        ("thinking", thinking),
        ("address", f"{server.scheme}://{server.host}:{server.port}"),
        ("API keys", f"{len(digests)}" if (digests := digests_of(server)) else "none: everybody is served"),
    ]
