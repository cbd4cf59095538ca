"""Runs one deployment as an HTTP server: loads, serves, drains. The only place that handles signals. The engine, and with it torch, is
in a process of its own.

It listens from the beginning: while the model is loaded /health is 200 and /ready is 503.
SIGTERM or Ctrl-C stops admission and lets what runs finish for up to `drain_seconds`; a second signal ends the process at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from fastapi import FastAPI

from engine.process import FACTORY, ProcessClient
from engine.stats import EngineInfo
from engine.supervision import Supervision
from engine.threads import give_way
from server.app import create_app
from server.deps import Serving
from server.dialect import in_words
from server.drain import Draining
from server.heads import bounded
from server.listener import refused
from server.settings import Deployment, ServerSettings
from server.status import Status, report
from server.tls import check_certificate
from server.units import in_bytes

SIGNALS = (signal.SIGTERM, signal.SIGINT)
CLOSING_SECONDS = 5  # for streams that were cut and for connections to close

Say = Callable[[str], None]


def run(deployment: Deployment, listener: socket.socket, say: Say, factory: str = FACTORY) -> None:
    """Serve until a signal ends it; `listener` is closed then. `factory` makes the engine. Raises ConfigError when it cannot start."""
    asyncio.run(_run(deployment, listener, say, factory))


async def _run(deployment: Deployment, listener: socket.socket, say: Say, factory: str) -> None:
    with listener:
        check_certificate(deployment.server)
        ending = Ending(say)
        ending.listen()
        engine, status = _engine(deployment, say, factory), Status()
        engine.on_step(status.observe_step)
        app = create_app(engine, deployment, waits_for_engine=False)
        server = Server(_uvicorn_config(app, deployment.server))
        serving = asyncio.ensure_future(server.serve([listener]))
        try:
            info = await _loaded_by(server, serving, app)
            say(_loaded(info))
            say(_understood(app.state.serving))
            give_way()
            ending.serve(server, app.state.draining, deployment.server.drain_seconds)
            say(_ready(deployment, listener))
            reporting = asyncio.ensure_future(report(status, say))
            serving.add_done_callback(lambda _: reporting.cancel())
        except BaseException:
            server.should_exit = True
            raise
        finally:
            try:
                await serving
            except OSError as error:
                raise refused(deployment.server, error) from error
        say("Stopped")


def _engine(deployment: Deployment, say: Say, factory: str) -> ProcessClient:
    supervision = Supervision(hang_seconds=deployment.server.engine_hang_seconds)
    return ProcessClient(deployment.engine_part, deployment.server.max_queued_requests, say, supervision, factory)


async def _loaded_by(server: Server, serving: asyncio.Future[None], app: FastAPI) -> EngineInfo:
    """Wait until the app has loaded. Raises what loading raised, or what kept the server from listening."""
    listening = asyncio.ensure_future(server.listening.wait())
    await asyncio.wait((serving, listening), return_when=asyncio.FIRST_COMPLETED)
    if not listening.done():
        listening.cancel()
        await serving
    info: EngineInfo = await app.state.loading
    return info


class Server(uvicorn.Server):
    """uvicorn that leaves signals to us and says when it listens."""

    def __init__(self, config: uvicorn.Config):
        super().__init__(config)
        self.listening = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own would end streams at once, and end the process by the signal instead of with 0."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


class Ending:
    """What signals do. The first one drains, a second one kills."""

    def __init__(self, say: Say):
        self._say = say
        self._server: Server | None = None
        self._draining: Draining | None = None
        self._seconds = 0.0
        self._drain: asyncio.Task[None] | None = None

    def listen(self) -> None:
        """Handle signals on the running event loop."""
        loop = asyncio.get_running_loop()
        for number in SIGNALS:
            loop.add_signal_handler(number, self._handle, number)

    def serve(self, server: Server, draining: Draining, seconds: float) -> None:
        """From now on there is something to drain, for so long."""
        self._server, self._draining, self._seconds = server, draining, seconds

    def _handle(self, number: signal.Signals) -> None:
        if self._server is None or self._draining is None:
            self._say("Stopped while loading")
            os._exit(0 if number == signal.SIGTERM else 128 + number)  # the engine's process ends with this one, wherever it is
        if self._drain is not None:
            self._say(f"Second signal ({number.name}): stopped at once")
            os._exit(128 + number)
        self._say(
            f"{number.name}: finishing {_requests(self._draining.num_running)} (up to {self._seconds:g} s); a second signal stops at once"
        )
        self._draining.begin()
        self._drain = asyncio.create_task(self._finish(self._server, self._draining))

    async def _finish(self, server: Server, draining: Draining) -> None:
        try:
            await asyncio.wait_for(draining.idle(), self._seconds + CLOSING_SECONDS)
        except TimeoutError:
            self._say(f"{_requests(draining.num_running)} could not be ended in time")
        server.should_exit = True


def _requests(number: int) -> str:
    return "1 request" if number == 1 else f"{number} requests"


def _uvicorn_config(app: object, settings: ServerSettings) -> uvicorn.Config:
    if settings.log_level != "debug":
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)  # its start and stop lines repeat ours
    return uvicorn.Config(
        app,  # type: ignore[arg-type]  # any ASGI application
        lifespan="on",
        log_config=None,
        http=bounded(settings.body_timeout_seconds),
        access_log=False,  # server/logs.py has a line for each request
        timeout_graceful_shutdown=CLOSING_SECONDS,
        reset_contextvars=True,  # else a request on a connection that was used before has what that one left: its id, its trace
        forwarded_allow_ips="*" if "*" in settings.trusted_proxies else list(settings.trusted_proxies),
        ssl_certfile=settings.tls_certificate,
        ssl_keyfile=settings.tls_key,
    )


def _loaded(info: EngineInfo) -> str:
    return (
        f"Loaded {in_bytes(info.weight_bytes)} of weights on {info.device} ({info.dtype}); "
        f"the KV cache holds {info.num_blocks * info.block_size:,} tokens in {info.num_blocks:,} blocks ({in_bytes(info.kv_bytes)}), "
        f"the served context is {info.max_model_len:,} tokens"
    )


def _understood(serving: Serving) -> str:
    server = serving.deployment.server
    calls, thinking = in_words(serving.tokenizer.template_source, server.tool_format, server.reasoning_format)
    return f"Tool calls: {calls}. Thinking: {thinking}"


def _ready(deployment: Deployment, listener: socket.socket) -> str:
    host = f"[{deployment.server.host}]" if ":" in deployment.server.host else deployment.server.host
    return f"Ready on {deployment.server.scheme}://{host}:{listener.getsockname()[1]} (models: {', '.join(deployment.model_ids)})"
