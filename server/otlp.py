"""Traces over OTLP, and the only import of OpenTelemetry: a span for each request to /v1, its children queue, prefill and decode.

A `traceparent` that comes with a request is the span's parent; the response has the span's own. Attributes are those of the semantic
conventions for HTTP and generative AI, and `cascade.` ones for what they have no words for. No prompt, no answer. Needs the extra `trace`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import INVALID_SPAN, Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from server.generate import Job
    from server.record import RequestRecord

_OPERATIONS: Mapping[str, str] = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}
_PROPAGATOR = TraceContextTextMapPropagator()


class OtlpTrace:
    """The span of one HTTP request."""

    def __init__(self, tracer: Tracer, span: Span, operation: str):
        self.span = span
        self._tracer = tracer
        self._operation = operation

    def note(self, job: Job, record: RequestRecord, reasons: Sequence[str]) -> None:
        """Say what was asked and what became of it, and when which part began."""
        self.span.update_name(f"{self._operation} {job.model_id}")
        self.span.set_attributes(_asked(job, self._operation) | _answered(job, record, reasons))
        first = record.choices[0]
        begun = record.arrived_at + first.queue_seconds
        if record.first_at is None or record.last_at is None:
            self._child("queue", record.arrived_at, time.monotonic())
            return
        self._child("queue", record.arrived_at, begun)
        self._child("prefill", begun, record.first_at)
        self._child("decode", record.first_at, record.last_at)

    def _child(self, name: str, began: float, ended: float) -> None:
        """A part of the request; times are of the monotonic clock."""
        offset = time.time() - time.monotonic()
        span = self._tracer.start_span(name, set_span_in_context(self.span), start_time=_nanoseconds(began + offset))
        span.end(_nanoseconds(ended + offset))


class OtlpTraces:
    """Sends spans to a collector, from a thread of its own."""

    def __init__(self, endpoint: str, version: str):
        resource = Resource.create({"service.name": "cascade-serve", "service.version": version})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("cascade-serve", version)

    def middleware(self, app: ASGIApp) -> ASGIApp:
        return _Traced(app, self)

    def current(self) -> OtlpTrace:
        return _current.get(None) or OtlpTrace(self._tracer, INVALID_SPAN, "")

    def begin(self, scope: Scope) -> OtlpTrace:
        """The trace of a request that has just come."""
        parent = _PROPAGATOR.extract(dict(Headers(scope=scope).items()))
        attributes = {"http.request.method": scope["method"], "url.path": scope["path"]}
        span = self._tracer.start_span(scope["method"], parent, SpanKind.SERVER, attributes)
        trace = OtlpTrace(self._tracer, span, _OPERATIONS.get(scope["path"], ""))
        _current.set(trace)
        return trace

    async def close(self) -> None:
        await asyncio.to_thread(self._provider.shutdown)


_current: ContextVar[OtlpTrace] = ContextVar("cascade_trace")  # each request runs in a context of its own


class _Traced:
    """Middleware: every request to /v1 has a span, which ends with its response."""

    def __init__(self, app: ASGIApp, traces: OtlpTraces):
        self._app = app
        self._traces = traces

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        span = self._traces.begin(scope).span

        async def send_with_trace(message: Message) -> None:
            if message["type"] == "http.response.start":
                _PROPAGATOR.inject(MutableHeaders(scope=message), set_span_in_context(span))
                span.set_attribute("http.response.status_code", message["status"])
                if message["status"] >= 500:
                    span.set_status(Status(StatusCode.ERROR))
            await send(message)

        try:
            await self._app(scope, receive, send_with_trace)
        finally:
            span.end()


def _asked(job: Job, operation: str) -> dict[str, AttributeValue]:
    sampling = job.requests[0].sampling
    asked: dict[str, AttributeValue] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "cascade-serve",
        "gen_ai.request.model": job.model_id,
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.stream": job.is_stream,
    }
    if sampling.is_seeded:  # else it is the server's own
        asked["gen_ai.request.seed"] = sampling.seed if sampling.seed < 1 << 63 else str(sampling.seed)  # the protocol's numbers end there
    return asked


def _answered(job: Job, record: RequestRecord, reasons: Sequence[str]) -> dict[str, AttributeValue]:
    return {
        "gen_ai.response.id": job.id,
        "gen_ai.response.finish_reasons": tuple(reasons),
        "gen_ai.usage.input_tokens": record.num_prompt_tokens,
        "gen_ai.usage.output_tokens": record.num_completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": record.num_cached_tokens,
        "cascade.rule": record.rule,
        "cascade.alpha": record.alpha,
        "cascade.draft_tokens": sum(choice.num_draft_tokens for choice in record.choices),
        "cascade.accepted_tokens": sum(choice.num_accepted_tokens for choice in record.choices),
        "cascade.lossy_kept_tokens": sum(choice.num_lossy_kept_tokens for choice in record.choices),
    }


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
