"""The server's Prometheus metrics, and the only import of prometheus_client. Counts what it is told; decides nothing.

Counters and histograms, apart from the gauges of the last step: ratios are queries, such as the acceptance rate

    rate(cascade_spec_decode_accepted_tokens_total[5m]) / rate(cascade_spec_decode_draft_tokens_total[5m])

What happens in every step or round is summed in plain numbers, and handed to Prometheus when it asks: 64 streams must not pay for a scrape
that comes every 15 seconds. Every app has a registry of its own, so that two servers can live in one process. catalogue.py says what the
metrics are.
"""

from __future__ import annotations

import platform
from collections import defaultdict
from collections.abc import Mapping

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from engine.request import Round
from engine.stats import StepStats
from server.catalogue import CATALOGUE, LARGEST_ALPHA, VLLM_NAMES
from server.exposition import Writer
from server.record import ChoiceRecord, Objectives, num_verified

CONTENT_TYPE = CONTENT_TYPE_LATEST

disable_created_metrics()  # type: ignore[no-untyped-call]  # when each series began: a fifth of the text, and nobody's question


class _Book:
    """The metrics of the catalogue, made, by name."""

    def __init__(self, has_vllm_names: bool) -> None:
        self.registry = CollectorRegistry()
        self.counters: dict[str, Counter] = {}
        self.gauges: dict[str, Gauge] = {}
        self.histograms: dict[str, Histogram] = {}
        for name, entry in CATALOGUE.items():
            full, given = f"cascade_{name}", (entry.text, entry.labels)
            match entry.kind:
                case "counter":
                    self.counters[name] = Counter(full, *given, registry=self.registry)
                case "gauge":
                    self.gauges[name] = Gauge(full, *given, registry=self.registry)
                case "histogram":
                    self.histograms[name] = Histogram(full, *given, buckets=entry.buckets, registry=self.registry)
        self.vllm = {name: self._as_vllm(name) for name in VLLM_NAMES} if has_vllm_names else {}

    def _as_vllm(self, name: str) -> Counter:
        labels = ("model_name", "engine", *(label for label in CATALOGUE[name].labels if label == "position"))
        return Counter(VLLM_NAMES[name], f"cascade_{name}_total under the name that vLLM has for it", labels, registry=self.registry)


class Metrics:
    """All metrics of one server."""

    def __init__(self, model: str, objectives: Objectives, has_vllm_names: bool = False):
        self.model = model
        self.objectives = objectives
        self.book = _Book(has_vllm_names)
        self._requests: dict[tuple[str, str], RequestMetrics] = {}
        self._num_open = 0
        self._writer = Writer()
        self._last: StepStats | None = None  # of an engine that was not lost since
        self._sums: dict[tuple[str, str], float] = defaultdict(float)  # of counters since the last exposition, by name and label
        self._restarts = self.book.counters["engine_restarts"].labels(model)
        self._step_seconds = self.book.histograms["step_seconds"].labels(model)
        self._step_sequences = self.book.histograms["step_sequences"].labels(model)
        for objective, seconds in objectives.seconds.items():
            self.book.gauges["objective_seconds"].labels(model, objective).set(seconds)
        self._begin_at_zero()

    def describe(self, version: str, config: Mapping[str, object]) -> None:
        """Say what runs. `config` has the labels of config_info beside the model."""
        self.book.gauges["build_info"].labels(version, platform.python_version()).set(1)
        values = [str(config[label]) for label in CATALOGUE["config_info"].labels if label != "model"]
        self.book.gauges["config_info"].labels(self.model, *values).set(1)

    def observe_step(self, stats: StepStats) -> None:
        """Count one step of the engine."""
        self._last = stats
        self._step_seconds.observe(stats.step_seconds)
        self._step_sequences.observe(stats.num_sequences)
        sums = self._sums
        sums["steps", ""] += 1
        sums["step_phase_seconds", "schedule"] += stats.schedule_seconds
        sums["step_phase_seconds", "draft"] += stats.draft_seconds
        sums["step_phase_seconds", "verify"] += stats.verify_seconds
        sums["step_phase_seconds", "wait"] += stats.wait_seconds
        sums["undrafted_seconds", ""] += stats.undrafted_seconds
        sums["target_tokens", ""] += stats.num_target_tokens
        sums["preemptions", ""] += stats.num_preemptions
        sums["prefix_queried_tokens", ""] += stats.num_prefix_queried_tokens
        sums["prefix_hit_tokens", ""] += stats.num_prefix_hit_tokens
        for length, num in enumerate(stats.draft_lengths):
            sums["draft_lengths", str(length)] += num

    def observe_loss(self, is_restarted: bool) -> None:
        """The engine was lost: nothing runs or waits in it, and it holds no memory."""
        self._last = None
        if is_restarted:
            self._restarts.inc()

    def refused(self, status: int, code: str) -> None:
        """Count an HTTP request that was answered with an error."""
        self.book.counters["refusals"].labels(str(status), code).inc()

    def opened(self) -> None:
        """An HTTP request is in the engine."""
        self._num_open += 1

    def closed(self) -> None:
        """One that was opened has ended."""
        self._num_open -= 1

    def request(self, preset: str, rule: str) -> RequestMetrics:
        """The metrics of requests to one preset under one rule."""
        if (preset, rule) not in self._requests:
            self._requests[preset, rule] = RequestMetrics(self, preset, rule)
        return self._requests[preset, rule]

    def exposition(self, is_ready: bool) -> bytes:
        """What /metrics answers."""
        self.book.gauges["ready"].labels(self.model).set(is_ready)
        self.book.gauges["open_requests"].labels(self.model).set(self._num_open)
        self._set_gauges(self._last if self._num_open else None)
        for (name, label), value in self._sums.items():
            self.book.counters[name].labels(self.model, *([label] if label else [])).inc(value)
        self._sums.clear()
        for metrics in self._requests.values():
            metrics.flush()
        return self._writer.write(self.book.registry.collect())

    def _set_gauges(self, last: StepStats | None) -> None:
        """As the last step left them. Without requests nothing runs: who leaves last is dropped without a step that would say so."""
        gauges, model = self.book.gauges, self.model
        num_blocks = self._last.num_blocks if self._last is not None else 0
        num_cached = self._last.num_cached_blocks if self._last is not None else 0
        num_used = last.num_used_blocks if last is not None else 0
        gauges["running_sequences"].labels(model).set(last.num_running if last is not None else 0)
        gauges["waiting_sequences"].labels(model).set(last.num_waiting if last is not None else 0)
        for reason in ("place", "memory", "leader", "budget"):
            gauges["waiting_by_reason"].labels(model, reason).set(getattr(last, f"num_waiting_for_{reason}", 0))
        gauges["kv_blocks"].labels(model).set(num_blocks)
        gauges["kv_used_blocks"].labels(model).set(num_used)
        states = {"used": num_used, "cached": num_cached, "free": num_blocks - num_used - num_cached}
        for state, num in states.items():
            gauges["kv_blocks_by_state"].labels(model, state).set(num)

    def _begin_at_zero(self) -> None:
        """A counter that appears with its first event hides that event from rate()."""
        for name, counter in self.book.counters.items():
            if CATALOGUE[name].labels == ("model",):
                counter.labels(self.model)
        for phase in ("schedule", "draft", "verify", "wait"):
            self.book.counters["step_phase_seconds"].labels(self.model, phase)


class RequestMetrics:
    """The metrics of requests to one preset under one rule, their labels bound."""

    def __init__(self, metrics: Metrics, preset: str, rule: str):
        self._book = metrics.book
        self._objectives = metrics.objectives
        labels, ruled = (metrics.model, preset), (metrics.model, preset, rule)
        self._labels, self._ruled = labels, ruled
        self._sums: dict[str, int] = defaultdict(int)  # of counters since the last exposition
        self._drafted: dict[int, int] = defaultdict(int)  # rounds by how many were drafted
        self._accepted: dict[int, int] = defaultdict(int)  # rounds by how many stood
        histograms = self._book.histograms
        self._inter_token = histograms["inter_token_seconds"].labels(*labels)
        self._of_request = {name: h.labels(*labels) for name, h in histograms.items() if CATALOGUE[name].labels == ("model", "preset")}
        self._of_rule = {name: h.labels(*ruled) for name, h in histograms.items() if "rule" in CATALOGUE[name].labels}
        self._begin_at_zero()

    def prompt_done(self, num_tokens: int, num_cached: int) -> None:
        """Count a prompt, at the first delivery of an answer to it."""
        self._sums["prompt_tokens"] += num_tokens
        self._sums["cached_prompt_tokens"] += num_cached

    def first_delivery(self, queue_seconds: float, seconds: float) -> None:
        """Note the first delivery of an HTTP request, `seconds` after its arrival."""
        self._of_request["queue_seconds"].observe(queue_seconds)
        self._of_request["time_to_first_token_seconds"].observe(seconds)

    def delivered(self, num_tokens: int, gap: float | None) -> None:
        """Count a delivery of one answer, `gap` seconds after the one before."""
        self._sums["generation_tokens"] += num_tokens
        if gap is not None:
            self._inter_token.observe(gap)

    def round(self, drafts: Round) -> None:
        """Count what became of the drafts of one round."""
        sums = self._sums
        sums["spec_decode_drafts"] += 1
        sums["spec_decode_draft_tokens"] += drafts.num_draft
        sums["spec_decode_accepted_tokens"] += drafts.num_accepted
        sums["spec_decode_verified_tokens"] += num_verified(drafts)
        sums["spec_decode_deferred_tokens"] += drafts.deferred_mask.bit_count()
        sums["spec_decode_lossy_kept_tokens"] += drafts.lossy_mask.bit_count()
        self._drafted[drafts.num_draft] += 1
        self._accepted[drafts.num_accepted] += 1

    def answer_done(self, record: ChoiceRecord, finish_reason: str, arrived_at: float, alpha: float) -> None:
        """Count an answer to a request that came at `arrived_at` by how it ended."""
        self._book.counters["requests"].labels(*self._labels, finish_reason).inc()
        self._of_request["request_generation_tokens"].observe(record.num_tokens)
        if (per_token := record.seconds_per_token) is not None:
            self._of_request["time_per_token_seconds"].observe(per_token)
        self._judge(record, finish_reason, arrived_at)
        self._sums["target_calls"] += record.num_target_calls
        self._sums["drafter_calls"] += record.num_drafter_calls
        self._sums["saved_target_calls"] += record.num_saved_calls
        # a sum that falls would look like a restart, and some dials have no end: one 1e300 would be all that is ever seen
        self._of_rule["request_alpha"].observe(min(max(0.0, alpha), LARGEST_ALPHA))
        if (share := record.distinct_share) is not None:
            self._of_rule["request_distinct_share"].observe(share)
        if record.num_draft_tokens:
            self._of_rule["request_acceptance_rate"].observe(record.num_accepted_tokens / record.num_draft_tokens)
            self._of_rule["request_deferral_rate"].observe(record.num_deferred_tokens / record.num_verified_tokens)

    def request_done(self, num_prompt_tokens: int, seconds: float) -> None:
        """Note the end of an HTTP request, `seconds` after its arrival."""
        self._of_request["request_prompt_tokens"].observe(num_prompt_tokens)
        self._of_request["request_seconds"].observe(seconds)

    def flush(self) -> None:
        """Hand to Prometheus what was summed."""
        for name, value in self._sums.items():
            self._add(name, value)
        for name, rounds in (("draft", self._drafted), ("accepted", self._accepted)):
            for position in range(max(rounds, default=0)):
                num = sum(count for length, count in rounds.items() if length > position)
                self._add(f"spec_decode_{name}_tokens_per_position", num, str(position))
            rounds.clear()
        self._sums.clear()

    def _add(self, name: str, value: int, *position: str) -> None:
        labels = self._ruled if "rule" in CATALOGUE[name].labels else self._labels
        self._book.counters[name].labels(*labels, *position).inc(value)
        if (alias := self._book.vllm.get(name)) is not None:
            alias.labels(self._ruled[0], "0", *position).inc(value)

    def _judge(self, record: ChoiceRecord, finish_reason: str, arrived_at: float) -> None:
        met = self._objectives.met(record, finish_reason in ("error", "timeout"), arrived_at)
        for objective, is_met in met.items():
            result = "met" if is_met else "missed"
            self._book.counters["objective_requests"].labels(*self._labels, objective, result).inc()
        if met.get("all"):
            self._sums["good_generation_tokens"] += record.num_tokens

    def _begin_at_zero(self) -> None:
        """A counter that appears with its first event hides that event from rate()."""
        for name, counter in self._book.counters.items():
            labels = CATALOGUE[name].labels
            if labels == ("model", "preset", "rule"):
                counter.labels(*self._ruled)
            elif labels == ("model", "preset"):
                counter.labels(*self._labels)
        for objective in (*self._objectives.seconds, "all"):
            for result in ("met", "missed"):
                self._book.counters["objective_requests"].labels(*self._labels, objective, result)
        for reason in ("stop", "length", "abort", "refused", "timeout", "error"):
            self._book.counters["requests"].labels(*self._labels, reason)
