"""A second, smaller model as the drafter, with KV of its own over the shared blocks and a watermark of its own.

It lags where blocks were reused that it never computed, where a sequence was not drafted for, and by one token after a round in
which all drafts stood. It catches up inside `propose`, under its own budget, oldest sequence first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch
from torch import Tensor

from engine.draft.copying import Copying
from engine.draft.foresight import NoForesight
from engine.draft.ngram import Window, batch_of
from engine.draft.table import Draft, Table
from engine.draft.target_states import TargetStates
from engine.model.attention import Segment
from engine.model.paged import PagedModel
from engine.plan import Chunk, DraftBatch, Drafting, DraftLengthPolicy, Foresight, QKind, RowBatch, Rows, Rule, StepPlan, Verdict
from engine.sampling.distributions import Distributions
from engine.sampling.draws import Purpose, keys_of_round, uniforms
from engine.sequence import Sequence
from engine.transfer import to_device


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
        drafts = [Draft(chunk, chunk.seq.drafter_computed) for chunk in plan.chunks]
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
    def _foresee(self, draft: Draft) -> None:
        """Draft what can be told without this model, as far as there is room."""
        while not draft.is_foretold and (foreseen := self._foresight.next(draft.seq, draft.ids)) is not None:
            if not draft.has_room:
                draft.is_foretold = True
                return
            draft.predicted_mask |= foreseen.is_predicted << draft.num_drafted
            draft.ids.append(foreseen.token_id)
            draft.kinds.append(QKind.GIVEN)
            draft.confidences.append(foreseen.confidence)

    def _settle_for_less(self, draft: Draft) -> None:
        """Where the row that is due behind the drafts could not be had: end in front of a foreseen token, which needs none, or lag."""
        if draft.chunk.completes and draft.seq.needs_q and draft.wants_row() and self._is_behind(draft):
            if draft.kinds:
                draft.take_back()
            else:
                draft.is_lagging = True

    # ------------------------------------------------------------------ catching up
    def _is_behind(self, draft: Draft) -> bool:
        """Whether the row for the next position is missing although there can be one: a position up to the context's length has it."""
        return draft.computed < draft.position <= self._context_length

    def _may_wait(self, draft: Draft) -> bool:
        """Whether nothing needs the chunk's tokens yet: a piece of a prompt that only drafts would read."""
        return not draft.chunk.completes and not draft.seq.needs_q

    def _num_behind(self, draft: Draft) -> int:
        """Tokens to run before the row for the next position is there, or before the chunk's end."""
        chunk, seq = draft.chunk, draft.seq
        if not seq.request.speculation.enabled:
            return 0
        if chunk.completes and not draft.wants_row():
            return 0  # nothing is drafted and no row is needed: catch up when something is
        end = draft.position if chunk.completes else seq.num_computed + chunk.num_tokens
        return max(0, min(end, self._context_length) - draft.computed)

    def _catch_up(self, drafts: list[Draft], budget: int) -> tuple[Tensor, list[Draft], int]:
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
    def _new_table(self, emitting: list[Draft], ready: list[Draft]) -> Table:
        longest = max((*(d.chunk.max_draft for d in ready), *(d.num_drafted for d in emitting)), default=0)
        is_read = any(d.seq.request.speculation.rule in self._reading_q for d in ready)
        device, vocab = self._model.stack.device, self._model.vocab_size
        dtype = torch.promote_types(self._model.stack.dtype, torch.float32)
        shape = (len(emitting), longest + 1, vocab if ready else 0)  # zeros that nobody reads would take a millisecond of a large batch
        keys = to_device([d.seq.key for d in emitting], device, torch.long).view(-1, 1)
        first = to_device([len(d.seq.tokens) for d in emitting], device, torch.long).view(-1, 1)
        table = Table(
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

    def _store(self, table: Table, drafts: list[Draft], states: Tensor) -> None:
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

    def _extend(self, table: Table, drafts: list[Draft]) -> int:
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

    def _note(self, drafts: list[Draft], drawn: Tensor) -> None:
        """Count a draft more for each. What it is has to be known here only where something goes by it."""
        for draft in drafts:
            draft.kinds.append(QKind.DENSE)
            draft.has_row = False
        if self._copying is not None or any(self._foresight.applies(d.seq) for d in drafts):
            for draft, token_id in zip(drafts, drawn.tolist(), strict=True):
                draft.ids.append(token_id)

    def _run(self, table: Table, drafts: list[Draft]) -> None:
        """Run the drafts that were made last, for the rows behind them."""
        segments = [Segment(d.seq.block_table, d.computed, d.position - d.computed) for d in drafts]
        places = table.places([(d.row, i) for d in drafts for i in range(d.computed - len(d.seq.tokens), d.num_drafted)])
        ends = accumulate(segment.num_tokens for segment in segments)
        states = self._model.states(segments, table.ids.view(-1).index_select(0, places), [end - 1 for end in ends])
        for draft in drafts:
            draft.computed = draft.position
            draft.num_calls += 1
        self._store(table, drafts, states)

    def _drafting(self, draft: Draft) -> Drafting:
        room = draft.chunk.max_draft - draft.num_drafted if draft.computed < self._context_length else 0
        return Drafting(draft.seq, draft.confidences[: draft.num_drafted], room)

    def _batch(self, drafts: list[Draft], table: Table) -> DraftBatch:
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
    found: list[float] = largest.nan_to_num(nan=0.0).tolist()  # a model that overflows is sure of nothing
    return found


def _padded(kinds: list[QKind], width: int) -> list[int]:
    return [*kinds, *[QKind.NONE] * (width - len(kinds))]
