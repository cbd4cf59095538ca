"""The two models of a training run: the target, whose distribution is learnt, and the drafter, which learns it.

Both are transformers' own, with their own forward pass: positions are filled up on the right, and a causal model needs no mask for that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from engine.errors import ConfigError, EngineError
from engine.model.linear import UNKNOWN, LinearKind
from engine.model.loader import load, quiet_transformers, require_supported
from engine.model.source import first_line
from engine.model.state_adapter import FILE as ADAPTER_FILE
from engine.model.state_adapter import AdapterWeights, read_adapter
from engine.train.batches import Batch
from engine.train.config import DrafterShape, Learns
from engine.train.losses import TargetRows, target_rows
from engine.train.shards import Example

# entries of a config that decide what weights mean, where they have the same names and shapes
_SHAPE = (
    "model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size",
    "tie_word_embeddings", "rope_parameters",
)  # fmt: skip

_LATER = 0.7  # what a draft's loss counts beside that of the draft in front of it, without which it is never reached


@dataclass(frozen=True)
class Taught:
    """What a target says of a batch's R rows."""

    states: Tensor  # [R, hidden], its last ones, normed
    rows: Callable[[slice], TargetRows]  # some at a time: over a large vocabulary all at once would be gigabytes


class Teacher(Protocol):
    """Who says what the target thinks."""

    def of(self, batch: Batch) -> Taught:
        """What it thinks at a batch's rows."""
        ...


class TargetTeacher:
    """Runs the target."""

    def __init__(self, model: Any, draft_ids: Tensor | None):
        """`model` is a transformers ...ForCausalLM without gradients; `draft_ids` [N] are the tokens to be learnt, None all."""
        self._model, self._draft_ids = model, draft_ids

    @torch.inference_mode()
    def of(self, batch: Batch) -> Taught:
        states = hidden_rows(self._model, batch)

        @torch.inference_mode()
        def rows(some: slice) -> TargetRows:
            return target_rows(self._model.lm_head(states[some]), self._draft_ids)

        return Taught(states, rows)


def pack_linears(model: Any, kind: LinearKind) -> None:
    """Have a target's linear layers as the engine has them: on a CPU its kernels take half the time that plain ones do."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, kind.make(child, UNKNOWN))


@dataclass(frozen=True)
class Reading:
    """A way of coming to the states of a batch's R rows, from which the head reads."""

    states: Tensor  # [R, hidden]
    counted: Tensor  # [R], whether a row has all that this way needs
    weight: float  # of its losses; those of all ways sum to one


class Student:
    """The drafter in training. With a reduced vocabulary its head is some rows of the embedding."""

    def __init__(self, model: Any, draft_ids: Tensor | None = None, adapter: Adapter | None = None, learns: Learns = "all"):
        """`draft_ids` [N] are the tokens that it may draft, ascending; None for all. What of `model` needs no gradient is lent to it."""
        self.model = model
        self.draft_ids = draft_ids
        self.adapter = adapter
        self._lent = {name for name, parameter in model.named_parameters(remove_duplicate=False) if not parameter.requires_grad}
        self._learns = learns
        if learns == "adapter":
            model.requires_grad_(False)

    @property
    def modules(self) -> list[nn.Module]:
        """What may be trained."""
        return [self.model, *([self.adapter.weights] if self.adapter else [])]

    def readings(self, batch: Batch, of_target: Tensor, is_learning: bool) -> list[Reading]:
        """The states [R, hidden] from the text alone, and, with an adapter, those of each draft in a row behind the target's own
        [R, hidden]. Of these, while learning, those that learn."""
        states = hidden_rows(self.model, batch)
        from_text = Reading(states, torch.ones(len(states), dtype=torch.bool, device=states.device), 1.0)
        if self.adapter is None:
            return [from_text]
        behind = self.adapter.readings(states, of_target, batch)
        if is_learning and self._learns == "adapter":
            return behind
        return [replace(reading, weight=reading.weight / 2) for reading in (from_text, *behind)]

    def head(self) -> Tensor:
        """[N, hidden], the rows of its head."""
        weight: Tensor = self.model.lm_head.weight
        return weight if self.draft_ids is None else weight.index_select(0, self.draft_ids)

    def own(self) -> dict[str, Tensor]:
        """The weights of its model by name, but for those that are lent to it."""
        return {name: weight for name, weight in self.model.state_dict().items() if name not in self._lent}

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """All that is its own, the adapter's included."""
        return {"model": self.own()} | ({"adapter": self.adapter.weights.state_dict()} if self.adapter else {})

    def restore(self, weights: dict[str, dict[str, Tensor]]) -> None:
        """Take over what `weights` gave."""
        self.model.load_state_dict(self.model.state_dict() | weights["model"])
        if self.adapter is not None:
            self.adapter.weights.load_state_dict(weights["adapter"])


class Adapter:
    """A state adapter in training: each draft of a row of drafts reads the one before, the first reads the target's state."""

    def __init__(self, weights: AdapterWeights, num_drafts: int):
        self.weights, self._num_drafts = weights, num_drafts

    def readings(self, states: Tensor, of_target: Tensor, batch: Batch) -> list[Reading]:
        """Of the drafter's states and the target's [R, hidden], those of each draft. A row needs as many rows of its example in front."""
        in_front = torch.cat([torch.arange(count, device=states.device) for count in batch.counts])
        weights = [_LATER**j for j in range(self._num_drafts)]
        found: list[Reading] = []
        before = of_target.to(states.dtype)
        for j, weight in enumerate(weights):
            before = self.weights(states, torch.nn.functional.pad(before[:-1], (0, 0, 1, 0)), is_targets=j == 0)
            found.append(Reading(before, in_front > j, weight / sum(weights)))
        return found


def hidden_rows(model: Any, batch: Batch) -> Tensor:
    """Last hidden states [R, hidden], normed, at a batch's rows."""
    hidden = model.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    return hidden.flatten(0, 1).index_select(0, batch.rows)  # type: ignore[no-any-return]  # transformers' modules are untyped


def new_drafter(shape: DrafterShape, target: Any, seed: int) -> Any:
    """A model of that shape for a target's vocabulary, in float32 on the CPU. Raises ConfigError for a shape that cannot be."""
    config = drafter_config(shape, target.config)
    torch.manual_seed(seed)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if shape.embedding == "target":
        _share_embedding(model, target)
    if shape.init.drafter is not None:
        _take_weights(model, Path(shape.init.drafter))
        return model
    if shape.embedding == "own" and shape.init.embedding == "target":
        _take_embedding(model, target)
    for place, layer in enumerate(shape.init.from_target_layers):
        _take_layer(model, place, target, layer)
    return model


def new_adapter(shape: DrafterShape, target_hidden_size: int, seed: int) -> Adapter | None:
    """What the shape says of an adapter, in float32 on the CPU: that of `init.drafter` where it has one. Raises ConfigError."""
    asked = shape.state_adapter
    if asked is None:
        if shape.init.drafter and (Path(shape.init.drafter) / ADAPTER_FILE).is_file():
            raise ConfigError(
                f"drafter.state_adapter: null - {shape.init.drafter!r} has one, which would be lost; say its width and drafts"
            )
        return None
    torch.manual_seed(seed)
    weights = AdapterWeights(shape.hidden_size, asked.width, target_hidden_size, is_chained=asked.drafts > 1)
    earlier = shape.init.drafter and read_adapter(Path(shape.init.drafter), shape.hidden_size, torch.float32, torch.device("cpu"))
    if earlier:
        own, theirs = ({name: list(weight.shape) for name, weight in of.state_dict().items()} for of in (weights, earlier))
        if own != theirs:
            raise ConfigError(f"drafter.state_adapter: is {own}, and in {shape.init.drafter!r} {theirs}")
        weights.load_state_dict(earlier.state_dict())
    return Adapter(weights, asked.drafts)


def drafter_config(shape: DrafterShape, target: Any) -> Any:
    """The transformers config of a shape, beside the target's config. Raises ConfigError."""
    entries: dict[str, Any] = {
        "vocab_size": target.vocab_size,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.num_layers,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_kv_heads or shape.num_heads,
        "head_dim": shape.head_dim or shape.hidden_size // shape.num_heads,
        "intermediate_size": shape.intermediate_size,
        "tie_word_embeddings": shape.tie_embeddings if shape.embedding == "own" else target.tie_word_embeddings,
        "max_position_embeddings": target.max_position_embeddings,
        **{key: getattr(target, key, None) for key in ("bos_token_id", "eos_token_id", "pad_token_id")},
    }
    if shape.model_type == target.model_type:
        entries["rope_parameters"] = dict(target.rope_parameters)
    try:
        config = AutoConfig.for_model(shape.model_type, **(entries | shape.options), attn_implementation="sdpa")
        config.architectures = None
        if shape.embedding == "target" and shape.hidden_size != target.hidden_size:
            raise ConfigError(f"drafter.hidden_size: {shape.hidden_size} - must be the target's {target.hidden_size} to take its embedding")
        require_supported(config, "drafter")
    except EngineError:
        raise
    except Exception as error:  # transformers checks with whatever is at hand
        raise ConfigError(f"drafter: transformers knows no {shape.model_type} of this shape: {first_line(error)}") from error
    return config


def _share_embedding(model: Any, target: Any) -> None:
    """The target's embedding and head as they are; no gradient reaches them."""
    for ours, lent in ((model.model.embed_tokens, target.model.embed_tokens), (model.lm_head, target.lm_head)):
        ours.weight = nn.Parameter(lent.weight.detach().float().cpu(), requires_grad=False)
    model.tie_weights()  # one parameter again where they are one


@torch.no_grad()
def _take_weights(model: Any, folder: Path) -> None:
    """The weights of an earlier drafter, as they were stored. Raises ConfigError for one of another shape."""
    earlier = load(folder, torch.float32, torch.device("cpu"))
    for entry in _SHAPE:
        ours, theirs = getattr(model.config, entry, None), getattr(earlier.config, entry, None)
        if ours != theirs:
            raise ConfigError(f"drafter.init.drafter: {str(folder)!r} - has another shape: {entry} is {ours!r} here, there {theirs!r}")
    weights = earlier.state_dict()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.copy_(weights[name])


@torch.no_grad()
def _take_embedding(model: Any, target: Any) -> None:
    """The target's embedding, in as many of its directions as the drafter is wide."""
    own: Tensor = model.model.embed_tokens.weight
    pairs = [(own, target.model.embed_tokens.weight)]
    if not model.config.tie_word_embeddings:
        pairs.append((model.lm_head.weight, target.lm_head.weight))
    for ours, theirs in pairs:
        ours.copy_(_narrowed(theirs.float().cpu(), ours.shape[-1], model.config.initializer_range))


def _narrowed(weight: Tensor, width: int, scale: float) -> Tensor:
    """A weight [V, H] as [V, width]: itself, or its projection on its first singular vectors, of a root mean square of `scale`.

    The scale is that of fresh weights: a tied head over larger rows would begin by repeating whatever it reads.
    """
    if weight.shape[-1] == width:
        return weight
    if weight.shape[-1] < width:
        raise ConfigError(f"drafter.hidden_size: {width} - is more than the target's {weight.shape[-1]}; take init.embedding random")
    values, vectors = torch.linalg.eigh(weight.double().T @ weight.double())  # ascending
    chosen = vectors[:, values.argsort(descending=True)[:width]]
    signs = chosen.gather(0, chosen.abs().argmax(0, keepdim=True)).sign()  # else the library's choice would be in the weights
    narrow: Tensor = (weight.double() @ (chosen * signs)).float()
    return narrow * (scale / narrow.square().mean().sqrt())


def _take_layer(model: Any, place: int, target: Any, layer: int) -> None:
    layers = target.model.layers
    if layer >= len(layers):
        raise ConfigError(f"drafter.init.from_target_layers: {layer} - must be less than {len(layers)}, the target's number of layers")
    try:
        model.model.layers[place].load_state_dict(layers[layer].state_dict())
    except RuntimeError as error:
        raise ConfigError(
            f"drafter.init.from_target_layers: {layer} - a layer of the target has another shape than one of the drafter; widths, "
            "heads and model_type must be equal"
        ) from error
    if place == 0 and model.model.norm.weight.shape == target.model.norm.weight.shape:
        model.model.norm.load_state_dict(target.model.norm.state_dict())


def frequent_ids(examples: Sequence[Example], number: int, always: Sequence[int]) -> Tensor:
    """The `number` tokens [N], ascending, that answers hold most often, the end tokens always among them.

    Raises ConfigError where answers hold fewer different ones: then a smaller vocabulary is the honest one.
    """
    counts = Counter(token_id for example in examples for token_id in example.answer_ids)
    ranked = sorted(counts.keys() - set(always), key=lambda token_id: (-counts[token_id], token_id))
    chosen = [*dict.fromkeys(always), *ranked][:number]
    if len(chosen) < number:
        raise ConfigError(f"drafter.draft_vocabulary: {number} - must be at most {len(chosen)}, so many tokens occur in the answers")
    return torch.tensor(sorted(chosen))


def parameter_groups(student: Student, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms, biases and embeddings do not. What takes no gradient is left out."""
    model = student.model
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)} | {id(model.get_output_embeddings().weight)}
    parameters = [p for module in student.modules for p in module.parameters() if p.requires_grad]
    decaying = [p for p in parameters if p.ndim > 1 and id(p) not in embeddings]
    known = {id(p) for p in decaying}
    return [
        {"params": decaying, "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in known], "weight_decay": 0.0},
    ]
