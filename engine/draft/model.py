"""A second, smaller model as the drafter, with KV of its own over the shared blocks and a watermark of its own.

It lags where blocks were reused that it never computed, where a sequence was not drafted for, and by one token after a round in
which all drafts stood. It catches up inside `propose`, under its own budget, oldest sequence first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.draft.copying import Copying
from engine.model.attention import Segment
from engine.model.paged import PagedModel
from engine.plan import Chunk, DraftBatch, Drafting, DraftLengthPolicy, QKind, RowBatch, Rows, Rule, StepPlan, Verdict
from engine.sampling.distributions import Distributions
from engine.sampling.draws import Purpose, draw, uniforms
from engine.sequence import Sequence


@dataclass(eq=False, slots=True)
class _Draft:
    """How far one chunk has come within a proposal."""

    chunk: Chunk
    computed: int  # the drafter's watermark, drafts included
    row: int = -1  # its row in the batch; -1 for a chunk that does not complete
    num_rows: int = 0
    num_drafted: int = 0
    num_calls: int = 0
    is_lagging: bool = False
    is_unsure: bool = False  # nothing more is to be drafted
    confidences: list[float] = field(default_factory=list)  # of its rows, if the policy reads them
    drafted: list[int] = field(default_factory=list)  # the tokens, where there is copying, which goes by them

    @property
    def seq(self) -> Sequence:
        return self.chunk.seq

    def has_row(self) -> bool:
        """Whether the row that the next draft is drawn from is there."""
        return self.num_rows > self.num_drafted

    def wants_draft(self) -> bool:
        return self.has_row() and self._may_draft()

    def wants_row_behind(self) -> bool:
        """Whether the newest draft is to be run: for the next one, or because every position needs a row."""
        return self._may_draft() or self.seq.needs_q

    def _may_draft(self) -> bool:
        return self.num_drafted < self.chunk.max_draft and not self.is_unsure


@dataclass(slots=True)
class _Table:
    """The batch that is being filled: ids and the numbers that they are drawn with [B, K], rows [B, K + 1, V]."""

    drafts: list[_Draft]  # those that emit
    numbers: Tensor
    ids: Tensor
    probs: Tensor
    logits: Tensor | None  # what a rule reads; None where none of the batch does


class ModelDrafter:
    """Drafts with a PagedModel of the target's vocabulary."""

    def __init__(
        self,
        model: PagedModel,
        distributions: Distributions,
        context_length: int,
        rules: Mapping[str, Rule],
        policy: DraftLengthPolicy,
        copying: Copying | None = None,
    ):
        """`context_length`: positions that the model can hold. Behind them there are no rows, and no drafts."""
        self._model = model
        self._copying = copying
        self._policy = policy
        self._reading_q = frozenset(name for name, rule in rules.items() if rule.needs_q)
        self._distributions = distributions
        self._context_length = context_length

    @torch.inference_mode()
    def propose(self, plan: StepPlan, budget: int) -> DraftBatch:
        drafts = [_Draft(chunk, chunk.seq.drafter_computed) for chunk in plan.chunks]
        logits, ready, left = self._catch_up(drafts, budget)
        for draft in drafts:
            draft.is_lagging = self._row_is_due(draft) and draft not in ready
        emitting = [d for d in drafts if d.chunk.completes and not d.is_lagging]
        for row, draft in enumerate(emitting):
            draft.row = row
        table = self._new_table(emitting, ready)
        if ready:
            self._store(table, ready, logits)
        while left > 0 and (drafting := [d for d in ready if d.wants_draft()]):
            left -= self._extend(table, drafting[:left])
        return self._batch(drafts, table)

    def observe(self, plan: StepPlan, verdict: Verdict) -> None:
        """The scheduler moves the watermark back; nothing else is learnt."""

    def forget(self, seq: Sequence) -> None:
        if self._copying is not None:
            self._copying.forget(seq)

    # ------------------------------------------------------------------ catching up
    def _row_is_due(self, draft: _Draft) -> bool:
        """Whether the chunk must not emit without a drafter's row: a position up to the context's length has one."""
        return draft.chunk.completes and draft.seq.needs_q and len(draft.seq.tokens) <= self._context_length

    def _num_behind(self, draft: _Draft) -> int:
        """Tokens to run before the row for the next position is there, or before the chunk's end."""
        chunk, seq = draft.chunk, draft.seq
        if not seq.request.speculation.enabled:
            return 0
        if chunk.completes and not chunk.max_draft and not seq.needs_q:
            return 0  # nothing is drafted and no row is needed: catch up when something is
        return max(0, min(seq.num_computed + chunk.num_tokens, self._context_length) - draft.computed)

    def _catch_up(self, drafts: list[_Draft], budget: int) -> tuple[Tensor, list[_Draft], int]:
        """Run committed tokens, oldest sequence first. Returns logits, whose they are, and the budget that is left."""
        segments, ids, rows, ready = [], [], [], []
        for draft in drafts:
            num = min(self._num_behind(draft), budget)
            if not num:
                continue
            budget -= num
            segments.append(Segment(draft.seq.block_table, draft.computed, num))
            ids.extend(draft.seq.tokens[draft.computed : draft.computed + num])
            draft.computed += num
            draft.num_calls += 1
            if draft.chunk.completes and draft.computed == len(draft.seq.tokens):
                rows.append(len(ids) - 1)
                ready.append(draft)
        logits = self._model.forward(segments, torch.tensor(ids, dtype=torch.long, device=self._model.stack.device), rows)
        return logits, ready, budget

    # ------------------------------------------------------------------ drafting
    def _new_table(self, emitting: list[_Draft], ready: list[_Draft]) -> _Table:
        longest = max((d.chunk.max_draft for d in ready), default=0)
        is_read = any(d.seq.request.speculation.rule in self._reading_q for d in ready)
        device, vocab = self._model.stack.device, self._model.vocab_size
        dtype = torch.promote_types(self._model.stack.dtype, torch.float32)
        shape = (len(emitting), longest + 1, vocab)
        keys = torch.tensor([[d.seq.key] for d in emitting], dtype=torch.long, device=device).view(-1, 1)
        first = torch.tensor([[len(d.seq.tokens)] for d in emitting], dtype=torch.long, device=device).view(-1, 1)
        return _Table(
            drafts=emitting,
            numbers=uniforms(keys, first + torch.arange(longest, device=device), Purpose.DRAFT),
            ids=torch.zeros(len(emitting), longest, dtype=torch.long, device=device),
            probs=torch.zeros(shape, dtype=dtype, device=device),
            logits=torch.zeros(shape, dtype=dtype, device=device) if is_read else None,
        )

    def _store(self, table: _Table, drafts: list[_Draft], logits: Tensor) -> None:
        """Turn logits [N, V] into the next row q of each of N drafts."""
        if self._copying is not None:
            logits = self._copying.mixed(logits, [d.seq for d in drafts], [d.drafted for d in drafts])
        batch = RowBatch(
            seqs=tuple(d.seq for d in drafts),
            offsets=tuple(d.num_drafted for d in drafts),
            draft_index=tuple(d.row for d in drafts),
            draft_ids=table.ids,
        )
        rows: Rows = self._distributions.of(logits, batch)
        at = [d.row for d in drafts], [d.num_rows for d in drafts]
        table.probs[at] = rows.probs
        if table.logits is not None and rows.logits is not None:
            table.logits[at] = rows.logits
        for draft in drafts:
            draft.num_rows += 1
        if self._policy.reads_confidence and rows.logits is not None:
            # at temperature 1: a greedy row is always sure of itself
            for draft, confidence in zip(drafts, rows.logits.softmax(-1).amax(-1).tolist(), strict=True):
                draft.confidences.append(confidence)

    def _extend(self, table: _Table, drafts: list[_Draft]) -> int:
        """Draw one more token for each, and run those behind which a row is wanted. Returns the tokens run or drawn."""
        at = tuple(torch.tensor([[d.row, d.num_drafted] for d in drafts], device=table.ids.device).unbind(-1))
        drawn = draw(table.probs[at], table.numbers[at])
        table.ids[at] = drawn
        if self._copying is not None:
            for draft, token_id in zip(drafts, drawn.tolist(), strict=True):
                draft.drafted.append(token_id)
        for draft in drafts:
            draft.num_drafted += 1
        goes_on = self._policy.who_goes_on([self._drafting(d) for d in drafts])
        for draft, is_sure in zip(drafts, goes_on, strict=True):
            draft.is_unsure = not is_sure
        run = [i for i, d in enumerate(drafts) if d.wants_row_behind() and d.computed < self._context_length]
        if run:
            running = [drafts[i] for i in run]
            segments = [Segment(d.seq.block_table, d.computed, 1) for d in running]
            self._store(table, running, self._model.forward(segments, drawn[run], range(len(run))))
            for draft in running:
                draft.computed += 1
                draft.num_calls += 1
        return len(drafts)

    def _drafting(self, draft: _Draft) -> Drafting:
        room = draft.chunk.max_draft - draft.num_drafted if draft.computed < self._context_length else 0
        return Drafting(draft.seq, draft.confidences[: draft.num_drafted], room)

    def _batch(self, drafts: list[_Draft], table: _Table) -> DraftBatch:
        width = table.probs.shape[1]
        return DraftBatch(
            lengths=tuple(d.num_drafted for d in table.drafts),
            ids=table.ids,
            kinds=[[*[QKind.DENSE] * d.num_rows, *[QKind.NONE] * (width - d.num_rows)] for d in table.drafts],
            rows=Rows(table.probs, table.logits, allowed=None) if any(d.num_rows for d in table.drafts) else None,
            drafter_computed=tuple(d.computed for d in drafts),
            lagging=tuple(d.is_lagging for d in drafts),
            num_calls=tuple(d.num_calls for d in drafts),
            confidences=tuple(tuple(d.confidences[: d.num_drafted]) for d in table.drafts) if self._policy.reads_confidence else (),
            num_passes=max((d.num_calls for d in drafts), default=0),
            num_rows=sum(max(0, d.computed - d.chunk.seq.drafter_computed) for d in drafts),
        )
