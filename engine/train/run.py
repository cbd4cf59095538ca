"""`cascade train distil`, from a recipe to a folder: data, target, drafter, training, export. Each part goes on where it was left."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from engine.errors import ConfigError
from engine.model.draft_vocabulary import read_draft_ids
from engine.model.linear import UNKNOWN, choose, some_outputs
from engine.model.loader import end_token_ids, load, read_config, resolve_device, resolve_dtype
from engine.model.source import CONFIG_FILE, Progress, resolve, silent
from engine.train.checkpoint import RunFolder
from engine.train.config import DistilConfig
from engine.train.data import Made, Material, data_engine, difference, make_shards, recipe_of
from engine.train.distil import Distillation, Examples, Report
from engine.train.export import History, export, require_replaceable
from engine.train.models import Student, TargetTeacher, Teacher, drafter_config, frequent_ids, new_adapter, new_drafter, pack_linears
from engine.train.shards import Example, digest, is_held_out, read_shard
from engine.train.states import KeptTeacher, OnStates, Rows, keep_states


@dataclass(frozen=True)
class Watch:
    """Whom to tell what."""

    say: Progress = silent
    on_data: Callable[[Made], None] = lambda made: None
    on_states: OnStates = lambda done, total: None
    on_report: Callable[[Report], None] = lambda report: None


def target_folder(config: DistilConfig, watch: Watch) -> Path:
    """Where the target is; the recipe is checked as far as it can be without data. Raises ConfigError."""
    folder = resolve(config.target, progress=watch.say)
    require_replaceable(Path(config.output))
    drafter_config(config.drafter, read_config(folder))
    if (earlier := config.drafter.init.drafter) is not None and not (Path(earlier) / CONFIG_FILE).is_file():
        raise ConfigError(f"drafter.init.drafter: {earlier!r} - is no folder of a model")
    resolve_device(config.device)
    return folder


def make_data(config: DistilConfig, material: Material, watch: Watch) -> list[Path]:
    """The shards of a recipe. Raises ConfigError."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    return make_shards(config, material, lambda: data_engine(config, watch.say), watch.on_data)


def distil(
    config: DistilConfig, material: Material, shards: Sequence[Path], command: str, watch: Watch, is_export_only: bool = False
) -> Path:
    """Train a drafter on `shards` and export it; with `is_export_only` what the checkpoint holds. Raises ConfigError."""
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    device, path = resolve_device(config.device), target_folder(config, watch)
    run, fingerprint = RunFolder(Path(config.training.folder)), _fingerprint(config, material, len(shards))
    state = run.load()
    if state is None and is_export_only:
        raise ConfigError(f"training.folder: {config.training.folder!r} - has no checkpoint to export")
    if state is not None and (what := difference(fingerprint, state["fingerprint"])):
        raise ConfigError(f"training.folder: {config.training.folder!r} - holds a run of another recipe: {what}. Name another one.")
    watch.say(f"Loading {path.name} on {device}")
    target = load(path, resolve_dtype(config.target.dtype, device, read_config(path)), device)
    by_shard = [read_shard(shard) for shard in shards]
    examples = [example for found in by_shard for example in found]
    held_out, learnt = _split(examples, config)
    student = _student(config, target, [examples[i] for i in learnt], end_token_ids(path), device)
    if config.training.precision == "bfloat16":
        target.to(torch.bfloat16)  # behind the student, which may take weights of it
    kind, own_head = choose("none", target.dtype, device), target.lm_head
    pack_linears(target, kind)
    if config.training.keep_states and not is_export_only:
        head = kind.make(own_head if student.draft_ids is None else some_outputs(own_head, student.draft_ids), UNKNOWN)
        places = _kept(config, target, shards, by_shard, watch)
        teacher, examiner = (KeptTeacher(head, device, target.dtype, [places[i] for i in side]) for side in (learnt, held_out))
        teachers: tuple[Teacher, Teacher] = teacher, examiner
    else:
        teachers = (TargetTeacher(target, student.draft_ids),) * 2
    sides = Examples([examples[i] for i in learnt], [examples[i] for i in held_out])
    training = Distillation(config.training, student, teachers, sides, device)
    if is_export_only:
        training.restore(run)
    else:
        weights = (weight for module in student.modules for weight in module.parameters())
        num_weights = sum(weight.numel() for weight in weights if weight.requires_grad)
        watch.say(f"Training {num_weights / 1e6:.1f} million weights on {len(learnt):,} answers")
        training.run(run, fingerprint, watch.on_report)
    history = History(
        config=config,
        command=command,
        position=training.position,
        num_data_tokens=sum(len(example.answer_ids) for example in examples),
        num_examples=len(examples),
        validations=run.entries("validation", state if is_export_only else None),
        versions={"python": platform.python_version()} | {name: version(name) for name in ("cascade-serve", "torch", "transformers")},
    )
    return export(student, history, path)


def _fingerprint(config: DistilConfig, material: Material, num_shards: int) -> dict[str, Any]:
    """All that decides how a run goes, beside the seed of its data: what a checkpoint must have been made with."""
    return {
        "data": recipe_of(config, material)["data"] | {"num_shards": num_shards},
        "target": config.target.model_dump(mode="json"),
        "drafter": config.drafter.model_dump(mode="json", exclude={"dtype"}),
        "training": config.training.model_dump(mode="json", exclude={"folder", "validate_every", "validation_tokens", "checkpoint_every"}),
    }


def _split(examples: Sequence[Example], config: DistilConfig) -> tuple[list[int], list[int]]:
    """Indices of the examples for validation, as many as the recipe wants, and of those for training."""
    held_out, learnt, tokens = list[int](), list[int](), dict[str, int]()
    for index, example in enumerate(examples):
        if not is_held_out(example, config.training.validation_share):
            learnt.append(index)
        elif tokens.get(example.source, 0) < config.training.validation_tokens:
            tokens[example.source] = tokens.get(example.source, 0) + len(example.answer_ids)
            held_out.append(index)
    return held_out, learnt


def _student(config: DistilConfig, target: Any, examples: Sequence[Example], end_ids: Sequence[int], device: torch.device) -> Student:
    shape, seed = config.drafter, config.training.seed
    model, adapter = new_drafter(shape, target, seed).to(device), new_adapter(shape, target.config.hidden_size, seed)
    if adapter is not None:
        adapter.weights.to(device)
    number, earlier = shape.draft_vocabulary, None
    if shape.init.drafter is not None:
        earlier = read_draft_ids(Path(shape.init.drafter), model.config.vocab_size)
    num_earlier = None if earlier is None else len(earlier)
    if config.training.learns == "adapter" and num_earlier != number:
        raise ConfigError(f"drafter.draft_vocabulary: {number} - must be that of the drafter that stays as it is, which is {num_earlier}")
    if number is None:
        ids = None
    elif earlier is not None and len(earlier) == number:
        ids = earlier
    else:
        ids = frequent_ids(examples, number, end_ids)
    return Student(model, None if ids is None else ids.to(device), adapter, config.training.learns)


def _kept(config: DistilConfig, target: Any, shards: Sequence[Path], by_shard: Sequence[Sequence[Example]], watch: Watch) -> list[Rows]:
    """Where the target's states of all examples are; those that are not there are made."""
    places: list[Rows] = []
    for number, (shard, examples) in enumerate(zip(shards, by_shard, strict=True)):
        path = shard.with_name(shard.name.replace("shard", "states"))
        made_of = digest(
            [config.target.model_dump_json(), str(target.dtype), *(e.prompt_ids for e in examples), *(e.answer_ids for e in examples)]
        )
        places += keep_states(path, made_of, target, examples, config.training.pass_tokens)
        watch.on_states(number + 1, len(shards))
    return places
