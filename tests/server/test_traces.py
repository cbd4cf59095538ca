"""Spans as a collector receives them: over OTLP, on a socket."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from engine.errors import ConfigError
from engine.request import Round
from server.app import create_app
from tests.fakes import FakeEngine, Part, make_info
from tests.server.conftest import make_deployment, serve

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector:
    """What arrived."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resources: list[dict[str, Any]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
                for group in request.resource_spans:
                    collector.resources.append(attributes_of(group.resource))
                    collector.spans += [span for scope in group.scope_spans for span in scope.spans]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *arguments: object) -> None: ...

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}/v1/traces"

    def named(self, name: str) -> Any:
        (span,) = [span for span in self.spans if span.name == name]
        return span


def attributes_of(holder: Any) -> dict[str, Any]:
    values = {}
    for pair in holder.attributes:
        kind = pair.value.WhichOneof("value")
        value = getattr(pair.value, kind)
        values[pair.key] = [item.string_value for item in value.values] if kind == "array_value" else value
    return values


@pytest.fixture
def collector() -> Iterator[Collector]:
    it = Collector()
    thread = threading.Thread(target=it.server.serve_forever, daemon=True)
    thread.start()
    yield it
    it.server.shutdown()
    thread.join()
    it.server.server_close()


@pytest.mark.parametrize("is_stream", [False, True])
async def test_a_request_is_a_span_with_its_parts(folder: Path, collector: Collector, is_stream: bool) -> None:
    async with serve(folder, make_deployment(otlp_endpoint=collector.endpoint)) as served:
        served.answer_with(parts=[Part((40,)), Part((40, 41, 42), Round(4, 2, 0b100, 0b1))], delay=0.01, num_cached_tokens=2)
        body = {
            "model": "tiny:short",
            "messages": [{"role": "user", "content": "a secret"}],
            "seed": 2**63 if is_stream else 7,
            "stream": is_stream,
        }
        response = await served.http.post("/v1/chat/completions", json=body, headers={"traceparent": PARENT})
        assert "data: [DONE]" in response.text or not is_stream
        trace_id, span_id = response.headers["traceparent"].split("-")[1:3]
    span = collector.named("chat tiny:short")
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == tuple(PARENT.split("-")[1:3])
    assert (span.trace_id.hex(), span.span_id.hex()) == (trace_id, span_id), "the response says which span it was"
    found = attributes_of(span)
    expected = {
        "gen_ai.operation.name": "chat",
        "gen_ai.request.model": "tiny:short",
        "gen_ai.request.seed": str(2**63) if is_stream else 7,  # the protocol's numbers end there
        "gen_ai.request.stream": is_stream,
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.output_tokens": 4,
        "gen_ai.usage.cache_read.input_tokens": 2,
        "cascade.rule": "exact",
        "cascade.draft_tokens": 4,
        "cascade.accepted_tokens": 2,
        "http.response.status_code": 200,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert "secret" not in str(collector.spans)
    queue, prefill, decode = (collector.named(name) for name in ("queue", "prefill", "decode"))
    assert {part.parent_span_id for part in (queue, prefill, decode)} == {span.span_id}
    ends = [queue.start_time_unix_nano, queue.end_time_unix_nano, prefill.end_time_unix_nano, decode.end_time_unix_nano]
    assert ends == sorted(ends)
    assert decode.end_time_unix_nano - decode.start_time_unix_nano > 5e6
    assert collector.resources[0]["service.name"] == "cascade-serve"


async def test_a_refusal_is_a_span_without_parts(folder: Path, collector: Collector) -> None:
    async with serve(folder, make_deployment(otlp_endpoint=collector.endpoint)) as served:
        await served.complete(temperature=-1)
        await served.http.get("/health")
    assert [span.name for span in collector.spans] == ["POST"], "probes are no requests"
    assert attributes_of(collector.spans[0])["http.response.status_code"] == 400


async def test_without_an_endpoint_nothing_is_traced(folder: Path) -> None:
    async with serve(folder) as served:
        response = await served.http.post("/v1/completions", json={"model": "tiny", "prompt": "x"}, headers={"traceparent": PARENT})
    assert "traceparent" not in response.headers


def test_a_missing_package_is_one_line_that_names_the_extra(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "server.otlp", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"server\.otlp_endpoint: http://x - needs OpenTelemetry: pip install -e '\.\[trace\]'"):
        create_app(FakeEngine(make_info(str(folder))), make_deployment(otlp_endpoint="http://x"))
