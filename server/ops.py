"""What operators and probes ask: /health and /ready, open to everybody; /metrics and /version, which want a key where there are keys."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse

from engine.client import EngineClient
from server.drain import Draining
from server.errors import without_paths
from server.metrics import CONTENT_TYPE, Metrics

router = APIRouter()


@router.get("/health", responses={503: {"description": "The engine is dead."}})
async def health(request: Request) -> Response:
    """200 as long as a restart would not help: while loading, busy and draining, too. 503 when the engine is dead."""
    engine: EngineClient = request.app.state.engine
    state = engine.health
    if state.is_alive:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "dead", "reason": without_paths(state.reason)}, 503)


@router.get("/ready", responses={503: {"description": "Not ready, and why."}})
async def ready(request: Request) -> Response:
    """200 if requests should be sent here: loaded, not draining, and steps make progress. Otherwise 503 with the reason."""
    reason = _why_not_ready(request)
    return JSONResponse({"status": "ready"}) if reason is None else JSONResponse({"status": "not ready", "reason": reason}, 503)


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Everything in Prometheus' text format."""
    of_app: Metrics = request.app.state.metrics
    return Response(of_app.exposition(_why_not_ready(request) is None), media_type=CONTENT_TYPE)


@router.get("/version")
async def version(request: Request) -> Response:
    """The server's version."""
    return JSONResponse({"version": request.app.version})


def _why_not_ready(request: Request) -> str | None:
    draining: Draining = request.app.state.draining
    engine: EngineClient = request.app.state.engine
    if draining.is_draining:
        return "the server is shutting down"
    if not engine.health.is_ready:
        return without_paths(engine.health.reason)
    return None if request.app.state.serving is not None else "the model is being loaded"
