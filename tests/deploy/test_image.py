"""The Dockerfile: that it lints, that everything it copies exists and is not left out, and that its versions are those of the project.

The steps themselves take minutes and some GB: CASCADE_TEST_IMAGE=/usr/bin/python3.11 has them carried out, by deploy/rehearse.py.
"""

from __future__ import annotations

import http.server
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]


def module(name: str) -> ModuleType:
    """A program in deploy/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "deploy" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


constraints = module("constraints")
rehearse = module("rehearse")
healthcheck = module("healthcheck")
STEPS = rehearse.instructions_of((ROOT / "Dockerfile").read_text("utf-8"))


def values(word: str) -> list[str]:
    return [step.rest for step in STEPS if step.word == word]


def hadolint() -> str:
    found = shutil.which("hadolint", path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    if found is None:
        pytest.skip("hadolint is not installed")
    return found


def test_it_lints() -> None:
    done = subprocess.run([hadolint(), "Dockerfile"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_base_is_pinned_and_one() -> None:
    stages = values("FROM")
    outside = [stage.split()[0] for stage in stages if stage.split()[0] not in ("base", "build")]
    assert len(stages) == 3
    assert outside == ["python:3.11.14-slim-bookworm"]
    assert values("COPY").count("--from=build /opt/venv /opt/venv") == 1


def test_everything_it_copies_is_there() -> None:
    for step in (rest for rest in values("COPY") if not rest.startswith("--from=")):
        for source in step.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert not rehearse.is_left_out(source), source
            assert subprocess.run(["git", "check-ignore", "-q", source], cwd=ROOT).returncode == 1, source


@pytest.mark.parametrize(
    ("name", "is_out"),
    [
        ("server/app.py", False),
        ("server/__pycache__/app.pyc", True),
        ("benchmarks/prompts.jsonl", False),
        ("benchmarks/results/a.json", True),
        ("tests/tiny.py", True),
        ("deploy/secrets/api_keys", True),
        ("deploy/healthcheck.py", False),
        (".git", True),
    ],
)
def test_what_is_sent_to_the_builder(name: str, is_out: bool) -> None:
    assert rehearse.is_left_out(name) is is_out


def test_the_program_lies_where_it_is_served_from() -> None:
    """Relative paths in deployment files are relative to the working folder."""
    (command,) = values("CMD")
    assert (ROOT / json.loads(command)[1]).is_file()
    assert values("WORKDIR")[-1] == "/app"
    assert {"configs configs", "models models"} <= set(values("COPY"))
    assert "".join(values("USER")).split(":") == ["10001", "10001"]


def pinned() -> dict[str, str]:
    lines = (ROOT / "deploy" / "constraints.txt").read_text("utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_versions_are_those_the_project_allows() -> None:
    found = pinned()
    for requirement in constraints.dependencies():
        assert requirement.specifier.contains(found[canonicalize_name(requirement.name)]), requirement


def test_nothing_is_installed_unpinned() -> None:
    """What our dependencies depend on, as it is installed here, is in the file, too."""
    assert set(pinned()) >= set(constraints.installed())


def test_an_unknown_instruction_is_refused(tmp_path: Path) -> None:
    with pytest.raises(rehearse.RehearsalFailed, match="ADD is not known here"):
        rehearse.Rehearsal(tmp_path, Path(sys.executable), {}).carry_out(rehearse.instructions_of("FROM a\nADD b c"))


def test_steps_are_carried_out_below_one_folder(tmp_path: Path) -> None:
    text = "FROM a\n# none\nARG WORD=no\nENV DEEP=/app/$WORD OTHER=/appendix\nWORKDIR /app\n"
    text += "RUN echo \\\n  $DEEP ${OTHER} > /app/said\nCOPY LICENSE deploy/healthcheck.py ./\nCOPY configs configs"
    state = rehearse.Rehearsal(tmp_path, Path(sys.executable), {"WORD": "yes"})
    state.carry_out(rehearse.instructions_of(text))
    assert (tmp_path / "app" / "said").read_text() == f"{tmp_path}/app/yes /appendix\n"
    assert {path.name for path in (tmp_path / "app").iterdir()} == {"said", "LICENSE", "healthcheck.py", "configs"}
    assert (tmp_path / "app" / "configs" / "default.yaml").is_file()
    with pytest.raises(rehearse.RehearsalFailed, match="ended with 3"):
        state.carry_out(rehearse.instructions_of("RUN exit 3"))


PRETENDING = """
import http.server, json, os, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({"status": "ready"})
    def do_POST(self):
        self.answer({"choices": [{"message": {"content": "TEXT"}}]})
    def answer(self, content):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())
    def log_message(self, *args): ...
signal.signal(signal.SIGTERM, lambda *_: os._exit(CODE))
http.server.HTTPServer(("127.0.0.1", int(os.environ["CASCADE_PORT"])), Handler).serve_forever()
"""


@pytest.mark.parametrize(
    ("text", "code", "said"), [("Hello", 0, ""), ("", 0, "The answer is empty"), ("Hello", 3, "SIGTERM ended it with 3")]
)
def test_a_start_is_judged(tmp_path: Path, text: str, code: int, said: str) -> None:
    (tmp_path / "server.py").write_text(PRETENDING.replace("TEXT", text).replace("CODE", str(code)))
    state = rehearse.Rehearsal(tmp_path, Path(sys.executable), {}, folder=tmp_path)
    state.entry, state.command = [sys.executable], ["server.py"]
    state.health = [sys.executable, str(ROOT / "deploy" / "healthcheck.py")]
    if said:
        with pytest.raises(rehearse.RehearsalFailed, match=said):
            rehearse.check_serving(state)
    else:
        rehearse.check_serving(state)


def test_a_start_that_ends_at_once_is_said(tmp_path: Path) -> None:
    state = rehearse.Rehearsal(tmp_path, Path(sys.executable), {}, folder=tmp_path)
    state.entry, state.command, state.health = ["false"], [], ["false"]
    with pytest.raises(rehearse.RehearsalFailed, match="did not become healthy"):
        rehearse.check_serving(state)


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="only Linux says so")
def test_memory_is_that_of_everything_a_server_started_and_ended_again() -> None:
    """An engine is started by a thread, and a conversion is over when the server is ready."""
    child = "held = bytearray(200 << 20); import time; time.sleep(1)"
    code = f"import subprocess, sys, threading, time\nrun = lambda: subprocess.run([sys.executable, '-c', {child!r}])\n"
    code += "thread = threading.Thread(target=run)\nthread.start()\nthread.join()\nprint(flush=True)\ntime.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        with rehearse.Memory(process.pid) as memory:
            assert process.stdout is not None
            process.stdout.readline()
        process.kill()
    assert 200 < memory.peak_megabytes < 300
    with rehearse.Memory(process.pid) as memory:
        time.sleep(0.3)
    assert memory.peak_megabytes == 0, "it is gone"


def test_what_is_written_outside_the_cache_is_said(tmp_path: Path) -> None:
    state = rehearse.Rehearsal(tmp_path, Path(sys.executable), {})
    since = time.time() - 5
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "model").touch()
    rehearse.check_written(state, since)
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "scrap").touch()
    with pytest.raises(rehearse.RehearsalFailed, match="scrap was written"):
        rehearse.check_written(state, since)


# ---------------------------------------------------------------------- the health check
class Answering(http.server.BaseHTTPRequestHandler):
    is_ready = True

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/ready" and self.is_ready else 503)
        self.end_headers()
        self.wfile.write(b"the model is being loaded")

    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[http.server.HTTPServer]:
    with http.server.HTTPServer(("127.0.0.1", 0), Answering) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("CASCADE_PORT", str(server.server_port))
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a proxy must not be asked
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.usefixtures("answering")
def test_the_health_check_asks_the_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert healthcheck.main() == 0
    monkeypatch.setattr(Answering, "is_ready", False)
    assert healthcheck.main() == 1
    assert capsys.readouterr().err == "503: the model is being loaded\n"


def test_the_health_check_says_that_nobody_listens(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("CASCADE_PORT", "9")
    assert healthcheck.main() == 1
    assert "refused" in capsys.readouterr().err


def test_the_health_check_speaks_tls(
    monkeypatch: pytest.MonkeyPatch, answering: http.server.HTTPServer, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CASCADE_TLS_CERTIFICATE", "/somewhere.pem")
    assert healthcheck.main() == 1  # this server does not
    assert "SSL" in capsys.readouterr().err


# ---------------------------------------------------------------------- the steps themselves
@pytest.mark.skipif(not os.environ.get("CASCADE_TEST_IMAGE"), reason="takes minutes and some GB, as root: CASCADE_TEST_IMAGE=PYTHON")
@pytest.mark.timeout(1500)
def test_the_steps_make_a_server() -> None:
    command = [sys.executable, "deploy/rehearse.py", "--build-arg", "TORCH_INDEX=", "--python", os.environ["CASCADE_TEST_IMAGE"]]
    assert subprocess.run(command, cwd=ROOT).returncode == 0
