"""Requests, sequences and verdicts for tests that need no tensors."""

from __future__ import annotations

import msgspec

from engine.plan import DraftBatch, Logprobs, QKind, RowsWanted, StepPlan, Verdict
from engine.request import Choice, Request, SamplingParams, SpeculationParams, TokenLogprobs
from engine.sequence import Sequence


def make_request(
    id: str = "r", prompt: tuple[int, ...] = (1, 2, 3), max_tokens: int = 4, stop: tuple[int, ...] = (), num_choices: int = 1
) -> Request:
    return Request(
        id=id,
        prompt_ids=prompt,
        sampling=SamplingParams(max_tokens=max_tokens, stop_token_ids=stop),
        speculation=SpeculationParams(),
        choices=tuple(Choice(i) for i in range(num_choices)),
    )


def make_sequence(tokens: tuple[int, ...], num_computed: int = 0, salt: str = "") -> Sequence:
    seq = Sequence(msgspec.structs.replace(make_request(prompt=tokens), cache_salt=salt), Choice())
    seq.num_computed = num_computed
    return seq


def make_drafts(plan: StepPlan, lengths: list[int], drafter_computed: list[int] | None = None) -> DraftBatch:
    """Drafts of 9s without probabilities."""
    longest = max(lengths, default=0)
    return DraftBatch(
        lengths=tuple(lengths),
        ids=[[9] * longest for _ in lengths],
        kinds=[[*[QKind.ONE_HOT] * n, *[QKind.NONE] * (longest + 1 - n)] for n in lengths],
        rows=None,
        drafter_computed=tuple(drafter_computed or [0] * len(plan.chunks)),
        lagging=(False,) * len(plan.chunks),
        num_calls=(0,) * len(plan.chunks),
    )


def make_verdict(*emitted: tuple[int, ...]) -> Verdict:
    """All tokens but the last of each are accepted drafts."""
    nothing = (0,) * len(emitted)
    return Verdict(tuple(emitted), tuple(len(ids) - 1 for ids in emitted), nothing, nothing, (False,) * len(emitted))


def make_scores(plan: StepPlan) -> Logprobs:
    """Of every prompt token that is to be scored and whose row the plan runs, its position."""
    return Logprobs(
        prompts={
            chunk.seq: tuple(
                TokenLogprobs(float(position))
                for position in range(chunk.seq.num_computed + 1, chunk.seq.num_computed + chunk.num_tokens + 1)
                if chunk.seq.num_scored <= position < len(chunk.seq.request.prompt_ids)
            )
            for chunk in plan.chunks
            if chunk.rows_wanted is RowsWanted.ALL
        }
    )
