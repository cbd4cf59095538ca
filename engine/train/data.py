"""Training data: questions and answers that the target itself writes, with our own engine, in large batches.

Shard i depends on the recipe, the seed and i, and on nothing that was made before it. So a run that was killed goes on with the first
shard that is missing, and loses no more than that. Token ids only: what stands around a question is handed in.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from engine.api import Engine
from engine.config import EngineConfig, ModelPair, NoDrafterConfig, RuntimeConfig
from engine.errors import ConfigError
from engine.model.source import Progress, silent
from engine.request import FinishReason, Request, SamplingParams
from engine.train.config import DataConfig, DistilConfig, FileSource, SelfSource
from engine.train.shards import Example, digest, num_answer_tokens, provenance_of, shard_path, write_shard

FORMAT = 1  # raise it when the same recipe and seed would give other examples


@dataclass(frozen=True)
class Turns:
    """What a chat template puts around the first question of a user."""

    user_start_ids: tuple[int, ...]  # up to where the question begins
    assistant_start_ids: tuple[int, ...]  # from the end of the question to where the answer begins; the first ends the question


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a FileSource, ready to be answered."""

    prompts: tuple[tuple[int, ...], ...]
    digest: str  # of the file


@dataclass(frozen=True)
class Material:
    """What is not in a recipe: tokens of the template, prompts of the files."""

    turns: Turns | None  # None for a model without a chat template
    files: Mapping[str, PromptFile] = field(default_factory=dict)  # by the name of their source


@dataclass
class Made:
    """How far the data is."""

    num_tokens: int = 0  # of answers
    num_shards: int = 0
    num_tokens_now: int = 0  # written by this call, questions included


def data_engine(config: DistilConfig, progress: Progress = silent) -> Engine:
    """The target alone, as wide as the recipe says. Raises ConfigError."""
    data = config.data
    runtime = RuntimeConfig(
        device=config.device,
        max_sequences=data.batch,
        max_step_tokens=max(512, 4 * data.batch),
        kv_cache=data.kv_cache,
        threads=config.threads,
    )
    engine = Engine(EngineConfig(model=ModelPair(name="target", target=config.target, drafter=NoDrafterConfig()), engine=runtime), progress)
    served = engine.info.max_model_len
    if served < data.max_prompt_tokens + data.max_tokens:
        engine.close()
        raise ConfigError(
            f"data.max_prompt_tokens, data.max_tokens: {data.max_prompt_tokens} + {data.max_tokens} - must be at most "
            f"{served} together, what the target and data.kv_cache allow"
        )
    return engine


def make_shards(
    config: DistilConfig, material: Material, open_engine: Callable[[], Engine], on_progress: Callable[[Made], None] = lambda made: None
) -> list[Path]:
    """The shards of a recipe; those that are there are kept. `open_engine` is called only when something is to be made.

    Raises ConfigError where shards were made by another recipe, and where a recipe makes no data.
    """
    data, folder, made = config.data, Path(config.data.folder), Made()
    recipe, paths, engine = recipe_of(config, material), list[Path](), None
    try:
        while made.num_tokens < data.num_tokens:
            path = shard_path(folder, made.num_shards)
            if path.exists():
                _require_same_recipe(path, recipe)
            else:
                engine = engine or open_engine()
                writer = ShardWriter(engine, data, material, lambda num: _count(made, num, on_progress))
                examples = writer.examples(made.num_shards)
                if not examples:
                    raise ConfigError(f"data: shard {made.num_shards} has no example. All prompts may be longer than max_prompt_tokens.")
                write_shard(path, examples, {"recipe": recipe, "shard": made.num_shards, "num_dropped": writer.num_dropped})
            made.num_tokens += num_answer_tokens(path)
            made.num_shards += 1
            paths.append(path)
            on_progress(made)
    finally:
        if engine is not None:
            engine.close()
    return paths


def _count(made: Made, num: int, on_progress: Callable[[Made], None]) -> None:
    made.num_tokens_now += num
    on_progress(made)


def recipe_of(config: DistilConfig, material: Material) -> dict[str, Any]:
    """All that shapes a shard beside its number. How many there are, and how they are computed, is no part of it."""
    data = config.data.model_dump(mode="json", exclude={"folder", "num_tokens", "batch", "kv_cache"})
    for source in data["sources"]:
        if source["kind"] == "file":
            source["path"] = Path(source["path"]).name
            source["sha256"] = material.files[source["name"]].digest
    turns = material.turns
    around = [turns.user_start_ids, turns.assistant_start_ids] if turns else None
    return {"format": FORMAT, "target": config.target.source, "revision": config.target.revision, "around": around, "data": data}


def _require_same_recipe(path: Path, recipe: Mapping[str, Any]) -> None:
    if what := difference(recipe, provenance_of(path).get("recipe", {})):
        raise ConfigError(f"{path} was made by another recipe: {what}. Name another data.folder, or remove the shards of this one.")


def difference(now: Mapping[str, Any], before: Mapping[str, Any]) -> str | None:
    """The first key, by name, that two recipes differ in; lists and tuples are the same, since JSON knows no tuples."""
    ours, theirs = _flat(now), _flat(before)
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key) != theirs.get(key):
            return f"{key} is {ours.get(key)!r} now and was {theirs.get(key)!r}"
    return None


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {k: v for key, inner in value.items() for k, v in _flat(inner, f"{name}.{key}" if name else str(key)).items()}
    if isinstance(value, list | tuple):
        return {k: v for index, inner in enumerate(value) for k, v in _flat(inner, f"{name}.{index}").items()}
    return {name: value}


# ---------------------------------------------------------------------- one shard
@dataclass
class _Draft:
    """An example in the making."""

    source: str
    key: str  # of its random numbers
    temperature: float
    prompt_ids: tuple[int, ...] = ()
    answer_ids: tuple[int, ...] = ()


class ShardWriter:
    """Has the target write the examples of shards."""

    def __init__(self, engine: Engine, data: DataConfig, material: Material, on_tokens: Callable[[int], None] = lambda num: None):
        self._engine = engine
        self._data = data
        self._material = material
        self._on_tokens = on_tokens
        self._shares = shares([source.weight for source in data.sources], data.examples_per_shard)
        self.num_dropped = 0  # examples without a question or an answer

    def examples(self, index: int) -> list[Example]:
        """Those of shard `index`. Fewer than asked for where the target had nothing to ask, or where prompts were too long."""
        drafts: list[_Draft] = []
        for source, share in zip(self._data.sources, self._shares, strict=True):
            made = [self._draft(source.name, number) for number in range(index * share, (index + 1) * share)]
            drafts += self._asked(made, source) if isinstance(source, SelfSource) else self._read(made, source, index * share)
        answers = self._written((d.key + "/answer", d.prompt_ids, self._answer_sampling(d)) for d in drafts)
        for draft in drafts:
            draft.answer_ids = answers.get(draft.key + "/answer", ())
        found = [Example(d.prompt_ids, d.answer_ids, d.source, d.temperature) for d in drafts if d.answer_ids]
        self.num_dropped += sum(self._shares) - len(found)
        return found

    def _draft(self, source: str, number: int) -> _Draft:
        key = f"{self._data.seed}/{source}/{number}"
        options = self._data.temperatures
        (chosen,) = random.Random(f"{key}/temperature").choices(options, [option.weight for option in options])
        return _Draft(source, key, chosen.temperature)

    def _asked(self, drafts: list[_Draft], source: SelfSource) -> list[_Draft]:
        """The target continues the start of a user's turn until it ends it."""
        turns = self._material.turns
        if turns is None:
            raise ConfigError(
                f"data.sources: {source.name!r} - the target has no chat template, so it cannot ask itself. Name prompt files."
            )
        stops = (turns.assistant_start_ids[0], *self._engine.info.end_token_ids)
        longest = min(source.max_tokens, self._data.max_prompt_tokens - len(turns.user_start_ids) - len(turns.assistant_start_ids))
        if longest < 1:
            raise ConfigError(f"data.max_prompt_tokens: {self._data.max_prompt_tokens} - leaves no room for a question within its template")
        sampling = SamplingParams(max_tokens=longest, temperature=source.temperature, top_p=source.top_p, stop_token_ids=stops)
        written = self._written((draft.key + "/question", turns.user_start_ids, sampling) for draft in drafts)
        asked = []
        for draft in drafts:
            ids = written[draft.key + "/question"]
            question = ids[:-1] if ids[-1] in stops else ids
            if question:
                draft.prompt_ids = (*turns.user_start_ids, *question, *turns.assistant_start_ids)
                asked.append(draft)
        return asked

    def _read(self, drafts: list[_Draft], source: FileSource, first: int) -> list[_Draft]:
        """Prompts of a file in an order that only the seed decides; all of them before any comes again."""
        prompts = self._material.files[source.name].prompts
        for number, draft in enumerate(drafts, first):
            order = list(range(len(prompts)))
            random.Random(f"{self._data.seed}/{source.name}/order/{number // len(prompts)}").shuffle(order)
            draft.prompt_ids = prompts[order[number % len(prompts)]]
        return [draft for draft in drafts if len(draft.prompt_ids) <= self._data.max_prompt_tokens]

    def _answer_sampling(self, draft: _Draft) -> SamplingParams:
        return SamplingParams(
            max_tokens=self._data.max_tokens, temperature=draft.temperature, stop_token_ids=self._engine.info.end_token_ids
        )

    def _written(self, asked: Iterator[tuple[str, tuple[int, ...], SamplingParams]]) -> dict[str, tuple[int, ...]]:
        """What the target writes behind some prompts, by key."""
        requests = [Request(id=key, prompt_ids=ids, sampling=_seeded(sampling, key)) for key, ids, sampling in asked]
        written: dict[str, list[int]] = {request.id: [] for request in requests}
        for delta in self._engine.stream(requests):
            if delta.finish_reason is FinishReason.MEMORY:  # where it ended would be chance's doing, and a shard is its recipe's
                raise ConfigError(f"data.batch: {self._data.batch} - memory ran out for a single answer; lower it, or data.kv_cache")
            written[delta.request_id] += delta.token_ids
            self._on_tokens(len(delta.token_ids))
        return {key: tuple(ids) for key, ids in written.items()}


def _seeded(sampling: SamplingParams, key: str) -> SamplingParams:
    return msgspec.structs.replace(sampling, seed=int(digest([key])[:15], 16))


def shares(weights: Sequence[float], total: int) -> list[int]:
    """`total` split in proportion to weights; what is left over goes to the largest remainders."""
    exact = [weight / sum(weights) * total for weight in weights]
    found = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: (found[i] - exact[i], i))
    for i in by_remainder[: total - sum(found)]:
        found[i] += 1
    return found
