"""The server's Prometheus metrics, and the only import of prometheus_client. Counts what it is told; decides nothing.

Counters and histograms, apart from the gauges of the last step: ratios are queries, such as the acceptance rate

    rate(cascade_spec_decode_accepted_tokens_total[5m]) / rate(cascade_spec_decode_draft_tokens_total[5m])

Every app has a registry of its own, so that two servers can live in one process. Labels: `model` is the deployment's base name,
`preset` is empty for the model itself, `rule` is the rule that judged the drafts.
"""

from __future__ import annotations

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from engine.request import Round
from engine.stats import StepStats
from server.record import ChoiceRecord

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SHORT = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10)
_LONG = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560)
_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
_RATE = tuple(i / 20 for i in range(21))


class Metrics:
    """All metrics of one server."""

    def __init__(self, model: str):
        self.model = model
        self._registry = CollectorRegistry()
        self._requests: dict[tuple[str, str], RequestMetrics] = {}
        self._refusals = self._counter("refusals", "HTTP requests answered with an error status", ("status", "code"))
        self._declare_steps()
        self._declare_requests()
        self._declare_speculation()

    def observe_step(self, stats: StepStats) -> None:
        """Count one step of the engine."""
        for gauge, value in zip(self._gauges, (stats.num_running, stats.num_waiting, stats.num_used_blocks, stats.num_blocks), strict=True):
            gauge.set(value)
        self._steps.inc()
        self._step_seconds.observe(stats.step_seconds)
        self._target_tokens.inc(stats.num_target_tokens)
        self._preemptions.inc(stats.num_preemptions)
        self._prefix_queried.inc(stats.num_prefix_queried_tokens)
        self._prefix_hit.inc(stats.num_prefix_hit_tokens)

    def observe_loss(self, is_restarted: bool) -> None:
        """The engine was lost: nothing runs or waits in it, and it holds no memory."""
        for gauge in self._gauges:
            gauge.set(0)
        if is_restarted:
            self._restarts.inc()

    def refused(self, status: int, code: str) -> None:
        """Count an HTTP request that was answered with an error."""
        self._refusals.labels(str(status), code).inc()

    def request(self, preset: str, rule: str) -> RequestMetrics:
        """The metrics of requests to one preset under one rule."""
        if (preset, rule) not in self._requests:
            self._requests[preset, rule] = RequestMetrics(self, preset, rule)
        return self._requests[preset, rule]

    def exposition(self) -> bytes:
        """What /metrics answers."""
        return generate_latest(self._registry)

    def _declare_steps(self) -> None:
        def counter(name: str, text: str) -> Counter:
            return self._counter(name, text, ("model",)).labels(self.model)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"cascade_{name}", text, ("model",), registry=self._registry).labels(self.model)

        self._gauges = (
            gauge("running_sequences", "Answers that took part in the last step"),
            gauge("waiting_sequences", "Answers that waited for a place or for memory at the last step"),
            gauge("kv_used_blocks", "KV blocks that running answers held at the last step"),
            gauge("kv_blocks", "KV blocks that there are"),
        )
        self._restarts = counter("engine_restarts", "Times that the engine was lost and started again")
        self._steps = counter("steps", "Steps of the engine")
        self._step_seconds = self._histogram("step_seconds", "Duration of a step of the engine", ("model",), _SHORT).labels(self.model)
        self._target_tokens = counter("target_tokens", "Rows of the target's passes: prompt, recomputed, pending and draft tokens")
        self._preemptions = counter("preemptions", "Answers that gave their KV blocks up and were computed again later")
        self._prefix_queried = counter("prefix_queried_tokens", "Tokens of admitted answers that were looked up in published KV blocks")
        self._prefix_hit = counter("prefix_hit_tokens", "Tokens of admitted answers that were found in published KV blocks")

    def _declare_requests(self) -> None:
        labels = ("model", "preset")
        self.requests = self._counter(
            "requests", "Answers by how they ended: stop, length, abort (the client left), timeout or error", (*labels, "finish_reason")
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts whose first answer token was delivered", labels)
        self.cached_tokens = self._counter("cached_prompt_tokens", "Of cascade_prompt_tokens_total, those not computed again", labels)
        self.generation_tokens = self._counter("generation_tokens", "Tokens delivered to clients", labels)
        self.queue = self._histogram("queue_seconds", "From a request's arrival in the engine to its first step", labels, _LONG)
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From a request's arrival in the server to its first delivery", labels, _LONG
        )
        self.inter_token = self._histogram(
            "inter_token_seconds", "Gap between two deliveries of one answer; a delivery may hold several tokens", labels, _SHORT
        )
        self.end_to_end = self._histogram("request_seconds", "From a request's arrival in the server to its end", labels, _LONG)
        self.prompt_length = self._histogram("request_prompt_tokens", "Tokens in a request's prompts", labels, _TOKENS)
        self.generation_length = self._histogram("request_generation_tokens", "Tokens in an answer", labels, _TOKENS)

    def _declare_speculation(self) -> None:
        labels = ("model", "preset", "rule")
        self.drafts = self._counter("spec_decode_drafts", "Rounds in which something was drafted", labels)
        self.draft_tokens = self._counter("spec_decode_draft_tokens", "Tokens that were drafted", labels)
        self.accepted_tokens = self._counter("spec_decode_accepted_tokens", "Drafted tokens that stand in an answer", labels)
        self.accepted_per_position = self._counter(
            "spec_decode_accepted_tokens_per_position", "Accepted tokens by position in their round, from 0", (*labels, "position")
        )
        self.deferred_tokens = self._counter(
            "spec_decode_deferred_tokens", "Verified drafts that the rule left to the target: not in its keep-set", labels
        )
        self.lossy_kept_tokens = self._counter(
            "spec_decode_lossy_kept_tokens", "Drafts that stand although exact verification would have rejected them", labels
        )
        self.acceptance_rate = self._histogram(
            "request_acceptance_rate", "Accepted per drafted tokens of an answer, 0 to 1; only answers with drafts", labels, _RATE
        )
        self.deferral_rate = self._histogram(
            "request_deferral_rate", "Deferred per verified drafts of an answer, 0 to 1; only answers with drafts", labels, _RATE
        )

    def _counter(self, name: str, text: str, labels: tuple[str, ...]) -> Counter:
        return Counter(f"cascade_{name}", text, labels, registry=self._registry)

    def _histogram(self, name: str, text: str, labels: tuple[str, ...], buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"cascade_{name}", text, labels, buckets=buckets, registry=self._registry)


class RequestMetrics:
    """The metrics of requests to one preset under one rule, their labels bound."""

    def __init__(self, metrics: Metrics, preset: str, rule: str):
        self._metrics = metrics
        labels, ruled = (metrics.model, preset), (metrics.model, preset, rule)
        self._labels, self._ruled = labels, ruled
        self._prompt_tokens = metrics.prompt_tokens.labels(*labels)
        self._cached_tokens = metrics.cached_tokens.labels(*labels)
        self._generation_tokens = metrics.generation_tokens.labels(*labels)
        self._queue = metrics.queue.labels(*labels)
        self._first_token = metrics.first_token.labels(*labels)
        self._inter_token = metrics.inter_token.labels(*labels)
        self._end_to_end = metrics.end_to_end.labels(*labels)
        self._prompt_length = metrics.prompt_length.labels(*labels)
        self._generation_length = metrics.generation_length.labels(*labels)
        self._drafts = metrics.drafts.labels(*ruled)
        self._draft_tokens = metrics.draft_tokens.labels(*ruled)
        self._accepted_tokens = metrics.accepted_tokens.labels(*ruled)
        self._deferred_tokens = metrics.deferred_tokens.labels(*ruled)
        self._lossy_kept_tokens = metrics.lossy_kept_tokens.labels(*ruled)
        self._acceptance_rate = metrics.acceptance_rate.labels(*ruled)
        self._deferral_rate = metrics.deferral_rate.labels(*ruled)

    def prompt_done(self, num_tokens: int, num_cached: int) -> None:
        """Count a prompt, at the first delivery of an answer to it."""
        self._prompt_tokens.inc(num_tokens)
        self._cached_tokens.inc(num_cached)

    def first_delivery(self, queue_seconds: float, seconds: float) -> None:
        """Note the first delivery of an HTTP request, `seconds` after its arrival."""
        self._queue.observe(queue_seconds)
        self._first_token.observe(seconds)

    def delivered(self, num_tokens: int, gap: float | None) -> None:
        """Count a delivery of one answer, `gap` seconds after the one before."""
        self._generation_tokens.inc(num_tokens)
        if gap is not None:
            self._inter_token.observe(gap)

    def round(self, drafts: Round) -> None:
        """Count what became of the drafts of one round."""
        self._drafts.inc()
        self._draft_tokens.inc(drafts.num_draft)
        self._accepted_tokens.inc(drafts.num_accepted)
        self._deferred_tokens.inc(drafts.deferred_mask.bit_count())
        self._lossy_kept_tokens.inc(drafts.lossy_mask.bit_count())
        for position in range(drafts.num_accepted):
            self._metrics.accepted_per_position.labels(*self._ruled, str(position)).inc()

    def answer_done(self, record: ChoiceRecord, finish_reason: str) -> None:
        """Count an answer by how it ended."""
        self._metrics.requests.labels(*self._labels, finish_reason).inc()
        self._generation_length.observe(record.num_tokens)
        if record.num_draft_tokens:
            self._acceptance_rate.observe(record.num_accepted_tokens / record.num_draft_tokens)
            self._deferral_rate.observe(record.num_deferred_tokens / record.num_verified_tokens)

    def request_done(self, num_prompt_tokens: int, seconds: float) -> None:
        """Note the end of an HTTP request, `seconds` after its arrival."""
        self._prompt_length.observe(num_prompt_tokens)
        self._end_to_end.observe(seconds)
