"""What every speed bar is measured with: its setting, its result, and the figures that bars have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.programs import EngineProgram, PromptEncoder, Run, variant
from benchmarks.prompts import BUILT_IN, Prompt, read, shuffled
from benchmarks.stats import Estimate
from benchmarks.turns import Comparison, Rows, Turns
from engine.config import EngineConfig
from engine.model.loader import resolve_device

EXACT: Mapping[str, Any] = {"speculation.rule": "exact", "speculation.alpha": None, "speculation.presets": {}}
NO_DRAFTER: Mapping[str, Any] = {"model.drafter": {"kind": "none"}, **EXACT}  # no preset may read probabilities that are not there


class BarSkipped(Exception):
    """The bar cannot be measured here; the message says why."""


@dataclass(frozen=True)
class Setting:
    """How thoroughly, and with what."""

    config: Path
    data: Path  # spec_bench_dev.jsonl
    answers: Path  # gsm8k_test_dev.jsonl
    repetitions: int
    is_quick: bool  # shows that a bar runs; its figures mean little
    tick: Callable[[], None] = lambda: None  # after every prompt

    @property
    def device(self) -> str:
        """What the engines run on, a GPU with its name. Raises ConfigError where it is not there."""
        device = resolve_device(self.engine().engine.device)
        return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)

    def size(self, full: int, quick: int) -> int:
        return quick if self.is_quick else full

    def turns(self, num_prompts: int) -> Turns:
        return Turns(num_prompts, self.repetitions, self.tick)

    def engine(self, *changes: Mapping[str, Any]) -> EngineConfig:
        return variant(self.config, {key: value for change in changes for key, value in change.items()})


@dataclass(frozen=True)
class Measured:
    """A bar's figure, what each repetition alone says, and what else was seen."""

    value: Estimate
    repetitions: tuple[float, ...]
    detail: Mapping[str, Any] = field(default_factory=dict)


# ---------------------------------------------------------------------- prompts
def spec_bench(setting: Setting) -> list[Prompt]:
    """Its questions. Raises BarSkipped where the file is absent."""
    if not setting.data.exists():
        raise BarSkipped(f"{setting.data} is not there; --data names Spec-Bench's questions (question_id, category, turns)")
    return read(setting.data)


def built_in(count: int) -> list[Prompt]:
    return shuffled(read(BUILT_IN), count, seed=0)


def encoded(engine: EngineProgram, prompts: list[Prompt]) -> Callable[[int], tuple[int, ...]]:
    encoder = PromptEncoder(engine.info.target_path)
    return lambda i: encoder.new(prompts[i])


# ---------------------------------------------------------------------- figures
def measured(comparison: Comparison, detail: Mapping[str, Any]) -> Measured:
    return Measured(comparison.value, comparison.repetitions, detail)


def rate_ratio(row: list[Run]) -> float:
    return row[0].tokens_per_second / row[1].tokens_per_second


def time_ratio(row: list[Run]) -> float:
    return row[1].seconds / row[0].seconds


def time_per_token_ratio(rows: Rows[Run]) -> float | None:
    """Over all answers that go on behind their first tokens; None where none does."""
    long = [row for repetition in rows for row in repetition if all(run.num_behind_first > 0 for run in row)]
    return median(row[1].seconds_per_token / row[0].seconds_per_token for row in long) if long else None


def rates(rows: Rows[Run]) -> dict[str, float]:
    values = [[[run.tokens_per_second for run in row] for row in repetition] for repetition in rows]
    return {"tokens_per_second": median_of(values, 0), "other_tokens_per_second": median_of(values, 1)}


def seconds(rows: Rows[Run]) -> dict[str, float]:
    values = [[[run.seconds for run in row] for row in repetition] for repetition in rows]
    return {"seconds": median_of(values, 0), "other_seconds": median_of(values, 1)}


def equal_texts(rows: Rows[Run]) -> dict[str, int]:
    """Greedy answers of both sides should be the same tokens, up to ties that floating point breaks."""
    pairs = [row for repetition in rows for row in repetition]
    return {"answers": len(pairs), "equal_answers": sum(row[0].token_ids == row[1].token_ids for row in pairs)}


def median_of(rows: Rows[float], side: int) -> float:
    return median(row[side] for repetition in rows for row in repetition)
