"""Distillation: a drafter learns its target's distribution at every token of answers that the target wrote itself.

What the target thinks is computed while it is needed, some rows at a time, or read from its kept states. On a CPU a run is a function
of its recipe and data: one that was killed goes on from its checkpoint and gives the same numbers, bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.train.batches import Batch, collate, in_passes, passes
from engine.train.checkpoint import RunFolder
from engine.train.config import TrainingConfig
from engine.train.losses import CACHED_ROWS, Judgement, TargetRows, joined, judge
from engine.train.models import Reading, Student, Taught, Teacher, parameter_groups
from engine.train.shards import Example


@dataclass
class Position:
    """How far a run is. Tokens are rows that were learnt from."""

    step: int = 0
    tokens: int = 0
    epoch: int = 0
    pass_index: int = 0  # the epoch's next pass
    seconds: float = 0.0  # spent in steps, over all sittings


@dataclass(frozen=True)
class Score:
    """How good the drafter is over some rows."""

    num_tokens: int
    loss: float
    acceptance: float  # mean of sum min(p, q): what stands at temperature 1
    agreement: float  # share of positions with the target's favourite: what stands at temperature 0


@dataclass(frozen=True)
class Report:
    """What a step, or a validation, has to tell."""

    position: Position
    progress: float  # 0 to 1
    loss: float
    scores: dict[str, Score] = field(default_factory=dict)  # by source, and "all"; empty for a step


@dataclass(frozen=True)
class Examples:
    """What is learnt from, and what is not."""

    training: Sequence[Example]
    validation: Sequence[Example]


class Distillation:
    """One run."""

    def __init__(
        self, config: TrainingConfig, student: Student, teachers: tuple[Teacher, Teacher], examples: Examples, device: torch.device
    ):
        """`teachers` are those of the training and of the validation examples. The student is on `device` already.

        Raises ConfigError where there is nothing to learn from.
        """
        if not examples.training:
            raise ConfigError("data.num_tokens: leaves no example to train on. Make more data, or lower training.validation_share.")
        self._config, self._student, self._examples, self._device = config, student, examples, device
        self._teacher, self._examiner = teachers
        self._lengths = [len(example) for example in examples.training]
        groups = parameter_groups(student, config.weight_decay)
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        self._optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, fused=True)
        self.position = Position()

    def run(self, folder: RunFolder, fingerprint: dict[str, Any], on_report: Callable[[Report], None] = lambda report: None) -> None:
        """Train to the end, from the checkpoint in `folder` if there is one. `fingerprint` is kept with it."""
        folder.go_on_from(self.restore(folder))
        stream = self._passes()
        while self.progress < 1:
            began = time.perf_counter()
            loss = self._step(stream, folder)
            self.position.seconds += time.perf_counter() - began
            on_report(Report(self.position, self.progress, loss))
            step, is_last = self.position.step, self.progress >= 1
            if step % self._config.validate_every == 0 or is_last:
                on_report(self._validated(folder, loss))
            if step % self._config.checkpoint_every == 0 or is_last:
                folder.save({"fingerprint": fingerprint, **self._state()})

    def restore(self, folder: RunFolder) -> dict[str, Any] | None:
        """Be where the checkpoint in `folder` was, if there is one, which is returned."""
        if state := folder.load():
            self.position = Position(**state["position"])
            self._student.restore(state["student"])
            self._optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"])
        return state

    @property
    def progress(self) -> float:
        """How much of the run is done, from 0 to 1."""
        if self._config.steps is not None:
            return min(1.0, self.position.step / self._config.steps)
        return min(1.0, self.position.tokens / (self._config.tokens or 1))

    # ------------------------------------------------------------------ learning
    def _passes(self) -> Iterator[tuple[int, ...]]:
        """The passes from the position on, which stands behind each one that is given."""
        while True:
            epoch = passes(self._lengths, self._config.pass_tokens, self._config.seed, self.position.epoch)
            for index in range(self.position.pass_index, len(epoch)):
                self.position.pass_index = index + 1
                yield epoch[index]
            self.position.epoch += 1
            self.position.pass_index = 0

    def _step(self, stream: Iterator[tuple[int, ...]], folder: RunFolder) -> float:
        """One step of the optimizer. Returns the mean loss of its rows, before it."""
        rate = learning_rate(self._config, self.progress)
        self._student.model.train()
        num_rows, total = 0, 0.0
        while num_rows < self._config.batch_tokens:
            batch = collate(self._examples.training, next(stream)).to(self._device)
            total += self._accumulate(batch)
            num_rows += len(batch.rows)
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad.div_(num_rows)
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self._config.gradient_clip))
        if not math.isfinite(norm):
            raise ConfigError(
                f"training.learning_rate: {self._config.learning_rate} - step {self.position.step} has no finite gradient; lower it"
            )
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.position.step += 1
        self.position.tokens += num_rows
        entry = {"kind": "step", "step": self.position.step, "tokens": self.position.tokens, "loss": total / num_rows}
        folder.log(entry | {"learning_rate": rate, "gradient_norm": norm})
        return total / num_rows

    def _accumulate(self, batch: Batch) -> float:
        """Add the gradient of a batch's summed loss to the parameters'. Returns that sum."""
        taught = self._teacher.of(batch)
        with self._mixed():
            readings, head = self._student.readings(batch, taught.states, is_learning=True), self._student.head()
        weight = head.detach()
        to_states = [torch.empty_like(reading.states) for reading in readings]
        to_weight = torch.zeros_like(weight) if head.requires_grad else None
        total = 0.0
        for place, rows, judged in self._judged(readings, weight, taught, needs_gradient=True):
            reading = readings[place]
            assert judged.gradient is not None
            shares = reading.counted[rows].to(judged.loss.dtype) * reading.weight
            gradient = judged.gradient.mul_(shares.unsqueeze(-1)).to(self._product_dtype(weight))
            to_states[place][rows] = (gradient @ weight.to(gradient.dtype)).to(reading.states.dtype)
            if to_weight is not None:
                to_weight += gradient.T @ reading.states.detach()[rows].to(gradient.dtype)
            total += float((judged.loss * shares).sum(dtype=torch.float64))
        ends, gradients = [reading.states for reading in readings], to_states
        if to_weight is not None:
            ends, gradients = [*ends, head], [*gradients, to_weight]
        torch.autograd.backward(ends, gradients)
        return total

    def _judged(
        self, readings: Sequence[Reading], weight: Tensor, taught: Taught, needs_gradient: bool
    ) -> Iterator[tuple[int, slice, Judgement]]:
        """The rows of a batch, some at a time, by each reading, whose place comes first: against the head's weight [N, hidden]."""
        dtype = self._product_dtype(weight)
        weight = weight.to(dtype)
        for begin in range(0, len(taught.states), self._config.logit_rows):
            rows = slice(begin, begin + self._config.logit_rows)
            target = taught.rows(rows)
            for place, reading in enumerate(readings):
                yield place, rows, self._judge(reading.states.detach()[rows].to(dtype) @ weight.T, target, needs_gradient)

    def _judge(self, drafter: Tensor, target: TargetRows, needs_gradient: bool) -> Judgement:
        num_rows = CACHED_ROWS if self._device.type == "cpu" else len(drafter)
        parts = [
            judge(d, t, self._config.loss, self._student.draft_ids, needs_gradient)
            for d, t in zip(drafter.split(num_rows), target.split(num_rows), strict=True)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        ]
        return parts[0] if len(parts) == 1 else joined(parts)

    def _mixed(self) -> AbstractContextManager[None]:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._config.precision == "bfloat16")

    def _product_dtype(self, like: Tensor) -> torch.dtype:
        return torch.bfloat16 if self._config.precision == "bfloat16" else like.dtype

    # ------------------------------------------------------------------ validation
    def _validated(self, folder: RunFolder, loss: float) -> Report:
        scores = self.scores()
        entry = {"kind": "validation", "step": self.position.step, "tokens": self.position.tokens}
        folder.log(entry | {"sources": {name: asdict(score) for name, score in scores.items()}})
        return Report(self.position, self.progress, loss, scores)

    @torch.no_grad()
    def scores(self) -> dict[str, Score]:
        """How good the drafter is on the validation examples, by source and over "all" from the text alone; "draft 1" and so on are
        those behind the target's state, over all sources. Empty where there are no examples."""
        self._student.model.eval()
        sums: dict[str, Tensor] = {}
        examples = self._examples.validation
        for chosen in in_passes(range(len(examples)), [len(example) for example in examples], self._config.pass_tokens):
            batch = collate(examples, chosen).to(self._device)
            taught = self._examiner.of(batch)
            with self._mixed():
                readings, head = self._student.readings(batch, taught.states, is_learning=False), self._student.head()
            by_reading = list(self._judged(readings, head, taught, needs_gradient=False))
            for place, reading in enumerate(readings):
                table = _columns([judged for own, _, judged in by_reading if own == place], reading.counted)
                for index, rows in zip(batch.examples, torch.split(table, list(batch.counts)), strict=True):
                    for name in (examples[index].source, "all") if place == 0 else (f"draft {place}",):
                        sums[name] = sums.get(name, torch.zeros(4, dtype=torch.float64)) + rows.sum(0)
        return {name: Score(int(s[0]), *(s[1:] / s[0]).tolist()) for name, s in sorted(sums.items())}

    # ------------------------------------------------------------------ checkpoints
    def _state(self) -> dict[str, Any]:
        return {
            "position": asdict(self.position),
            "student": self._student.weights(),
            "optimizer": self._optimizer.state_dict(),
            "rng": torch.get_rng_state(),  # nothing draws from it today; a model with dropout would
        }


def _columns(judged: Sequence[Judgement], counted: Tensor) -> Tensor:
    """[R, 4] on the host: one, loss, acceptance, agreement; zeros for what is not counted."""
    columns = [torch.cat([getattr(some, name) for some in judged]).double() for name in ("loss", "acceptance", "agreement")]
    return (torch.stack([torch.ones_like(columns[0]), *columns], dim=-1) * counted.unsqueeze(-1)).cpu()


def learning_rate(config: TrainingConfig, progress: float) -> float:
    """A straight rise, then half a cosine down to `final_learning_rate` of the highest."""
    if progress < config.warmup:
        return config.learning_rate * max(progress / config.warmup, 0.01)  # the first step is to learn, too
    done = (progress - config.warmup) / (1 - config.warmup)
    floor = config.final_learning_rate
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done)))
