"""The application: puts routes, state and error handling together. Reads no configuration file and runs no server."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from engine.client import EngineClient
from engine.errors import ConfigError, EngineDead
from engine.stats import EngineInfo
from server import errors, logs, ops, page
from server.body import BodyBounds, BodyLimit
from server.deps import Serving, config_labels
from server.dialect import dialect_of
from server.drain import Draining
from server.grammar_checker import Checker
from server.keys import BearerAuth, digests_of
from server.metrics import Metrics
from server.openai import cascade, chat, completions, models, tokenize
from server.record import Objectives
from server.rootpath import RootPath
from server.settings import Deployment, ServerSettings
from server.text import TextTokenizer
from server.traces import NoTraces, Traces

TokenizerLoader = Callable[[str], TextTokenizer]


def create_app(
    engine: EngineClient,
    deployment: Deployment,
    load_tokenizer: TokenizerLoader = TextTokenizer.from_folder,
    waits_for_engine: bool = True,
) -> FastAPI:
    """An application over one engine.

    Its lifespan starts the engine unless it was started before, reads the tokenizer in `engine.info.target_path`, and closes the
    engine at the end. With `waits_for_engine` False it serves while that goes on, /health with 200 and /ready with 503; then the task
    `app.state.loading` says how it ended. `app.state.draining.begin()` is for whoever handles SIGTERM.
    """
    app = _Api(
        title="Cascade Serve",
        version=_version(),
        lifespan=_lifespan,
        redirect_slashes=False,
        strict_content_type=False,
        docs_url=None,  # FastAPI's pages load scripts from another server
        redoc_url=None,
        servers=[{"url": deployment.server.root_path}] if deployment.server.root_path else None,
    )
    app.state.engine = engine
    app.state.deployment = deployment
    app.state.load_tokenizer = load_tokenizer
    app.state.waits_for_engine = waits_for_engine
    app.state.metrics = _metrics(deployment)
    app.state.draining = Draining(deployment.server.drain_seconds)
    app.state.traces = _traces(deployment, app.version)
    app.state.serving = None  # until the model is loaded
    for router in (chat.router, tokenize.chat_router, completions.router, models.router, tokenize.router, cascade.router):
        app.include_router(router, prefix="/v1", responses=errors.DOCUMENTED)
    app.include_router(tokenize.router, responses=errors.DOCUMENTED)
    app.include_router(ops.router, responses={status: errors.DOCUMENTED[status] for status in (400, 401, 405, 408, 413)})
    if deployment.server.page:
        app.include_router(page.router)
    _guard(app, deployment.server)
    return app


def _guard(app: FastAPI, settings: ServerSettings) -> None:
    """Everything that stands around the routes. What is added later stands further outside."""
    refused = _noting(app.state.metrics)
    errors.install(app, refused)
    app.add_middleware(errors.Unforeseen, refused=refused)
    app.add_middleware(BodyLimit, bounds=BodyBounds(settings.max_body_bytes, settings.body_timeout_seconds), refused=refused)
    app.add_middleware(BearerAuth, digests=digests_of(settings), refused=refused, max_open=settings.max_requests_per_key)
    if settings.cors_origins:  # around the keys: a browser asks first whether it may send one, and reads refusals, too
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("x-request-id", "x-cascade-ignored", "retry-after"),
        )
    app.add_middleware(app.state.traces.middleware)
    app.add_middleware(LoggedRequests)  # around the others: refusals have an id, too
    if settings.root_path:
        app.add_middleware(RootPath, prefix=settings.root_path)


def _noting(metrics: Metrics) -> errors.Refused:
    def refused(status: int, code: str) -> None:
        metrics.refused(status, code)
        logs.note_error(code)

    return refused


class _Api(FastAPI):
    """FastAPI that describes no status that is never sent: no 422 at all."""

    def openapi(self) -> dict[str, Any]:
        description = super().openapi()
        for operations in description["paths"].values():
            for method, operation in operations.items():
                operation["responses"].pop("422", None)
                if method != "post":  # what takes no work has no bound by key
                    operation["responses"].pop("429", None)
        for name in ("HTTPValidationError", "ValidationError"):
            description["components"]["schemas"].pop(name, None)
        return description


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    app.state.loading = loading = asyncio.ensure_future(_load(app))
    try:
        if app.state.waits_for_engine:
            await loading
        yield
    finally:
        app.state.draining.detach()
        loading.cancel()
        await app.state.engine.close()
        if app.state.serving is not None:
            app.state.serving.grammars.close()
        await app.state.traces.close()


async def _load(app: FastAPI) -> EngineInfo:
    engine: EngineClient = app.state.engine
    info = await _started(engine)
    tokenizer: TextTokenizer = app.state.load_tokenizer(info.target_path)
    settings = app.state.deployment.server
    app.state.serving = Serving(
        engine=engine,
        version=app.version,
        tokenizer=tokenizer,
        deployment=app.state.deployment,
        metrics=app.state.metrics,
        draining=app.state.draining,
        started_at=int(time.time()),
        grammars=Checker(Path(info.target_path), info.end_token_ids),
        dialect=dialect_of(tokenizer.template_source, settings.tool_format, settings.reasoning_format),
        traces=app.state.traces,
    )
    app.state.metrics.describe(app.version, config_labels(app.state.deployment, info))
    engine.on_step(app.state.metrics.observe_step)
    engine.on_loss(app.state.metrics.observe_loss)
    app.state.draining.attach()
    return info


async def _started(engine: EngineClient) -> EngineInfo:
    try:
        return engine.info
    except EngineDead:  # not started yet; one that is really dead says so again
        await engine.start()
        return engine.info


def _metrics(deployment: Deployment) -> Metrics:
    server = deployment.server
    objectives = Objectives(server.objective_first_token_seconds, server.objective_per_token_seconds)
    return Metrics(deployment.model.name, objectives, server.vllm_metric_names)


def _traces(deployment: Deployment, version: str) -> Traces:
    """Those that the deployment asks for. Raises ConfigError where OpenTelemetry is not installed."""
    endpoint = deployment.server.otlp_endpoint
    if endpoint is None:
        return NoTraces()
    try:
        from server.otlp import OtlpTraces
    except ImportError as error:
        raise ConfigError(f"server.otlp_endpoint: {endpoint} - needs OpenTelemetry: pip install -e '.[trace]' ({error})") from error
    return OtlpTraces(endpoint, version)


class LoggedRequests:
    """Middleware: every response has the x-request-id that the client sent, or one of its own, and every request its line in the log.

    It is the first to see a request, and notes in its scope when it came.
    """

    _FIT = re.compile(r"[\x21-\x7e]{1,200}")

    def __init__(self, app: ASGIApp):
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        line = logs.begin(given if self._FIT.fullmatch(given) else uuid.uuid4().hex)
        scope["arrived_at"] = time.monotonic()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                line.status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = line.request_id
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            line.write(scope)


def _version() -> str:
    try:
        return metadata.version("cascade-serve")
    except metadata.PackageNotFoundError:  # run from a checkout that was never installed
        return "0+unknown"
