"""The finished drafter as a folder: weights, config, the target's tokenizer, how it came about, and a card for people.

A folder that is there is replaced only if it is such a folder itself. Refuses everything else before anything is trained.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.config import Quantization
from engine.errors import ConfigError, SourceError
from engine.model.borrowed import entry_of
from engine.model.draft_vocabulary import read_draft_ids, write_draft_ids
from engine.model.linear import choose
from engine.model.loader import load, quiet_transformers, read_config, resolve_device, resolve_dtype
from engine.model.onednn import why_not_int8
from engine.model.parts import write_weights
from engine.model.stack import DecoderStack
from engine.model.state_adapter import StateAdapter, read_adapter, write_adapter
from engine.model.timing import measure
from engine.train.config import DistilConfig
from engine.train.distil import Position
from engine.train.models import Student

HISTORY = "training.json"
CARD = "README.md"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model")


@dataclass(frozen=True)
class History:
    """How a drafter came about."""

    config: DistilConfig
    command: str
    position: Position
    num_data_tokens: int  # of answers, validation included
    num_examples: int
    validations: list[dict[str, Any]]  # the log's, in order
    versions: dict[str, str]


def require_replaceable(folder: Path) -> None:
    """Refuse an output folder that holds anything but a drafter of ours. Raises ConfigError."""
    if folder.is_dir() and any(folder.iterdir()) and not (folder / HISTORY).is_file():
        raise ConfigError(f"output: {str(folder)!r} - holds something else than a trained drafter (no {HISTORY}). Name another folder.")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output: {str(folder)!r} - is a file")
    if folder.is_mount():
        raise ConfigError(f"output: {str(folder)!r} - is mounted, so it cannot be replaced as a whole. Name a folder in it.")


def export(student: Student, history: History, target_folder: Path) -> Path:
    """Write the drafter. Raises ConfigError and SourceError; then what was there before is still there."""
    config, output = history.config, Path(history.config.output).resolve()  # a link stays one
    require_replaceable(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{output.name}.tmp-", dir=output.parent))
        try:
            _fill(temporary, student, config, target_folder)
            content = {"recipe": config.model_dump(mode="json"), "position": vars(history.position), "validations": history.validations}
            (temporary / HISTORY).write_text(
                json.dumps(content | {"before": _history_of(config.drafter.init.drafter)}, indent=1) + "\n",
                "utf-8",
            )
            (temporary / CARD).write_text(card(student, history, passes(temporary, target_folder, config)), "utf-8")
            for file in (temporary, *temporary.iterdir()):  # what is made privately is for everybody in its place
                file.chmod(0o755 if file.is_dir() else 0o644)
            _replace(output, temporary)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise SourceError(f"{output} cannot be written: {error.strerror}.") from error
    return output


def _replace(folder: Path, new: Path) -> None:
    """Put a folder in the place of another one, if there is one. Raises OSError; then that one is there again."""
    for file in new.iterdir():
        with file.open("rb") as written:
            os.fsync(written.fileno())
    old = folder.with_name(f"{new.name}.old")
    if folder.exists():
        folder.rename(old)
    try:
        new.rename(folder)
    except OSError:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _fill(folder: Path, student: Student, config: DistilConfig, target_folder: Path) -> None:
    model, dtype = student.model, getattr(torch, config.drafter.dtype)
    state = {name: weight.detach().to("cpu", dtype) for name, weight in student.own().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)  # the same as the embedding
    adapter = student.adapter.weights.state_dict() if student.adapter else {}
    for name, weight in (state | {f"the adapter's {name}": weight.to(dtype) for name, weight in adapter.items()}).items():
        if not bool(weight.isfinite().all()):
            raise ConfigError(f"drafter.dtype: {config.drafter.dtype!r} - cannot hold {name}; take float32")
    write_weights(folder, state, int(config.max_file_size))
    if student.draft_ids is not None:
        write_draft_ids(folder, student.draft_ids)
    if student.adapter is not None:
        write_adapter(folder, student.adapter.weights, dtype)
    own = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": config.drafter.dtype}
    own.pop("_name_or_path", None)
    if config.drafter.embedding == "target":
        own |= entry_of(config.target)
    (folder / "config.json").write_text(json.dumps(own, indent=2, sort_keys=True) + "\n", "utf-8")
    with quiet_transformers():
        model.generation_config.save_pretrained(folder)
    for name in _TOKENIZER_FILES:
        if (target_folder / name).is_file():
            shutil.copyfile(target_folder / name, folder / name)


# ---------------------------------------------------------------------- card
@dataclass(frozen=True)
class Passes:
    """Milliseconds of a pass over one token, head included, of the target and of the drafter by how its weights are held."""

    device: str
    target: float
    drafter: dict[str, float]


def passes(folder: Path, target_folder: Path, config: DistilConfig) -> Passes:
    """Measure the finished drafter beside its target, as an engine runs them here."""
    device = resolve_device(config.device)

    def milliseconds(path: Path, quantization: Quantization) -> float:
        of = read_config(path)
        dtype = torch.float32 if device.type == "cpu" else resolve_dtype("auto", device, of)
        kind = choose(quantization, dtype, device)
        stack = DecoderStack(load(path, dtype, device), kind, read_draft_ids(path, of.vocab_size))
        adapter = read_adapter(path, of.hidden_size, dtype, device)
        stack.adapter = None if adapter is None else StateAdapter(adapter, kind)
        return 1000 * measure(stack)[1]

    kinds: tuple[Quantization, ...] = ("none", "int8") if device.type == "cpu" and not why_not_int8() else ("none",)
    name = f"{torch.get_num_threads()} CPU threads" if device.type == "cpu" else torch.cuda.get_device_name(device)
    return Passes(name, milliseconds(target_folder, "none"), {kind: milliseconds(folder, kind) for kind in kinds})


def card(student: Student, history: History, passes: Passes) -> str:
    """What somebody should know who finds the folder."""
    config, position = history.config, history.position
    shape, data, training = config.drafter, config.data, config.training
    tied = "lm_head.weight" if student.model.config.tie_word_embeddings else None  # the embedding once more
    num_parameters = sum(weight.numel() for name, weight in student.own().items() if name != tied)
    scores = history.validations[-1]["sources"] if history.validations else {}
    behind = {name: score for name, score in scores.items() if name.startswith("draft ")}
    final = {name: score for name, score in scores.items() if name not in behind}
    vocabulary = f"the {shape.draft_vocabulary:,} most frequent of" if shape.draft_vocabulary else "all"
    also = "; embedding and head are the target's, which must be there" if shape.embedding == "target" else ""
    drafted = f"{vocabulary} {student.model.config.vocab_size:,} tokens"
    begun = [("begun with", f"the weights of `{_public(shape.init.drafter)}` as they were before")] if shape.init.drafter else []
    adapter = []
    if student.adapter is not None:
        number = sum(weight.numel() for weight in student.adapter.weights.parameters())
        alone = "; the only part that was trained here" if training.learns == "adapter" else ""
        adapter = [("state adapter", f"{number:,} more, to read the target's last state{alone}")]
    facts = [
        ("target", f"`{_public(config.target.source)}`"),
        ("shape", f"{shape.model_type}, {shape.num_layers} layers of width {shape.hidden_size}, {shape.num_heads} heads; drafts {drafted}"),
        ("parameters", f"{num_parameters:,}, stored as {shape.dtype}{also}"),
        *adapter,
        *begun,
        ("data", f"{history.num_data_tokens:,} tokens of {history.num_examples:,} answers, written by the target, seed {data.seed}"),
        (
            "training",
            f"{position.step:,} steps, {position.tokens:,} tokens (repeats included), loss {training.loss}, products of both models in "
            f"{training.precision}, seed {training.seed}",
        ),
        ("time", f"{position.seconds / 3600:.1f} hours of training"),
        ("made by", f"`{history.command}`, {', '.join(f'{name} {version}' for name, version in history.versions.items())}"),
        ("licence", config.licence),
    ]
    lines = [
        "---",
        f"license: {config.licence.lower()}",
        "---",
        "",
        f"# {Path(config.output).name}",
        "",
        "A drafter for speculative decoding: it writes ahead, its target checks. Alone it is not a useful model."
        + (" Cascade Serve loads it; other programs do not find its embedding." if shape.embedding == "target" else ""),
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in facts),
        "",
        "## How often its drafts stand",
        "",
        "On prompts that were not trained on, teacher-forced on the target's own answers: the mean of sum min(p, q), which is the",
        "probability that one draft is accepted at temperature 1 under the rule exact, and the share of positions at which both models",
        "have the same favourite, which is that at temperature 0.",
        "",
        "| prompts | tokens | temperature 1 | temperature 0 | loss |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {name} | {s['num_tokens']:,} | {s['acceptance']:.3f} | {s['agreement']:.3f} | {s['loss']:.3f} |"
            for name, s in sorted(final.items(), key=lambda item: (item[0] == "all", item[0]))
        ),
        "",
        *_behind_target(behind),
        "## How it got there",
        "",
        *(["The first draft of a row, with the target's state; the drafter itself stayed as it was.", ""] * (training.learns == "adapter")),
        "| tokens learnt from | temperature 1 | temperature 0 | loss |",
        "| --- | --- | --- | --- |",
        *(
            f"| {v['tokens']:,} | {s['acceptance']:.3f} | {s['agreement']:.3f} | {s['loss']:.3f} |"
            for v in _some(history.validations)
            if (s := v["sources"].get("draft 1" if training.learns == "adapter" else "all"))
        ),
        "",
        "More is had from the same command: raise `data.num_tokens` and `training.tokens` in the recipe, and name another",
        "`training.folder`; `drafter.init.drafter` begins with these weights.",
        "",
        "## What a draft costs",
        "",
        f"Milliseconds of a pass over one token, head included, 128 tokens into a text, {passes.device}; drawing the token comes on top.",
        "",
        "| model | milliseconds | of the target's |",
        "| --- | --- | --- |",
        f"| target | {passes.target:.1f} | |",
        *(
            f"| drafter, quantization {kind} | {milliseconds:.2f} | {100 * milliseconds / passes.target:.1f} % |"
            for kind, milliseconds in passes.drafter.items()
        ),
        "",
        "## Where its data came from",
        "",
        "| source | share | what |",
        "| --- | --- | --- |",
        *(f"| {source.name} | {source.weight:g} | {_what(source)} |" for source in data.sources),
        "",
        f"Temperatures of the answers: {', '.join(f'{t.temperature:g} (share {t.weight:g})' for t in data.temperatures)}; at most "
        f"{data.max_tokens} tokens each.",
        f"The whole recipe, and every validation, are in {HISTORY}.",
        "",
    ]
    return "\n".join(lines)


def _history_of(folder: str | None) -> Any:
    """How the drafter that this one began with came about, and the one before that; None where there was none, or nobody knows."""
    path = Path(folder, HISTORY) if folder else None
    if path is None or not path.is_file():
        return None
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError:
        return {"unreadable": HISTORY}  # minutes of training are not lost for it


def _behind_target(scores: dict[str, Any]) -> list[str]:
    """How the drafts of a row stand that begin with the target's state."""
    if not scores:
        return []
    return [
        "### With the target's state",
        "",
        "Where it may read the target's last state (exact requests, greedy or without a seed), over all prompts: the first draft of a",
        "row reads the target's, the next ones its own; drafts that are not here are from the text alone.",
        "",
        "| draft | tokens | temperature 1 | temperature 0 | loss |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {name.removeprefix('draft ')} | {s['num_tokens']:,} | {s['acceptance']:.3f} | {s['agreement']:.3f} | {s['loss']:.3f} |"
            for name, s in sorted(scores.items(), key=lambda item: int(item[0].removeprefix("draft ")))
        ),
        "",
    ]


def _some(validations: list[dict[str, Any]], number: int = 6) -> list[dict[str, Any]]:
    """At most so many of them, evenly, the last among them."""
    step = max(1, -(-len(validations) // number))
    return validations[::-1][::step][::-1]


def _public(source: str) -> str:
    """A source without a machine's folders in it."""
    return Path(source).name if Path(source).is_absolute() else source


def _what(source: Any) -> str:
    if source.kind == "self":
        return f"the target's own questions, sampled at temperature {source.temperature:g}, top-p {source.top_p:g}, and its answers"
    return f"prompts of {Path(source.path).name}, answered by the target"
