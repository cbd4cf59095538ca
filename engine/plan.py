"""What crosses seams within one step, and the protocols of everything that can be plugged into the loop.

    schedule() -> StepPlan -> propose() -> DraftBatch -> forward() -> rows -> verify() -> Verdict -> commit() -> TokenDeltas

Letters: C chunks of the plan, B chunks that complete (they alone emit), K drafts (padded to the longest), V vocabulary,
R = sum of (K_b + 1) rows of the verify windows, in the order of the completing chunks.
Tensors live on the engine's device; lists and tuples on the host.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

from engine.request import TokenLogprobs
from engine.sequence import Sequence

if TYPE_CHECKING:
    from torch import Tensor


class RowsWanted(enum.Enum):
    """Of which of a chunk's tokens the logits are wanted."""

    WINDOW = "window"  # the last pending token and the drafts behind it, if the chunk completes; else none
    ALL = "all"  # of every token in the chunk: its prompt's log-probabilities are wanted


@dataclass(frozen=True, slots=True)
class Chunk:
    """A Sequence's share of a step: `num_tokens` pending tokens, and up to `max_draft` draft slots behind them."""

    seq: Sequence
    num_tokens: int
    completes: bool  # runs all pending tokens, and therefore emits
    max_draft: int = 0  # 0 for a chunk that does not complete
    rows_wanted: RowsWanted = RowsWanted.WINDOW


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Who runs how many tokens in this step, oldest first."""

    chunks: tuple[Chunk, ...]

    @property
    def completing(self) -> tuple[Chunk, ...]:
        return tuple(c for c in self.chunks if c.completes)

    def held_back(self, lagging: ListLike[bool]) -> StepPlan:
        """The plan in which sequences whose drafter has not caught up do not complete: they keep one token pending.

        `lagging` has an entry for each chunk. A chunk with nothing left to run is dropped from the target's pass but stays
        in the plan, since the drafter's work for it is committed all the same.
        """
        return StepPlan(
            tuple(
                replace(c, num_tokens=c.num_tokens - 1, completes=False, max_draft=0) if lag else c
                for c, lag in zip(self.chunks, lagging, strict=True)
            )
        )


# Confidences of foreseen drafts, above any that a drafter can have.
CERTAIN = math.inf  # what a grammar forces: nobody doubts it, and nothing is learnt from what becomes of it
PREDICTED = 2.0  # what the client predicted: how often that stands says nothing of the drafter


class QKind(enum.IntEnum):
    """What is known about the drafter's distribution at a position."""

    NONE = 0  # nothing, and nothing was drafted there: the token is drawn from p
    ONE_HOT = 1  # a draft without probabilities
    DENSE = 2  # a row q
    GIVEN = 3  # a draft without probabilities that is not the drafter's word: no rule judges it, and pi = p


@dataclass(frozen=True, slots=True)
class Rows:
    """Distributions over the vocabulary, of the target [R, V] or of the drafter [B, K + 1, V]."""

    probs: Tensor  # processed: what is drawn from, and what acceptance ratios and residuals use
    logits: Tensor | None  # hard-masked, temperature 1: what rules read, as probabilities; None where no rule in the batch does
    allowed: Tensor | None  # booleans, what the hard masks leave; None where nothing is masked
    only: Tensor | None = None  # [N] the one token that each row leaves, where all are one-hot: drawing it takes no number


@dataclass(frozen=True, slots=True)
class DraftBatch:
    """Proposed tokens for the chunks that complete, and where the drafter stands for every chunk.

    The law of exactness: where a kind is DENSE, the id was drawn from exactly that row of `rows.probs`, with the draft key of its
    position. Nobody edits ids or rows afterwards.
    """

    lengths: tuple[int, ...]  # [B] drafts of each completing chunk, at most its max_draft
    ids: Tensor | list[list[int]]  # [B, K], padded with 0; anything torch.as_tensor takes, so a drafter may be torch-free
    kinds: list[list[int]]  # [B, K + 1] of QKind; entry lengths[b] is the bonus position, padded with NONE
    rows: Rows | None  # [B, K + 1, V]; None where no kind is DENSE
    drafter_computed: tuple[int, ...]  # [C] the drafter's watermark, drafts included
    lagging: tuple[bool, ...]  # [C] a row is due and the drafter has not caught up: emit nothing yet
    num_calls: tuple[int, ...]  # [C] passes of the drafter that the chunk took part in
    # [B] of each draft's row, its largest raw probability, 1 where a draft is all there is; CERTAIN or PREDICTED for a foreseen draft;
    # empty if nobody reads it
    confidences: tuple[tuple[float, ...], ...] = ()
    num_passes: int = 0  # of the drafter in this step
    num_rows: int = 0  # tokens that these ran
    num_late_rows: int = 0  # of which the drafter only caught up with so many: nothing was drawn behind them
    predicted_masks: tuple[int, ...] = ()  # [B] bit i: draft i comes from the request's prediction; empty where none does

    @property
    def num_draft_tokens(self) -> int:
        return sum(self.lengths)


@dataclass(frozen=True, slots=True)
class RowBatch:
    """Which distribution each of N rows of logits is: the one at position `len(seq.tokens) + offset`, behind `offset` drafts."""

    seqs: tuple[Sequence, ...]  # [N]
    offsets: tuple[int, ...]  # [N]
    draft_index: tuple[int, ...]  # [N] row of draft_ids that holds the sequence's drafts
    draft_ids: Tensor  # [B, K]

    def windows(self) -> list[int]:
        """Which of the N rows belong to verify windows; the others were wanted besides."""
        return [i for i, offset in enumerate(self.offsets) if offset >= 0]

    def select(self, index: list[int]) -> RowBatch:
        """Some of the rows."""
        return RowBatch(
            seqs=tuple(self.seqs[i] for i in index),
            offsets=tuple(self.offsets[i] for i in index),
            draft_index=tuple(self.draft_index[i] for i in index),
            draft_ids=self.draft_ids,
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """What each completing chunk emits, on the host. Reading it is where a step waits for the device."""

    token_ids: tuple[tuple[int, ...], ...]  # [B] accepted drafts, then the recovered or bonus token
    num_accepted: tuple[int, ...]  # [B]
    deferred_masks: tuple[int, ...]  # [B] see request.Round
    lossy_masks: tuple[int, ...]  # [B]
    bonus_is_drafted: tuple[bool, ...]  # [B] the last token is the bonus, and the drafter wrote it


@dataclass(frozen=True, slots=True)
class Logprobs:
    """How likely the target found tokens, for those who asked."""

    emitted: tuple[tuple[TokenLogprobs, ...], ...] = ()  # [B] of the tokens of each verdict; empty if nothing is known of anybody
    prompts: Mapping[Sequence, tuple[TokenLogprobs, ...]] = field(default_factory=dict)  # of prompt tokens, from `num_scored` on


class Foreseen(NamedTuple):
    """A token that can be told before any model has run."""

    token_id: int
    is_predicted: bool = False  # it comes from the request's prediction

    @property
    def confidence(self) -> float:
        return PREDICTED if self.is_predicted else CERTAIN


class Foresight(Protocol):
    """Tells tokens from the text alone. What is foreseen at a position is the same whatever the steps were: so is, then, who drafts there,
    and the promise for seeded requests holds."""

    def applies(self, seq: Sequence) -> bool:
        """Whether anything can ever be foreseen for this sequence."""

    def next(self, seq: Sequence, drafts: ListLike[int]) -> Foreseen | None:
        """What comes behind the sequence and these drafts of it, if that can be told."""

    def forget(self, seq: Sequence) -> None:
        """The sequence has left the engine."""


class Followed(Protocol):
    """Says what can follow a text, where not anything can: where its answer has a grammar."""

    @property
    def preparing(self) -> Sequence | None:
        """The one that something is being made ready for now, beside the steps."""

    def is_ready(self, seq: Sequence) -> bool:
        """Whether a sequence that waits may begin. Asked when it comes, and until it does; what has to be made for it is begun then."""

    def may_draft(self, seq: Sequence) -> bool:
        """Whether drafts are worth trying: not where they led nowhere again and again."""

    def is_broken(self, seq: Sequence) -> bool:
        """Whether nothing can follow the sequence."""

    def num_standing(self, seq: Sequence, token_ids: ListLike[int]) -> int:
        """How many of these tokens of a round stand: all, or those up to one that nothing can follow."""


class AnyText:
    """Anything can follow."""

    preparing = None

    def is_ready(self, seq: Sequence) -> bool:
        return True

    def may_draft(self, seq: Sequence) -> bool:
        return True

    def is_broken(self, seq: Sequence) -> bool:
        return False

    def num_standing(self, seq: Sequence, token_ids: ListLike[int]) -> int:
        return len(token_ids)


class Drafter(Protocol):
    """Proposes tokens. Its state per sequence, if any, is keyed by the Sequence and ends with `forget`."""

    @property
    def reads_states(self) -> bool:
        """Whether it drafts from the target's states."""

    def propose(self, plan: StepPlan, budget: int) -> DraftBatch:
        """Draft for every chunk that completes, running at most about `budget` tokens; catch up for the others.

        Must advance the first chunk of the plan whenever anything is due there, or the engine could stand still.
        """

    def observe(self, plan: StepPlan, verdict: Verdict, states: Tensor | None) -> None:
        """What became of the drafts; called after the plan was committed.

        `states` [B, hidden], if they are read: for each chunk that completed, the target's last state that its last token followed from.
        """

    def forget(self, seq: Sequence) -> None:
        """The sequence has left the engine."""


@dataclass(frozen=True, slots=True)
class StepTiming:
    """What one step ran, and how long that took."""

    num_target_rows: int  # drafts included
    num_drafts: int
    target_seconds: float  # from the drafts to the verdict
    num_drafter_calls: int  # passes of the drafter
    num_drafter_rows: int  # over so many tokens in all
    num_late_rows: int  # of which it only caught up with so many
    drafter_seconds: float


@dataclass(frozen=True, slots=True)
class Drafting:
    """A sequence that has just drafted one more token."""

    seq: Sequence
    confidences: ListLike[float]  # of the rows that its drafts were drawn from, largest raw probabilities; empty unless they are read
    room: int  # how many more drafts it may make


class DraftLengthPolicy(Protocol):
    """How many tokens to draft. May look at rows, counts and times, never at a drafted token: the law of the text may not depend on it."""

    max_length: int
    reads_confidence: bool  # whether it looks at the confidences of drafts

    def lengths(self, seqs: ListLike[Sequence], limits: ListLike[int], budget: int, num_rows: int) -> list[int]:
        """Drafts for each sequence, chosen for the whole batch together: at most its limit, in all at most `budget`. `seqs` are all that
        emit in this step, those that may not draft with a limit of 0. The target's pass has `num_rows` without drafts: one of each, and
        those of prompts."""

    def who_goes_on(self, drafting: ListLike[Drafting]) -> list[bool]:
        """Who is to draft on, of those that still drafted. Asked behind every call of the drafter."""

    def expects_drafts(self, num_seqs: int) -> bool:
        """Whether a sequence whose prompt is being run, one of so many, is likely to be drafted for: if not, the drafter may leave the
        prompt for later."""

    def observe(self, seq: Sequence, num_draft: int, num_accepted: int, confidences: ListLike[float] = ()) -> None:
        """What became of a sequence's drafts. `confidences` is empty where the drafter has none."""

    def observe_step(self, timing: StepTiming) -> None:
        """What the step took."""

    def forget(self, seq: Sequence) -> None:
        """The sequence has left the engine."""


class RawRows(Protocol):
    """What rules read of N rows. q and p are softmax of the hard-masked logits at temperature 1. Computed when first asked for."""

    @property
    def q(self) -> Tensor: ...  # [N, V]

    @property
    def p(self) -> Tensor: ...  # [N, V]

    @property
    def total_variation(self) -> Tensor: ...  # [N, 1] sum of max(0, q - p) of the processed rows, those that are sampled from

    @property
    def is_greedy(self) -> Tensor: ...  # [N, 1] booleans


class Rule(Protocol):
    """Says which drafted tokens may stand, as a keep-set A per row."""

    needs_q: bool  # rows without q are verified with pi = p
    is_lossless: bool  # keeps nothing, so that pi = p
    is_lenient: bool  # where nothing is kept, pi is not p: drafts stand with probability min(1, p / ((1 - alpha) q)), see rules.Lossy

    def keep(self, raw: RawRows, alpha: Tensor) -> Tensor:
        """A as booleans, [N, V], or [N, 1] for a rule that keeps all tokens or none. `alpha` is [N, 1].

        The Verifier cuts A to the support of raw.p.
        """


class LogitsProcessor(Protocol):
    """Row-wise change of logits before they become probabilities, applied to the rows of target and drafter alike."""

    is_mask: bool  # a hard mask, which rules see, too: entries become -inf or stay as they are

    def apply(self, logits: Tensor, rows: RowBatch) -> Tensor:
        """[N, V] to [N, V]: a new tensor, or the same one where nothing changes."""
