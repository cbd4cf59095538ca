"""Every metric of the server: name, labels, buckets, what a value means and when to worry. Plain data; metrics.py makes and fills them.

Names are without the prefix `cascade_` and, of counters, without `_total`. Base units, no colons. `model` is the deployment's base name,
`preset` is empty for the model itself, `rule` is the rule that judged the drafts. tests/golden/metrics.txt makes any change of a name, a
label or a bucket visible: dashboards and alerts hang on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

_SHORT = (0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5, 5, 10)
_LONG = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560)
_TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
_SHARE = (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1)  # finer where something is wrong
_BATCH = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512)
_ALPHA = (0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.7, 1, 2, 5)
LARGEST_ALPHA = 10.0  # larger dials count as this

MODEL = ("model",)
ASKED = ("model", "preset")
JUDGED = ("model", "preset", "rule")

Kind = Literal["counter", "gauge", "histogram"]


@dataclass(frozen=True)
class Entry:
    """One metric."""

    kind: Kind
    labels: tuple[str, ...]
    text: str
    buckets: tuple[float, ...] = ()


_STATE: Mapping[str, Entry] = {
    "build_info": Entry("gauge", ("version", "python"), "Always 1; the labels say what runs"),
    "config_info": Entry(
        "gauge",
        (*MODEL, "target", "drafter", "rule", "alpha", "draft_policy", "max_draft", "verification", "device", "dtype", "quantization"),
        "Always 1; the labels say what the deployment serves, alpha being that of requests which name none",
    ),
    "ready": Entry("gauge", MODEL, "1 where /ready answers 200. Worry when it is 0 for longer than loading takes"),
    "open_requests": Entry("gauge", MODEL, "HTTP requests that are being answered, waiting ones included"),
    "objective_seconds": Entry(
        "gauge", (*MODEL, "objective"), "What the deployment promises: seconds to the first token, and per further token"
    ),
    "running_sequences": Entry(
        "gauge",
        MODEL,
        "Answers that ran behind the last step. At max_sequences for long, and with others waiting: more replicas are needed",
    ),
    "waiting_sequences": Entry("gauge", MODEL, "Answers that waited at the last step. Worry when it keeps growing"),
    "waiting_by_reason": Entry(
        "gauge",
        (*MODEL, "reason"),
        "Answers that waited at the last step, by what for: place (max_sequences run), memory (too few KV blocks are free), "
        "leader (another answer computes the same prefix, or a grammar is compiled), budget (the step's tokens were given out)",
    ),
    "kv_used_blocks": Entry("gauge", MODEL, "KV blocks that running answers held at the last step. Near kv_blocks answers are preempted"),
    "kv_blocks": Entry("gauge", MODEL, "KV blocks that there are"),
    "kv_blocks_by_state": Entry(
        "gauge",
        (*MODEL, "state"),
        "KV blocks at the last step: used (running answers hold them), cached (free, and found again by equal prompts), free (empty)",
    ),
}

_STEPS: Mapping[str, Entry] = {
    "engine_restarts": Entry(
        "counter", MODEL, "Times that the engine was lost and started again. Worry at any: open requests failed each time"
    ),
    "steps": Entry("counter", MODEL, "Steps of the engine. Worry when requests are open and this stands still"),
    "step_seconds": Entry("histogram", MODEL, "Duration of a step of the engine; every running answer waits for it", _SHORT),
    "step_phase_seconds": Entry(
        "counter",
        (*MODEL, "phase"),
        "Seconds of steps: schedule (planning and committing), draft (the drafter), verify (the target's pass and judging), "
        "and wait (between "
        "steps, without work for the most part; counted when the next step begins). Worry when draft comes near verify, or "
        "schedule is visible",
    ),
    "undrafted_seconds": Entry(
        "counter",
        MODEL,
        "Seconds that the same tokens would have taken without drafts, estimated from what passes of the target cost here. Over "
        "cascade_step_seconds_sum it is the speed-up. Worry when that is below 1: speculation costs more than it brings",
    ),
    "step_sequences": Entry("histogram", MODEL, "Answers that had a part in a step's pass of the target: the batch size", _BATCH),
    "target_tokens": Entry("counter", MODEL, "Rows of the target's passes: prompt, recomputed, pending and draft tokens"),
    "preemptions": Entry(
        "counter",
        MODEL,
        "Answers that gave their KV blocks up and were computed again later. Worry when it is steady: kv_cache is too small",
    ),
    "prefix_queried_tokens": Entry("counter", MODEL, "Tokens of admitted answers that were looked up in published KV blocks"),
    "prefix_hit_tokens": Entry(
        "counter", MODEL, "Tokens of admitted answers that were found in published KV blocks, and not computed again"
    ),
    "draft_lengths": Entry(
        "counter",
        (*MODEL, "length"),
        "Times that the engine drafted so many tokens for an answer in a step. Nearly all at 0: the policy finds that drafts do not pay",
    ),
}

_REQUESTS: Mapping[str, Entry] = {
    "refusals": Entry(
        "counter",
        ("status", "code"),
        "HTTP requests answered with an error status, by reason. Worry at 5xx: queue_full wants more replicas",
    ),
    "requests": Entry(
        "counter",
        (*ASKED, "finish_reason"),
        "Answers by how they ended: stop, length, abort (the client left), refused (what was asked became too complex), timeout or error",
    ),
    "objective_requests": Entry(
        "counter",
        (*ASKED, "objective", "result"),
        "Answers that met or missed an objective: first_token, per_token, or all (both). Those that a client left before the "
        "first token count "
        "nowhere, those that failed have missed",
    ),
    "good_generation_tokens": Entry(
        "counter", ASKED, "Tokens of answers that met all objectives: goodput, where generation_tokens is throughput"
    ),
    "prompt_tokens": Entry("counter", ASKED, "Tokens of prompts whose first answer token was delivered"),
    "cached_prompt_tokens": Entry("counter", ASKED, "Of cascade_prompt_tokens_total, those not computed again"),
    "generation_tokens": Entry("counter", ASKED, "Tokens delivered to clients"),
    "queue_seconds": Entry(
        "histogram", ASKED, "From a request's arrival in the engine to its first step. Worry when it is most of the first token", _LONG
    ),
    "time_to_first_token_seconds": Entry("histogram", ASKED, "From a request's arrival in the server to its first delivery", _LONG),
    "inter_token_seconds": Entry(
        "histogram", ASKED, "Gap between two deliveries of one answer; a delivery may hold several tokens", _SHORT
    ),
    "time_per_token_seconds": Entry("histogram", ASKED, "Mean time of an answer's tokens behind the first: what a reader feels", _SHORT),
    "request_seconds": Entry("histogram", ASKED, "From a request's arrival in the server to its end", _LONG),
    "request_prompt_tokens": Entry("histogram", ASKED, "Tokens in a request's prompts", _TOKENS),
    "request_generation_tokens": Entry("histogram", ASKED, "Tokens in an answer", _TOKENS),
}

_SPECULATION: Mapping[str, Entry] = {
    "spec_decode_drafts": Entry("counter", JUDGED, "Rounds in which something was drafted"),
    "spec_decode_draft_tokens": Entry("counter", JUDGED, "Tokens that were drafted"),
    "spec_decode_accepted_tokens": Entry(
        "counter",
        JUDGED,
        "Drafted tokens that stand in an answer. Over draft_tokens it is the acceptance rate. Worry when that falls suddenly",
    ),
    "spec_decode_accepted_tokens_per_position": Entry(
        "counter", (*JUDGED, "position"), "Accepted tokens by position in their round, from 0"
    ),
    "spec_decode_draft_tokens_per_position": Entry("counter", (*JUDGED, "position"), "Drafted tokens by position in their round, from 0"),
    "spec_decode_verified_tokens": Entry(
        "counter", JUDGED, "Drafts that were judged: the accepted ones of a round, and the first that was not"
    ),
    "spec_decode_deferred_tokens": Entry(
        "counter",
        JUDGED,
        "Verified drafts that the rule left to the target: not in its keep-set. Over verified_tokens it is the deferral rate",
    ),
    "spec_decode_lossy_kept_tokens": Entry(
        "counter",
        JUDGED,
        "Drafts that stand although exact verification would have rejected them: what the dial changed. Always 0 under exact",
    ),
    "target_calls": Entry("counter", JUDGED, "Passes of the target that finished answers took part in"),
    "drafter_calls": Entry("counter", JUDGED, "Passes of the drafter that finished answers took part in"),
    "saved_target_calls": Entry(
        "counter",
        JUDGED,
        "Passes of the target that tokens did not need, since one pass brought several. Worry at 0 with drafts: nothing stands",
    ),
    "request_acceptance_rate": Entry(
        "histogram",
        JUDGED,
        "Accepted per drafted tokens of an answer, 0 to 1; only answers with drafts. Many near 0: garbled text, or the wrong "
        "drafter; many near 1 "
        "with a low request_distinct_share: loops",
        _SHARE,
    ),
    "request_deferral_rate": Entry(
        "histogram", JUDGED, "Deferred per verified drafts of an answer, 0 to 1; only answers with drafts", _SHARE
    ),
    "request_distinct_share": Entry(
        "histogram",
        JUDGED,
        "Different tokens per tokens of an answer, 0 to 1; only answers of 32 tokens and more. Low ones repeat themselves",
        _SHARE,
    ),
    "request_alpha": Entry(
        "histogram",
        JUDGED,
        "The dial that an answer was made with: from 0, as where a rule has none or it is negative, to 10",
        _ALPHA,
    ),
}

CATALOGUE: Mapping[str, Entry] = {**_STATE, **_STEPS, **_REQUESTS, **_SPECULATION}

# The names under which vLLM counts drafts, for tools that read no others, by ours. Off unless the deployment asks for them.
VLLM_NAMES: Mapping[str, str] = {
    "spec_decode_drafts": "vllm:spec_decode_num_drafts",
    "spec_decode_draft_tokens": "vllm:spec_decode_num_draft_tokens",
    "spec_decode_accepted_tokens": "vllm:spec_decode_num_accepted_tokens",
    "spec_decode_accepted_tokens_per_position": "vllm:spec_decode_num_accepted_tokens_per_pos",
}
