"""A tiny tokenizer folder, and an app over a fake engine: in process and over a socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI
from openai import AsyncOpenAI
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from engine.request import FinishReason
from server.app import create_app
from server.settings import Deployment
from server.text import TextTokenizer
from tests.fakes import FakeEngine, Part, Script, make_info
from tests.server.families import TEMPLATES

TEMPLATE = """{%- for message in messages %}
{%- if message.role == 'system' and not loop.first %}{{ raise_exception('The system message must come first.') }}{% endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def build_tokenizer(add_bos: bool = False) -> Tokenizer:
    """Byte-level BPE with a few merges and ChatML's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog, and then the other one", "hello world"] * 4, trainer)
    tokenizer.add_tokens([AddedToken("<think>", special=False)])
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    return tokenizer


def write_folder(path: Path, template: str, marks: Sequence[str] = ()) -> Path:
    """A model folder. `marks` are further special tokens."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {"bos_token": {"content": "<|endoftext|>"}, "eos_token": "<|im_end|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    (path / "chat_template.jinja").write_text(template, "utf-8")
    return path


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with tokenizer and chat template."""
    return write_folder(tmp_path_factory.mktemp("tiny"), TEMPLATE)


@pytest.fixture(scope="session")
def tokenizer(folder: Path) -> TextTokenizer:
    return TextTokenizer.from_folder(folder)


USER: Any = [{"role": "user", "content": "hello"}]
RENDERED = "user\nhello\nassistant\n"  # the fake engine says the prompt back; special tokens have no text


def make_deployment(**server: Any) -> Deployment:
    """A deployment with an alias and two presets."""
    return Deployment.model_validate(
        {
            "model": {"name": "tiny", "aliases": ["org/tiny"], "target": {"source": "anywhere"}},
            "speculation": {"presets": {"off": {"enabled": False}, "short": {"max_draft": 2}}},
            "server": {"max_queued_requests": 4} | server,
        }
    )


class Served:
    """A running app and what a test wants of it."""

    def __init__(self, app: FastAPI, engine: FakeEngine, http: httpx.AsyncClient):
        self.app = app
        self.engine = engine
        self.http = http
        as_client: Any = http  # newer clients declare httpx2 and take both
        self.openai = AsyncOpenAI(base_url=f"{http.base_url}/v1", api_key="k", http_client=as_client, max_retries=0)

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.http.post(f"/v1/{path}", json={"model": "tiny", **body})

    async def chat(self, content: Any = "hello", **body: Any) -> httpx.Response:
        return await self.post("chat/completions", **{"messages": [{"role": "user", "content": content}], **body})

    async def complete(self, prompt: Any = "hello", **body: Any) -> httpx.Response:
        return await self.post("completions", prompt=prompt, **body)

    def say(self, text: str, finish: FinishReason = FinishReason.STOP, size: int = 1) -> None:
        """Let the engine answer with this text, so many tokens at a time, and with an end token where it is to stop."""
        ids = self.tokenizer.encode(text, add_special_tokens=False).ids
        ids += [2] if finish is FinishReason.STOP else []
        self.answer_with(parts=[Part(tuple(ids[i : i + size])) for i in range(0, len(ids), size)], finish=finish)

    @property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_file(f"{self.engine.info.target_path}/tokenizer.json")

    def prompt(self) -> str:
        """What the model was given last."""
        text: str = self.tokenizer.decode(list(self.engine.requests[-1].prompt_ids), skip_special_tokens=False)
        return text

    def answer_with(self, **script: Any) -> None:
        """Change how the engine answers from now on."""
        self.engine.script = Script(**script)


@asynccontextmanager
async def serve(
    folder: Path, deployment: Deployment | None = None, raise_app_exceptions: bool = True, **info: Any
) -> AsyncIterator[Served]:
    """An app in process, its lifespan running."""
    end_token_ids = info.pop("end_token_ids", (2,))
    engine = FakeEngine(make_info(str(folder), end_token_ids=end_token_ids, **info), max_queued=4)
    app = create_app(engine, deployment or make_deployment())
    transport = httpx.ASGITransport(app, raise_app_exceptions=raise_app_exceptions)
    async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        yield Served(app, engine, http)


@asynccontextmanager
async def listen(app: FastAPI) -> AsyncIterator[tuple[uvicorn.Server, str]]:
    """An app on a free port of the loopback interface."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", lifespan="on"))
    task = asyncio.ensure_future(server._serve())  # `serve` would install signal handlers
    while not server.started:
        assert not task.done()
        await asyncio.sleep(0.01)
    try:
        yield server, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        await task


@asynccontextmanager
async def serve_socket(folder: Path, deployment: Deployment | None = None) -> AsyncIterator[Served]:
    """An app on a real socket."""
    engine = FakeEngine(make_info(str(folder), end_token_ids=(2,)), max_queued=4)
    app = create_app(engine, deployment or make_deployment())
    async with listen(app) as (_, url), httpx.AsyncClient(base_url=url, timeout=20) as http:
        yield Served(app, engine, http)


@pytest.fixture
async def served(folder: Path) -> AsyncIterator[Served]:
    async with serve(folder) as it:
        yield it


@pytest.fixture
async def hermes(tmp_path: Path) -> AsyncIterator[Served]:
    """A model whose template teaches tools."""
    async with serve(write_folder(tmp_path, TEMPLATES["hermes"]), max_model_len=4096) as served:
        yield served


@pytest.fixture(params=["in process", "over a socket"])
async def both(folder: Path, request: pytest.FixtureRequest) -> AsyncIterator[Served]:
    """The same app, in process and over a socket."""
    async with serve(folder) if request.param == "in process" else serve_socket(folder) as it:
        yield it


async def until(condition: Any, seconds: float = 20) -> None:
    """Wait for something that other tasks bring about."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110  # any condition of any task
            await asyncio.sleep(0.005)


def events_of(response: httpx.Response) -> list[str]:
    """The data of a stream's events, as they were sent."""
    assert response.headers["content-type"].startswith("text/event-stream")
    return [block.removeprefix("data: ") for block in response.text.split("\n\n") if block and not block.startswith(":")]


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert list(response.json()) == ["error"]
    error: dict[str, Any] = response.json()["error"]
    assert list(error) == ["message", "type", "param", "code"]
    return error


def chunks_of(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream, which must end with [DONE]."""
    events = events_of(response)
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]
