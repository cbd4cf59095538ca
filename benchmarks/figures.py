"""From outcomes to figures: throughput, latencies, drafting, goodput. Arithmetic only; prints nothing.

TTFT  from sending a request to its first text.
E2E   from sending a request to its finish reason.
TPOT  (E2E - TTFT) / (n - 1), with n the server's count of output tokens; one value an answer.
ITL   gap between two deliveries of text; what arrives together is one delivery, whose tokens share one gap.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import msgspec

from benchmarks.errors import BenchmarkError, RequestFailed
from benchmarks.load import Answer, LoadResult, Outcome
from benchmarks.stats import Summary, summarise


class Goal(msgspec.Struct, frozen=True):
    """A bound that an answer must keep to count as good."""

    metric: str  # ttft, tpot or e2e
    seconds: float

    def is_met(self, answer: Answer) -> bool:
        """An answer of one token has no TPOT and keeps every bound on it."""
        value: float | None = getattr(answer, self.metric)
        return value is None or value <= self.seconds


class Failures(msgspec.Struct, frozen=True):
    """Requests that failed in one way."""

    kind: str
    count: int
    example: str


class DraftFigures(msgspec.Struct, frozen=True):
    """Drafts of all answers together, from servers that say what became of them."""

    acceptance_rate: float  # accepted drafts / drafts
    mean_accepted_length: float  # tokens a round with drafts: 1 + accepted drafts / rounds
    num_draft_tokens: int
    num_accepted_tokens: int
    num_rounds: int


class Group(msgspec.Struct, frozen=True):
    """Answers that are looked at together: all of a run, or those of one category. Times in milliseconds."""

    num_requests: int
    num_failed: int
    num_prompt_tokens: int
    num_cached_prompt_tokens: int
    num_output_tokens: int
    ttft_ms: Summary | None
    tpot_ms: Summary | None
    itl_ms: Summary | None
    e2e_ms: Summary | None
    drafting: DraftFigures | None  # None where nothing was drafted, or the server does not say
    tokens_per_target_call: float | None  # passes over prompts included; None where the server does not say


class Goodput(msgspec.Struct, frozen=True):
    """Answers that kept every goal."""

    goals: tuple[Goal, ...]
    num_good: int
    share: float  # of all requests; one that failed is not good
    requests_per_second: float


class Figures(msgspec.Struct, frozen=True):
    """Everything that a run of a load says."""

    seconds: float
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float  # prompt tokens, cached ones included, and output tokens
    all: Group
    categories: dict[str, Group]
    failures: tuple[Failures, ...]
    goodput: Goodput | None
    client_wait_ms: Summary | None  # from the time a request was due to its sending; None in a closed loop
    cpu_ms_per_token: float | None  # of this process


def parse_goal(text: str) -> Goal:
    """`ttft:500ms`, `tpot:60ms`, `e2e:5s`. Raises BenchmarkError."""
    match = re.fullmatch(r"(ttft|tpot|e2e):(\d+(?:\.\d+)?)(ms|s)", text)
    if match is None:
        raise BenchmarkError(f"--goodput {text}: write ttft, tpot or e2e, a colon, and a time such as 500ms or 5s.")
    return Goal(match[1], float(match[2]) / (1000 if match[3] == "ms" else 1))


def figures_of(result: LoadResult, goals: Sequence[Goal] = (), is_open: bool = False) -> Figures:
    """The figures of a run."""
    outcomes, seconds = result.outcomes, result.seconds
    whole = _group(outcomes)
    answers = answers_of(outcomes)
    categories = sorted({outcome.category for outcome in outcomes if outcome.category is not None})
    return Figures(
        seconds=seconds,
        requests_per_second=len(answers) / seconds,
        output_tokens_per_second=whole.num_output_tokens / seconds,
        total_tokens_per_second=(whole.num_prompt_tokens + whole.num_output_tokens) / seconds,
        all=whole,
        categories={name: _group([outcome for outcome in outcomes if outcome.category == name]) for name in categories},
        failures=_failures(outcomes),
        goodput=_goodput(answers, goals, len(outcomes), seconds) if goals else None,
        client_wait_ms=_milliseconds([o.result.sent_at - o.due_at for o in outcomes if isinstance(o.result, Answer)]) if is_open else None,
        cpu_ms_per_token=1000 * result.cpu_seconds / whole.num_output_tokens if whole.num_output_tokens else None,
    )


def answers_of(outcomes: Sequence[Outcome]) -> list[Answer]:
    """Those that succeeded."""
    return [outcome.result for outcome in outcomes if isinstance(outcome.result, Answer)]


def _group(outcomes: Sequence[Outcome]) -> Group:
    answers = answers_of(outcomes)
    calls = [answer.num_target_calls for answer in answers if answer.num_target_calls is not None]
    num_output_tokens = sum(answer.num_output_tokens for answer in answers)
    return Group(
        num_requests=len(outcomes),
        num_failed=len(outcomes) - len(answers),
        num_prompt_tokens=sum(answer.num_prompt_tokens for answer in answers),
        num_cached_prompt_tokens=sum(answer.num_cached_tokens for answer in answers),
        num_output_tokens=num_output_tokens,
        ttft_ms=_milliseconds([answer.ttft for answer in answers]),
        tpot_ms=_milliseconds([answer.tpot for answer in answers if answer.tpot is not None]),
        itl_ms=_milliseconds([gap for answer in answers for gap in answer.gaps]),
        e2e_ms=_milliseconds([answer.e2e for answer in answers]),
        drafting=_drafting(answers),
        tokens_per_target_call=num_output_tokens / sum(calls) if any(calls) and len(calls) == len(answers) else None,
    )


def _drafting(answers: Sequence[Answer]) -> DraftFigures | None:
    told = [answer.drafting for answer in answers if answer.drafting is not None]
    drafted, rounds = sum(drafting.num_draft_tokens for drafting in told), sum(drafting.num_rounds for drafting in told)
    if not drafted or not rounds:
        return None
    accepted = sum(drafting.num_accepted_tokens for drafting in told)
    return DraftFigures(accepted / drafted, 1 + accepted / rounds, drafted, accepted, rounds)


def _goodput(answers: Sequence[Answer], goals: Sequence[Goal], num_requests: int, seconds: float) -> Goodput:
    good = sum(all(goal.is_met(answer) for goal in goals) for answer in answers)
    return Goodput(tuple(goals), good, good / num_requests, good / seconds)


def _failures(outcomes: Sequence[Outcome]) -> tuple[Failures, ...]:
    failed = [outcome.result for outcome in outcomes if isinstance(outcome.result, RequestFailed)]
    examples = {failure.kind: failure.message for failure in reversed(failed)}  # the first of each kind
    return tuple(Failures(kind, count, examples[kind]) for kind, count in Counter(failure.kind for failure in failed).most_common())


def _milliseconds(seconds: Sequence[float]) -> Summary | None:
    return summarise([1000 * value for value in seconds])
