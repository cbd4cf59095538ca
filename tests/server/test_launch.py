"""`cascade check` on tiny models, without network, and the port that `cascade serve` binds."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import uvicorn
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from engine.config import ModelDrafterConfig
from engine.errors import ConfigError
from engine.model import onednn
from engine.model.loader import quiet_transformers
from server.cli import app
from server.drain import Draining
from server.launch import Ending, Server
from server.listener import bind
from server.settings import ServerSettings, load

CONFIGS = Path(__file__).parents[2] / "configs"
HUB_CONFIGS = sorted(file for file in CONFIGS.glob("*.yaml") if file.name != "default.yaml")

runner = CliRunner()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture
def deployment(tmp_path: Path) -> Path:
    sizes = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    with quiet_transformers():
        LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=1, max_position_embeddings=64)).save_pretrained(tmp_path / "tiny")
    file = tmp_path / "tiny.yaml"
    file.write_text(
        f"model: {{name: tiny, target: {{source: {tmp_path / 'tiny'}, dtype: float32}}, drafter: {{kind: ngram}}}}\n"
        "speculation: {presets: {off: {enabled: false}}}\nengine: {device: cpu, kv_cache: 16KiB, block_size: 8, max_sequences: 2}\n"
    )
    return file


@pytest.mark.parametrize("mode", [["--no-load"], []])
def test_check_prints_what_would_be_served(mode: list[str], deployment: Path) -> None:
    result = runner.invoke(app, ["check", str(deployment), *mode], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    shown = {cells[1].strip(): cells[2].strip() for line in result.stdout.splitlines() if len(cells := line.split("│")) == 4}
    assert shown["model ids"] == "tiny, tiny:off"
    assert shown["KV of a token"] == "128 B"  # keys and values, 2 layers, 1 head of 8 values, 4 bytes
    assert shown["blocks"] == "16 of 8 tokens"
    assert shown["served context"] == "64 tokens"
    assert shown["device, dtype"] == "cpu, float32"


@pytest.mark.skipif(bool(onednn.why_not_int8()), reason=onednn.why_not_int8())
def test_check_says_how_weights_are_held_and_refuses_what_cannot_be(deployment: Path) -> None:
    deployment.write_text(deployment.read_text().replace("dtype: float32", "dtype: float32, quantization: int8"))
    result = runner.invoke(app, ["check", str(deployment), "--no-load"], env={"COLUMNS": "200"})
    assert "cpu, float32, target int8" in result.stdout
    deployment.write_text(deployment.read_text().replace("dtype: float32", "dtype: bfloat16"))
    result = runner.invoke(app, ["check", str(deployment), "--no-load"])
    assert result.exit_code == 2
    assert "quantization: 'int8' - 8-bit weights need dtype float32" in result.stderr


def test_check_refuses_what_could_not_be_served(deployment: Path) -> None:
    deployment.write_text(deployment.read_text().replace("16KiB", "16KiB, max_model_len: 65"))
    result = runner.invoke(app, ["check", str(deployment), "--no-load"])
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: engine.max_model_len: 65 - must be at most 64")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("file", HUB_CONFIGS, ids=lambda file: file.name)
def test_ready_made_pairs_are_checked_without_network(file: Path) -> None:
    result = runner.invoke(app, ["check", str(file), "--no-load"], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    assert "unknown offline" in result.stdout
    model = load(file, {}).model
    assert isinstance(model.drafter, ModelDrafterConfig)
    said = f"Not verified: whether this version supports {model.target.source} and {model.drafter.source}. "
    assert result.stdout.splitlines()[-1] == said + "The hub's configs cannot be read here (offline, or gated)."


@pytest.mark.usefixtures("offline")
def test_check_with_loading_needs_the_models(tmp_path: Path) -> None:
    result = runner.invoke(app, ["check", str(HUB_CONFIGS[0])])
    assert result.exit_code == 2
    assert "HF_HUB_OFFLINE is set" in result.stderr


STUBS = {  # a conversion that begins at once and never ends
    "torch": "float32 = None",
    "transformers/integrations/gguf": "def read_gguf_metadata(path): return {'general.architecture': 'llama'}, ()",
    "transformers/__init__": """
import pathlib, sys, time
class AutoModelForCausalLM:
    def from_pretrained(*args, **options):
        pathlib.Path(sys.argv[2], "begun").touch()
        time.sleep(600)
class AutoTokenizer: ...
class GgufConfig:
    def __init__(self, **options): ...
""",
}


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_over(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE  # where nobody collects the orphans of others
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_conversion_ends_with_the_server(tmp_path: Path, number: signal.Signals) -> None:
    for name, source in STUBS.items():
        file = tmp_path / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    code = f"""
from pathlib import Path
from engine.model.gguf_cache import convert_gguf
convert_gguf(Path("model.gguf"), Path({str(tmp_path)!r}))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(tmp_path), str(CONFIGS.parent)))}
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=environment) as parent:
        wait_for((tmp_path / "begun").exists, 60)
        (child,) = psutil.Process(parent.pid).children()
        parent.send_signal(number)
        parent.wait(10)
    try:
        wait_for(lambda: is_over(child), 20)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


def test_a_taken_port_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            bind(ServerSettings(port=port))
    assert str(caught.value) == f"server.port: Port {port} on 127.0.0.1 is in use; choose another with --port."


async def test_an_answer_is_sent_at_once() -> None:
    """Else a body waits 40 ms for the receipt of its headers, whenever a connection is used again."""
    accepted = asyncio.get_running_loop().create_future()
    listener = bind(ServerSettings(port=0))
    server = await asyncio.start_server(lambda _, writer: accepted.set_result(writer), sock=listener)
    async with server:
        _, writer = await asyncio.open_connection(*listener.getsockname())
        answering = await accepted
        assert answering.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        answering.close()
        writer.close()
        await asyncio.gather(answering.wait_closed(), writer.wait_closed())


def test_a_taken_port_is_said_before_anything_heavy_is_imported() -> None:
    code = "import sys; sys.modules['torch'] = sys.modules['uvicorn'] = None; from server.cli import main; main()"
    with socket.create_server(("127.0.0.1", 0)) as other:
        command = [sys.executable, "-c", code, "serve", str(CONFIGS / "default.yaml"), "--port", str(other.getsockname()[1])]
        done = subprocess.run(command, cwd=CONFIGS.parent, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.splitlines()[-1].endswith("is in use; choose another with --port.")) == (2, True), done.stderr


class Idle(Draining):
    """Something that drains at once."""

    def __init__(self, number: int):
        super().__init__(1.5)
        self._number = number

    @property
    def num_running(self) -> int:
        return self._number


@pytest.mark.parametrize(("number", "said"), [(0, "0 requests"), (1, "1 request"), (2, "2 requests")])
async def test_a_signal_says_what_is_finished_and_for_how_long(number: int, said: str) -> None:
    lines: list[str] = []
    ending, server = Ending(lines.append), Server(uvicorn.Config(lambda: None))
    ending.serve(server, Idle(number), 1.5)
    ending._handle(signal.SIGTERM)
    assert ending._drain is not None
    await ending._drain
    assert server.should_exit
    assert lines == [f"SIGTERM: finishing {said} (up to 1.5 s); a second signal stops at once"]


@pytest.mark.parametrize("host", ["a..b", "a" * 64])
def test_a_host_that_can_be_no_name_is_one_line(host: str) -> None:
    with pytest.raises(ConfigError, match=r"^server\.host: '.*' - is no address and no host name \(.*\)\.$"):
        bind(ServerSettings(host=host))


def test_an_address_of_another_machine_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"server\.host: '192\.0\.2\.1'"):
        bind(ServerSettings(host="192.0.2.1"))
