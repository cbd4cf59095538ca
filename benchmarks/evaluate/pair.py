"""A deployment's pair, as the sweep uses it: what it is before anything is loaded, and the engines behind it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.errors import BenchmarkError
from benchmarks.evaluate.likelihood import Likelihood
from benchmarks.evaluate.player import Player, Question
from benchmarks.evaluate.points import DRAFTER
from benchmarks.evaluate.record import Journal, Record
from benchmarks.evaluate.sweep import Asked, Plan, Stage, complete, sweep
from benchmarks.evaluate.tasks import Item
from engine.build import build
from engine.config import EngineConfig, ModelDrafterConfig, ModelSource
from engine.errors import ClientError
from engine.model.loader import context_length, end_token_ids, read_config
from engine.model.source import resolve
from engine.request import SamplingParams
from server.settings import load as load_deployment
from server.text import TextTokenizer

if TYPE_CHECKING:
    from benchmarks.evaluate.command import Prepared

Say = Callable[[str], None]
Bar = Callable[[int], AbstractContextManager[Callable[[], None]]]

ALONE_KV_CACHE = 256 << 20  # bytes, for the drafter alone
SAMPLED_BYTES = 1 << 20  # of either end of a file of weights


@dataclass(frozen=True)
class Pair:
    """Config and files of a deployment; its engines are made when they are first needed."""

    file: Path
    config: EngineConfig
    target_path: Path
    drafter_path: Path | None  # None for a drafter without weights

    @classmethod
    def of(cls, file: Path, draft_length: int | None, say: Say) -> Pair:
        """Read the file and find the models. Raises ConfigError."""
        config = load_deployment(file, {}).engine_part
        if draft_length is not None:
            content = config.model_dump()
            content["speculation"]["draft_length"] = {"policy": "fixed", "max": draft_length}
            config = EngineConfig.model_validate(content)
        drafter = config.model.drafter
        drafter_path = resolve(drafter, None, say) if isinstance(drafter, ModelDrafterConfig) else None
        return cls(file, config, resolve(config.model.target, None, say), drafter_path)

    @property
    def drafter_kind(self) -> str:
        return self.config.model.drafter.kind

    @property
    def has_probabilities(self) -> bool:
        return self.config.model.drafter.has_probabilities

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        return TextTokenizer.from_folder(self.target_path)

    @cached_property
    def end_token_ids(self) -> tuple[int, ...]:
        return end_token_ids(self.target_path)

    @property
    def about(self) -> dict[str, Any]:
        """What a result says of it."""
        model, runtime = self.config.model, self.config.engine
        drafter = model.drafter
        return {
            "name": model.name,
            "config": str(self.file),
            "target": model.target.source,
            "drafter": drafter.source if isinstance(drafter, ModelDrafterConfig) else drafter.kind,
            "device": f"{runtime.device}, {model.target.dtype}, {model.target.quantization}",
        }

    @property
    def settings(self) -> dict[str, Any]:
        """All of it that answers depend on: of the deployment what no point overrides, and the weights."""
        content = self.config.model_dump(mode="json")
        for key in ("name", "aliases"):
            del content["model"][key]
        for key in ("rule", "alpha", "presets", "allow_rules", "max_alpha"):
            del content["speculation"][key]
        paths = {"target": self.target_path, "drafter": self.drafter_path}
        return {"deployment": content, "weights": {name: _fingerprint(path) for name, path in paths.items() if path is not None}}

    def ids(self, item: Item) -> tuple[int, ...]:
        """The prompt as the target sees it."""
        if self.tokenizer.has_chat_template:
            return tuple(self.tokenizer.encode_chat(list(item.messages)))
        return tuple(self.tokenizer.encode(item.bare))

    def drafter_refusal(self, items: Sequence[Item], max_tokens: int) -> str | None:
        """Why the drafter cannot answer alone; None if it can."""
        assert self.drafter_path is not None, "a drafter with probabilities has weights"
        longest, context = max(len(self.ids(item)) for item in items) + max_tokens, context_length(read_config(self.drafter_path))
        return f"its context is {context}, and the longest prompt and answer have {longest} tokens" if longest > context else None

    def records(self, prepared: Prepared, journal: Journal, bar: Bar, say: Say) -> Mapping[str, list[Record]]:
        """The records of all points, by point: those that the journal has, and those that are still to be made."""
        points, options = prepared.points.chosen, prepared.options
        asked = [Asked(item, self._question(item, number, prepared)) for number, item in enumerate(prepared.items)]
        try:
            return complete(journal.records, points, asked)
        except KeyError:
            stage = self._stage(asked, DRAFTER in points, say)
        with bar(len(asked) * len(points)) as tick:
            sweep(stage, asked, points, journal, Plan(options.concurrency, tick))
        return complete(journal.records, points, asked)

    def _question(self, item: Item, number: int, prepared: Prepared) -> Question:
        options = prepared.options
        sampling = SamplingParams(
            max_tokens=prepared.max_tokens,
            temperature=options.temperature,
            seed=(options.seed + number) % (1 << 63),
            is_seeded=options.temperature > 0,
            stop_token_ids=self.end_token_ids,
        )
        return Question(self.ids(item), sampling)

    def _stage(self, asked: Sequence[Asked], has_drafter: bool, say: Say) -> Stage:
        """Load the engines. Raises BenchmarkError for a prompt that they can never answer."""
        pair = Player(build(self.config, say))
        alone = Player(build(self._alone(), say)) if has_drafter else None
        for one in asked:
            for player in filter(None, (pair, alone)):
                try:
                    player.check(one.question)
                except ClientError as error:
                    raise BenchmarkError(f"Prompt {one.item.name}: {error}") from error
        longest = max(len(one.question.prompt_ids) + one.question.sampling.max_tokens for one in asked)
        return Stage(pair, alone, self.tokenizer, Likelihood(pair.core, longest))

    def _alone(self) -> EngineConfig:
        """The drafter as a target of its own."""
        content = self.config.model_dump()
        drafter = content["model"]["drafter"]
        content["model"] |= {"target": {key: drafter[key] for key in ModelSource.model_fields}, "drafter": {"kind": "none"}}
        content["engine"] |= {"kv_cache": min(content["engine"]["kv_cache"] or ALONE_KV_CACHE, ALONE_KV_CACHE), "max_model_len": None}
        del content["speculation"]
        return EngineConfig.model_validate(content)


def _fingerprint(folder: Path) -> str:
    """Of the weights: names, sizes and both ends of every file. A model that was trained again is another one."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with file.open("rb") as content:
            digest.update(content.read(SAMPLED_BYTES))
            content.seek(max(0, size - SAMPLED_BYTES))
            digest.update(content.read(SAMPLED_BYTES))
    return digest.hexdigest()[:16]
