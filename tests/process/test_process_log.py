"""The log of a whole server as a program that collects it reads it: both processes write one JSON object a line, and nothing else."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parents[2]

PROGRAM = """
import server.launch
from engine import logs
from engine.process import ProcessClient
from server.listener import bind
from server.logs import AboutRequests
from server.settings import Deployment
from tests.process.fake import FACTORY, make_config

server.launch._engine = lambda deployment, say, factory: ProcessClient(make_config(fails_at=6), progress=say, factory=FACTORY)
deployment = Deployment.model_validate({"model": {"name": "tiny", "target": {"source": "x"}}, "server": {"port": 0}})
logs.set_up("INFO", FORM, filters=[AboutRequests()])
server.launch.run(deployment, bind(deployment.server), logs.say)
"""


def run(form: str) -> list[str]:
    """What a server says that answers one request, loses its engine by an error in the next one, and is told to end."""
    command = [sys.executable, "-c", PROGRAM.replace("FORM", repr(form))]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines: list[str] = []
            while "Ready on" not in "".join(lines[-1:]):
                lines.append(process.stderr.readline())
                assert lines[-1], "it ended too soon"
            (url,) = re.findall(r"http://[\d.:]+", lines[-1])
            body = {"model": "tiny", "prompt": [5], "max_tokens": 4}
            with httpx.Client(headers={"x-request-id": "r-1"}, timeout=20) as http:
                assert http.post(f"{url}/v1/completions", json=body).status_code == 200
                assert http.post(f"{url}/v1/completions", json=body | {"max_tokens": 100}).status_code == 500
                deadline = time.monotonic() + 60
                while http.get(f"{url}/ready").status_code != 200:
                    assert time.monotonic() < deadline
                    time.sleep(0.1)
            process.send_signal(signal.SIGTERM)
            said, rest = process.communicate(timeout=120)
            assert (process.returncode, said) == (0, "")
            return [*(line.rstrip("\n") for line in lines), *rest.splitlines()]
        finally:
            process.kill()


def test_every_line_of_both_processes_is_json() -> None:
    lines: list[dict[str, Any]] = [json.loads(line) for line in run("json")]
    assert {line["process"] for line in lines} == {"server", "engine"}
    (stopped,) = [line for line in lines if line["process"] == "engine"]
    assert (stopped["level"], stopped["logger"]) == ("error", "engine.child")
    assert stopped["message"] == "The engine stopped at an internal error"
    assert stopped["exception"].endswith("RuntimeError: boom")
    requests = [line for line in lines if line["logger"] == "server.requests"]
    assert [(line["status"], line["code"], line.get("request_id")) for line in requests] == [
        (200, None, "r-1"),
        (500, "engine_dead", "r-1"),
    ]
    said = [line["message"] for line in lines if line["logger"] == "cascade"]
    assert said[0] == "Loading the fake"
    assert any(text.startswith("Loaded ") for text in said)
    assert said[-1] == "Stopped"
    assert any(line["logger"] == "engine.process" and "(RuntimeError)" in line["message"] for line in lines), "the loss itself"


def test_for_people_both_look_alike() -> None:
    lines = run("console")
    (stopped,) = [line for line in lines if "engine.child: " in line]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ERROR engine: engine\.child: The engine stopped at an internal error", stopped)
    assert lines[lines.index(stopped) + 1] == "  Traceback (most recent call last):"
    assert sum("server.requests: [r-1] request" in line for line in lines) == 2


# ---------------------------------------------------------------------- the command
def cascade(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from server.cli import main; main()", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ | environment)


def test_the_command_says_everything_as_json(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(f"model: {{name: a, target: {{source: {tmp_path}}}}}\nserver: {{port: 0, log_format: json, log_level: error}}\n")
    done = cascade("serve", str(file))
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert done.returncode == 2
    assert lines[0]["message"].startswith("Cascade Serve ")
    assert (lines[-1]["level"], lines[-1]["logger"]) == ("error", "cascade")
    assert lines[-1]["message"].endswith(f"{tmp_path} has no config.json.")


def test_with_the_variable_even_mistakes_in_the_file_are_json(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("model: {name: a, target: {source: b}}\nengine: {block_size: 0}\n")
    done = cascade("serve", str(file), CASCADE_LOG_FORMAT="json", CASCADE_SERVICE_HOST="10.0.0.1")
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(line["level"], line["logger"]) for line in lines] == [("warning", "server.settings"), ("error", "cascade")]
    assert "CASCADE_SERVICE_HOST is not known" in lines[0]["message"]
    assert lines[1]["message"] == f"{file}: engine.block_size: 0 - must be at least 1"
    assert done.returncode == 2
