"""Every command block in the documents is run by a test, or says what a test has not got; all are read for mistakes.

The line above a block is a comment: `run by:` a file, or a file and a test in it; or `needs:` words of NEEDS. Blocks are fenced, or
indented by four blanks.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from server.cli import app
from server.settings import OTHER_VARIABLES, ServerSettings

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "deploy/README.md")
NEEDS = {"docker", "gpu", "cluster", "network", "hours", "minutes", "root", "prometheus"}
PROSE = ("text", "yaml", "json")  # what is shown and not run
SHELL = ("", "bash", "sh", "indented")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$|(?:(?<=\n\n)|\A)((?:    .*\n)+)", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!-- (run by|needs): (.+) -->\s*\Z")


@dataclass(frozen=True)
class Block:
    document: str
    line: int
    language: str
    text: str
    mark: str
    marked: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks_of(document: str, content: str) -> list[Block]:
    found = []
    for match in BLOCK.finditer(content):
        mark = MARK.search(content[: match.start()])
        language, text = ("indented", match[3]) if match[3] else (match[1], match[2])
        how, marked = (mark[1], mark[2]) if mark else ("", "")
        found.append(Block(document, content.count("\n", 0, match.start()) + 1, language, text, how, marked))
    return found


def commands(document: str) -> list[Block]:
    return [block for block in blocks_of(document, (ROOT / document).read_text("utf-8")) if block.language not in PROSE]


BLOCKS = [block for document in DOCUMENTS for block in commands(document)]
every_block = pytest.mark.parametrize("block", BLOCKS, ids=str)


def why_not(block: Block) -> str:
    """What is wrong with the mark of a block."""
    if not block.mark:
        return "has no comment above it that says who runs it or what it needs"
    if block.mark == "needs":
        unknown = set(block.marked.split(", ")) - NEEDS
        return f"needs {unknown}, which nobody knows" if unknown else ""
    file, _, test = block.marked.partition("::")
    if not (ROOT / file).is_file():
        return f"is run by {file}, which is not there"
    source = (ROOT / file).read_text("utf-8")
    return (
        ""
        if not test or re.search(rf"^\s*(async )?def {re.escape(test)}\(", source, re.MULTILINE)
        else f"is run by {test}, which is not there"
    )


@every_block
def test_a_block_is_run_or_says_what_it_needs(block: Block) -> None:
    assert why_not(block) == "", f"{block} {why_not(block)}"


def test_blocks_are_found() -> None:
    assert {block.document for block in BLOCKS} == set(DOCUMENTS)
    kinds = {block.language for block in BLOCKS}
    assert {"", "bash", "python", "indented"} >= kinds >= {"", "bash", "python"}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("```bash\nls\n```\n", "has no comment"),
        ("Text.\n\n    ls\n", "has no comment"),
        ("<!-- needs: docker -->\nText.\n```bash\nls\n```\n", "has no comment"),
        ("<!-- needs: docker, patience -->\n```bash\nls\n```\n", "needs {'patience'}"),
        ("<!-- run by: tests/absent.py -->\n```bash\nls\n```\n", "is run by tests/absent.py, which is not there"),
        ("<!-- run by: tests/deploy/test_documents.py::absent -->\n```bash\nls\n```\n", "is run by absent, which is not there"),
        ("<!-- needs: docker, gpu -->\n```bash\nls\n```\n", ""),
        ("<!-- needs: docker -->\n\n    ls\n", ""),
        ("<!-- run by: .ci/run -->\n```bash\nls\n```\n", ""),
    ],
)
def test_a_mark_that_says_nothing_is_found(content: str, said: str) -> None:
    (block,) = blocks_of("README.md", content)
    assert why_not(block).startswith(said)
    assert bool(why_not(block)) == bool(said)


# ---------------------------------------------------------------------- mistakes in what is written
@every_block
def test_a_block_can_be_read(block: Block) -> None:
    if block.language == "python":
        compile(block.text, str(block), "exec")
    elif block.language in ("bash", "sh"):
        shell = shutil.which("bash") or "sh"
        done = subprocess.run([shell, "-n"], input=block.text, capture_output=True, text=True, timeout=20)
        assert done.returncode == 0, done.stderr


@every_block
def test_what_a_block_names_is_there(block: Block) -> None:
    if block.language not in SHELL:
        return
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:^|&& |^ +)make (\w+)", block.text, re.MULTILINE)) <= targets
    verbs = getattr(get_command(app), "commands")  # noqa: B009  # typer says only that it is a command
    assert set(re.findall(r"(?:^ *|bin/)cascade (\w+)", block.text, re.MULTILINE)) <= set(verbs)
    for path in re.findall(r"(?<![\w/])(?:configs|deploy|tests|benchmarks)/[\w./-]+", block.text):
        assert (ROOT / path).exists() or path.startswith("deploy/secrets/"), path


def test_shown_deployments_are_yaml() -> None:
    for document in DOCUMENTS:
        for block in blocks_of(document, (ROOT / document).read_text("utf-8")):
            if block.language == "yaml":
                assert isinstance(yaml.safe_load(block.text), dict)


def test_paths_in_the_text_of_the_page_on_running_are_there() -> None:
    text = (ROOT / "deploy" / "README.md").read_text("utf-8")
    for path in re.findall(r"`((?:kubernetes|deploy|configs|tests)/[\w./-]*)`", text):
        assert any((folder / path).exists() for folder in (ROOT, ROOT / "deploy")) or path.startswith("deploy/secrets/"), path


def test_all_variables_are_in_the_readmes_table() -> None:
    """Those of the server's settings by their rule; the file that it names has every one of them."""
    text, keys = (ROOT / "README.md").read_text("utf-8"), yaml.safe_load((ROOT / "configs/default.yaml").read_text("utf-8"))["server"]
    written = set(re.findall(r"`(CASCADE_\w+)`", text))
    assert "`CASCADE_` and a key of the file's `server` part in capitals" in text
    assert set(keys) == set(ServerSettings.model_fields)
    assert OTHER_VARIABLES <= written <= OTHER_VARIABLES | {f"CASCADE_{key.upper()}" for key in keys}
