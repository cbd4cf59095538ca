"""A second, smaller model as the drafter, with KV of its own over the shared blocks and a watermark of its own.

It lags where blocks were reused that it never computed, where a sequence was not drafted for, and by one token after a round in
which all drafts stood. It catches up inside `propose`, under its own budget, oldest sequence first.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from engine.draft.copying import Copying
from engine.draft.foresight import NoForesight
from engine.draft.ngram import Window, batch_of
from engine.draft.target_states import TargetStates
from engine.model.attention import Segment
from engine.model.paged import PagedModel
from engine.plan import Chunk, DraftBatch, Drafting, DraftLengthPolicy, Foresight, QKind, RowBatch, Rows, Rule, StepPlan, Verdict
from engine.sampling.distributions import Distributions
from engine.sampling.draws import Purpose, draw, keys_of_round, uniforms
from engine.sequence import Sequence
from engine.transfer import to_device


@dataclass(eq=False, slots=True)
class _Draft:
    """How far one chunk has come within a proposal."""

    chunk: Chunk
    computed: int  # the drafter's watermark, drafts included
    row: int = -1  # its row in the batch; -1 for a chunk that does not complete
    kinds: list[QKind] = field(default_factory=list)  # of the drafts
    ids: list[int] = field(default_factory=list)  # the drafts, where something goes by them: foresight, or copying
    has_row: bool = False  # the row that the next draft is drawn from is there
    is_foretold: bool = False  # what comes behind the drafts is foreseen, so that nobody needs a row for it
    is_lagging: bool = False
    is_unsure: bool = False  # nothing more is to be drafted
    num_calls: int = 0
    num_late: int = 0  # tokens that were caught up with
    predicted_mask: int = 0  # bit i: draft i comes from the request's prediction
    confidences: list[float] = field(default_factory=list)  # of its rows, if the policy reads them

    @property
    def seq(self) -> Sequence:
        return self.chunk.seq

    @property
    def num_drafted(self) -> int:
        return len(self.kinds)

    @property
    def position(self) -> int:
        """Of what comes next: so many tokens, drafts included, are in front of it."""
        return len(self.seq.tokens) + self.num_drafted

    @property
    def has_room(self) -> bool:
        return self.num_drafted < self.chunk.max_draft and not self.is_unsure

    def wants_draft(self) -> bool:
        return self.has_row and self.has_room

    def wants_row(self) -> bool:
        """Whether there is to be a row behind the drafts: for the next one, or because every position that is not foreseen needs one."""
        return not self.is_foretold and (self.has_room or self.seq.needs_q)

    def take_back(self) -> None:
        """Leave the last draft, which was foreseen, to the target."""
        self.kinds.pop()
        self.ids.pop()
        self.confidences.pop()
        self.predicted_mask &= (1 << self.num_drafted) - 1
        self.is_foretold = True


@dataclass(frozen=True, slots=True)
class _Due:
    """Rows that the next drafts are drawn from."""

    drafts: list[_Draft]
    places: Tensor  # [N] in the table
    probs: Tensor  # [N, V]
    only: Tensor | None = None  # [N] the one token of each, where all are one-hot


@dataclass(slots=True)
class _Table:
    """The batch that is being filled: ids and the numbers that they are drawn with [B, K + 1], rows [B, K + 1, V]."""

    drafts: list[_Draft]  # those that emit
    numbers: Tensor
    ids: Tensor
    probs: Tensor
    logits: Tensor | None  # what a rule reads; None where none of the batch does
    due: _Due | None = None  # what was stored last

    @property
    def width(self) -> int:
        return self.ids.shape[1]

    def places(self, at: ListLike[tuple[int, int]]) -> Tensor:
        """Rows and columns as one index of the flattened table."""
        return to_device([row * self.width + column for row, column in at], self.ids.device, torch.long)

    def write(self, draft: _Draft, start: int) -> None:
        """Enter the drafts of a row from `start` on, which are known here."""
        if draft.num_drafted > start:
            self.ids[draft.row, start : draft.num_drafted] = to_device(draft.ids[start:], self.ids.device)

    def store(self, drafts: list[_Draft], rows: Rows) -> None:
        """Enter the next row of each of N drafts."""
        self.due = _Due(drafts, self.places([(d.row, d.num_drafted) for d in drafts]), rows.probs, rows.only)
        self.probs.flatten(0, 1).index_copy_(0, self.due.places, rows.probs)
        if self.logits is not None and rows.logits is not None:
            self.logits.flatten(0, 1).index_copy_(0, self.due.places, rows.logits)
        for draft in drafts:
            draft.has_row = True

    def draw(self, drafts: list[_Draft]) -> Tensor:
        """Draw the next draft of each of N, [N]."""
        due = self.due
        if due is None or due.drafts != drafts:
            places = self.places([(d.row, d.num_drafted) for d in drafts])
            due = _Due(drafts, places, self.probs.flatten(0, 1).index_select(0, places))
        drawn = draw(due.probs, self.numbers.flatten().index_select(0, due.places)) if due.only is None else due.only
        self.ids.view(-1).index_copy_(0, due.places, drawn)
        return drawn


@dataclass(frozen=True)
class Aids:
    """What helps a drafter that is a model."""

    copying: Copying | None = None
    foresight: Foresight = field(default_factory=NoForesight)
    numbers_are_by_round: bool = False  # as the Verifier's


class ModelDrafter:
    """Drafts with a PagedModel of the target's vocabulary, but for what is foreseen: that costs no pass.

    With an adapter it reads the target's last state of the round before, for requests that need no row q at every position. Such a row says
    more and depends on where rounds began, which is free where pi = p: the law of the text is the target's whatever q is. Where the text
    may not depend on rounds, sampled with a seed or under a cascade, rows come from the text alone.
    """

    def __init__(
        self,
        model: PagedModel,
        distributions: Distributions,
        context_length: int,
        rules: Mapping[str, Rule],
        policy: DraftLengthPolicy,
        aids: Aids | None = None,
    ):
        """`context_length`: positions that the model can hold. Behind them there are no rows, and no drafts but foreseen ones."""
        self._model = model
        aids = aids or Aids()
        self._copying = aids.copying
        self._foresight = aids.foresight
        self._numbers_are_by_round = aids.numbers_are_by_round
        self._target_states = TargetStates(model.stack.adapter) if model.stack.adapter else None
        self._policy = policy
        self._reading_q = frozenset(name for name, rule in rules.items() if rule.needs_q)
        self._distributions = distributions
        self._context_length = context_length

    @property
    def reads_states(self) -> bool:
        return self._target_states is not None

    @torch.inference_mode()
    def propose(self, plan: StepPlan, budget: int) -> DraftBatch:
        if not any(_is_asked_of(chunk) for chunk in plan.chunks):  # among many streams that is most steps
            return replace(batch_of(plan, [Window() for _ in plan.completing]), drafter_computed=_watermarks(plan))
        drafts = [_Draft(chunk, chunk.seq.drafter_computed) for chunk in plan.chunks]
        for draft in drafts:
            if draft.chunk.completes and draft.seq.request.speculation.enabled:
                self._foresee(draft)
        is_expected = self._policy.expects_drafts(len(drafts))
        states, ready, left = self._catch_up([d for d in drafts if is_expected or not self._may_wait(d)], budget)
        for draft in drafts:
            self._settle_for_less(draft)
        emitting = [d for d in drafts if d.chunk.completes and not d.is_lagging]
        for row, draft in enumerate(emitting):
            draft.row = row
        table = self._new_table(emitting, ready)
        if ready:
            self._store(table, ready, states)
        while left > 0 and (drafting := [d for d in ready if d.wants_draft()]):
            left -= self._extend(table, drafting[:left])
        return self._batch(drafts, table)

    def observe(self, plan: StepPlan, verdict: Verdict, states: Tensor | None) -> None:
        """Keep the target's states for the next round. The scheduler moves the watermark back."""
        if self._target_states is not None and states is not None:
            self._target_states.observe(plan, states.to(self._model.stack.dtype))

    def forget(self, seq: Sequence) -> None:
        if self._target_states is not None:
            self._target_states.forget(seq)
        self._foresight.forget(seq)
        if self._copying is not None:
            self._copying.forget(seq)

    # ------------------------------------------------------------------ what costs nothing
    def _foresee(self, draft: _Draft) -> None:
        """Draft what can be told without this model, as far as there is room."""
        while not draft.is_foretold and (foreseen := self._foresight.next(draft.seq, draft.ids)) is not None:
            if not draft.has_room:
                draft.is_foretold = True
                return
            draft.predicted_mask |= foreseen.is_predicted << draft.num_drafted
            draft.ids.append(foreseen.token_id)
            draft.kinds.append(QKind.GIVEN)
            draft.confidences.append(foreseen.confidence)

    def _settle_for_less(self, draft: _Draft) -> None:
        """Where the row that is due behind the drafts could not be had: end in front of a foreseen token, which needs none, or lag."""
        if draft.chunk.completes and draft.seq.needs_q and draft.wants_row() and self._is_behind(draft):
            if draft.kinds:
                draft.take_back()
            else:
                draft.is_lagging = True

    # ------------------------------------------------------------------ catching up
    def _is_behind(self, draft: _Draft) -> bool:
        """Whether the row for the next position is missing although there can be one: a position up to the context's length has it."""
        return draft.computed < draft.position <= self._context_length

    def _may_wait(self, draft: _Draft) -> bool:
        """Whether nothing needs the chunk's tokens yet: a piece of a prompt that only drafts would read."""
        return not draft.chunk.completes and not draft.seq.needs_q

    def _num_behind(self, draft: _Draft) -> int:
        """Tokens to run before the row for the next position is there, or before the chunk's end."""
        chunk, seq = draft.chunk, draft.seq
        if not seq.request.speculation.enabled:
            return 0
        if chunk.completes and not draft.wants_row():
            return 0  # nothing is drafted and no row is needed: catch up when something is
        end = draft.position if chunk.completes else seq.num_computed + chunk.num_tokens
        return max(0, min(end, self._context_length) - draft.computed)

    def _catch_up(self, drafts: list[_Draft], budget: int) -> tuple[Tensor, list[_Draft], int]:
        """Run committed tokens and foreseen ones, oldest sequence first. Returns states, whose they are, and the budget that is left."""
        segments, ids, rows, ready = [], [], [], []
        for draft in drafts:
            num = min(self._num_behind(draft), budget)
            if not num:
                continue
            budget -= num
            segments.append(Segment(draft.seq.block_table, draft.computed, num))
            text = [*draft.seq.tokens, *draft.ids] if draft.ids else draft.seq.tokens
            ids.extend(text[draft.computed : draft.computed + num])
            draft.computed += num
            draft.num_late = num - (draft.chunk.completes and draft.computed == draft.position)
            draft.num_calls += 1
            if draft.chunk.completes and draft.computed == draft.position:
                rows.append(len(ids) - 1)
                ready.append(draft)
        return self._model.states(segments, to_device(ids, self._model.stack.device, torch.long), rows), ready, budget

    # ------------------------------------------------------------------ drafting
    def _new_table(self, emitting: list[_Draft], ready: list[_Draft]) -> _Table:
        longest = max((*(d.chunk.max_draft for d in ready), *(d.num_drafted for d in emitting)), default=0)
        is_read = any(d.seq.request.speculation.rule in self._reading_q for d in ready)
        device, vocab = self._model.stack.device, self._model.vocab_size
        dtype = torch.promote_types(self._model.stack.dtype, torch.float32)
        shape = (len(emitting), longest + 1, vocab if ready else 0)  # zeros that nobody reads would take a millisecond of a large batch
        keys = to_device([d.seq.key for d in emitting], device, torch.long).view(-1, 1)
        first = to_device([len(d.seq.tokens) for d in emitting], device, torch.long).view(-1, 1)
        table = _Table(
            drafts=emitting,
            numbers=uniforms(
                keys_of_round(keys, first) if self._numbers_are_by_round else keys,
                first + torch.arange(longest + 1, device=device),
                Purpose.DRAFT,
            ),
            ids=torch.zeros(len(emitting), longest + 1, dtype=torch.long, device=device),
            probs=torch.zeros(shape, dtype=dtype, device=device),
            logits=torch.zeros(shape, dtype=dtype, device=device) if is_read else None,
        )
        for draft in emitting:
            table.write(draft, 0)
        return table

    def _store(self, table: _Table, drafts: list[_Draft], states: Tensor) -> None:
        """Turn last states [N, hidden] into the next row q of each of N drafts."""
        if self._target_states is not None:
            states = self._target_states.read([d.seq for d in drafts], [d.position for d in drafts], states)
        logits, total = self._model.logits(states), None
        if self._copying is not None:
            logits, total = self._copying.mixed(logits, [d.seq for d in drafts], [d.ids for d in drafts])
        batch = RowBatch(
            seqs=tuple(d.seq for d in drafts),
            offsets=tuple(d.num_drafted for d in drafts),
            draft_index=tuple(d.row for d in drafts),
            draft_ids=table.ids,
        )
        rows: Rows = self._distributions.of(logits, batch)
        table.store(drafts, rows)
        if self._policy.reads_confidence and rows.logits is not None:
            for draft, confidence in zip(drafts, _confidences(rows.logits, total if rows.allowed is None else None), strict=True):
                draft.confidences.append(confidence)

    def _extend(self, table: _Table, drafts: list[_Draft]) -> int:
        """Draft one more token for each, and run those behind which a row is wanted. Returns the tokens run or drawn."""
        self._note(drafts, table.draw(drafts))
        goes_on = self._policy.who_goes_on([self._drafting(d) for d in drafts])
        for draft, is_sure in zip(drafts, goes_on, strict=True):
            draft.is_unsure = not is_sure
            num_drawn = draft.num_drafted
            self._foresee(draft)
            table.write(draft, num_drawn)
        running = [d for d in drafts if d.wants_row() and self._is_behind(d)]
        num_more = sum(d.position - d.computed - 1 for d in running)
        if running:
            self._run(table, running)
        return len(drafts) + num_more

    def _note(self, drafts: list[_Draft], drawn: Tensor) -> None:
        """Count a draft more for each. What it is has to be known here only where something goes by it."""
        for draft in drafts:
            draft.kinds.append(QKind.DENSE)
            draft.has_row = False
        if self._copying is not None or any(self._foresight.applies(d.seq) for d in drafts):
            for draft, token_id in zip(drafts, drawn.tolist(), strict=True):
                draft.ids.append(token_id)

    def _run(self, table: _Table, drafts: list[_Draft]) -> None:
        """Run the drafts that were made last, for the rows behind them."""
        segments = [Segment(d.seq.block_table, d.computed, d.position - d.computed) for d in drafts]
        places = table.places([(d.row, i) for d in drafts for i in range(d.computed - len(d.seq.tokens), d.num_drafted)])
        ends = accumulate(segment.num_tokens for segment in segments)
        states = self._model.states(segments, table.ids.view(-1).index_select(0, places), [end - 1 for end in ends])
        for draft in drafts:
            draft.computed = draft.position
            draft.num_calls += 1
        self._store(table, drafts, states)

    def _drafting(self, draft: _Draft) -> Drafting:
        room = draft.chunk.max_draft - draft.num_drafted if draft.computed < self._context_length else 0
        return Drafting(draft.seq, draft.confidences[: draft.num_drafted], room)

    def _batch(self, drafts: list[_Draft], table: _Table) -> DraftBatch:
        width = table.width
        return DraftBatch(
            lengths=tuple(d.num_drafted for d in table.drafts),
            ids=table.ids[:, :-1],
            kinds=[_padded([*d.kinds, QKind.DENSE if d.has_row else QKind.NONE], width) for d in table.drafts],
            rows=Rows(table.probs, table.logits, allowed=None) if any(d.has_row or QKind.DENSE in d.kinds for d in table.drafts) else None,
            drafter_computed=tuple(d.computed for d in drafts),
            lagging=tuple(d.is_lagging for d in drafts),
            num_calls=tuple(d.num_calls for d in drafts),
            confidences=tuple(tuple(d.confidences[: d.num_drafted]) for d in table.drafts) if self._policy.reads_confidence else (),
            num_passes=max((d.num_calls for d in drafts), default=0),
            num_rows=sum(max(0, d.computed - d.chunk.seq.drafter_computed) for d in drafts),
            num_late_rows=sum(d.num_late for d in drafts),
            predicted_masks=tuple(d.predicted_mask for d in table.drafts),
        )


def _is_asked_of(chunk: Chunk) -> bool:
    """Whether there may be anything to do for a chunk: drafts, a row q that is due in any case, or a piece of a prompt to read."""
    return chunk.seq.request.speculation.enabled and (chunk.max_draft > 0 or chunk.seq.needs_q or not chunk.completes)


def _watermarks(plan: StepPlan) -> tuple[int, ...]:
    return tuple(chunk.seq.drafter_computed for chunk in plan.chunks)


def _confidences(logits: Tensor, total: Tensor | None) -> list[float]:
    """The largest probability of each row [N, V] at temperature 1: a greedy row would always be sure of itself.

    `total` [N] are the logarithms of the rows' sums of exponentials, if they are known. None is above 1, as those of foreseen drafts are.
    """
    largest = logits.softmax(-1).amax(-1) if total is None else (logits.amax(-1) - total).exp().clamp(max=1)
    found: list[float] = largest.tolist()
    return found


def _padded(kinds: list[QKind], width: int) -> list[int]:
    return [*kinds, *[QKind.NONE] * (width - len(kinds))]
