"""What of a verdict an answer gets, and what is told of it. Changes nothing."""

from __future__ import annotations

from dataclasses import dataclass

from engine.plan import DraftBatch, Followed, QKind, Verdict
from engine.request import FinishReason, Round, TokenDelta, TokenLogprobs
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Emission:
    """The tokens of one sequence in one step."""

    token_ids: tuple[int, ...]
    reason: FinishReason | None
    num_computed: int  # of these tokens, those whose KV is there
    became: Round  # of the drafts that could be emitted
    drafted_mask: int  # see TokenDelta


def emission_of(seq: Sequence, drafts: DraftBatch, verdict: Verdict, row: int, followed: Followed) -> Emission:
    """The accepted window, cut at the first stop token or behind a draft that nothing can follow: the next step finds out, as without
    drafts, that it is the end. Nothing for whoever wants the prompt to be run."""
    sampling = seq.request.sampling
    emitted = verdict.token_ids[row] if sampling.max_tokens else ()
    assert len(emitted) <= seq.num_remaining
    kept = emitted[: followed.num_standing(seq, emitted)]
    stop = next((i for i, token in enumerate(kept) if token in sampling.stop_token_ids), None)
    reason: FinishReason | None
    if stop is not None:
        reason, kept = FinishReason.STOP, kept[: stop + 1]
    elif len(kept) == seq.num_remaining:
        reason = FinishReason.LENGTH
    else:
        reason = None
    is_cut = stop is not None or len(kept) < len(emitted)
    # drafts behind an end could never be emitted, whatever the rule says: they are counted nowhere
    num_draft = min(drafts.lengths[row], len(kept)) if is_cut else drafts.lengths[row]
    mask = (1 << num_draft) - 1
    return Emission(
        token_ids=kept,
        reason=reason,
        num_computed=min(verdict.num_accepted[row], len(kept) - (reason is None)),  # who goes on has a token to run
        became=Round(
            num_draft=num_draft,
            num_accepted=min(verdict.num_accepted[row], num_draft),
            deferred_mask=verdict.deferred_masks[row] & mask,
            lossy_mask=verdict.lossy_masks[row] & mask,
            predicted_mask=drafts.predicted_masks[row] & mask if drafts.predicted_masks else 0,
        ),
        drafted_mask=_drafted_mask(drafts, verdict, row) & ((1 << len(kept)) - 1),
    )


def scored(seq: Sequence, scores: tuple[TokenLogprobs, ...]) -> TokenDelta:
    """What became known of a prompt."""
    return TokenDelta(request_id=seq.request.id, choice=seq.choice.index, token_ids=(), prompt_logprobs=scores)


def ended(seq: Sequence, reason: FinishReason) -> TokenDelta:
    """The end of an answer that cannot go on."""
    return TokenDelta(request_id=seq.request.id, choice=seq.choice.index, token_ids=(), finish_reason=reason)


def _drafted_mask(drafts: DraftBatch, verdict: Verdict, row: int) -> int:
    """Bit i: the drafter wrote token i of what was emitted. What was foreseen is drawn from the target's row, whoever comes first."""
    num_accepted = verdict.num_accepted[row]
    own = sum(1 << i for i in range(num_accepted) if drafts.kinds[row][i] != QKind.GIVEN)
    return own | verdict.bonus_is_drafted[row] << num_accepted
