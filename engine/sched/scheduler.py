"""Makes plans, commits verdicts, preempts. Knows tokens and blocks, not tensors.

There is no prefill phase and no decode phase: every sequence has committed tokens, some of them computed, and a step lets it run
more of what is pending. Only a chunk that runs all of it emits. Drafts get what budget and memory are left, and are given up first.

Everything is in the order of priority, and within one in that of age: who waits, who runs, and, from the end, who is preempted. Who runs
is preempted for those in front of it, never for one that waits.

Why nothing waits forever, but for what is more important: a sequence that could never fit the pool is refused at admission; the oldest
running sequence of the most important ones, the first of `running`, is never preempted and advances in every step; a preempted sequence
goes back to the head of those that wait with its priority; nobody waits for a block that a less important one computes.
"""

from __future__ import annotations

import time
from bisect import insort_left, insort_right
from collections.abc import Iterator
from collections.abc import Sequence as ListLike
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from engine.kv.block_pool import BlockPool, Model
from engine.plan import AnyText, Chunk, DraftBatch, DraftLengthPolicy, Followed, Logprobs, RowsWanted, StepPlan, Verdict
from engine.request import FinishReason, Request, TokenDelta, TokenLogprobs
from engine.sched.bound import StepBound
from engine.sched.emission import Emission, emission_of, ended, scored
from engine.sequence import Sequence


@dataclass(slots=True)
class SchedulerCounters:
    """Totals since the scheduler was made."""

    num_preemptions: int = 0
    num_prefix_queried_tokens: int = 0
    num_prefix_hit_tokens: int = 0


class WaitingFor(NamedTuple):
    """How many wait, by what for, as the last plan left them."""

    place: int = 0  # as many as may run did
    memory: int = 0  # too few blocks were free
    leader: int = 0  # another sequence was computing the blocks that they need, or their grammar was being compiled
    budget: int = 0  # the step's tokens were given out


@dataclass(slots=True)
class Limits:
    """What a step may hold."""

    max_sequences: int
    max_step_tokens: int


@dataclass(slots=True)
class _Leaders:
    """Blocks that a running sequence is computing and will publish: who needs one of them waits instead of computing it, too."""

    by_key: dict[bytes, Sequence] = field(default_factory=dict)

    def add(self, seq: Sequence, keys: list[bytes]) -> None:
        for key in keys:
            leader = self.by_key.setdefault(key, seq)
            if _priority(seq) < _priority(leader):
                self.by_key[key] = seq

    def discard(self, seq: Sequence, keys: list[bytes]) -> None:
        for key in keys:
            if self.by_key.get(key) is seq:
                del self.by_key[key]


class Scheduler:
    """Owns the sequences and the pool's blocks that they hold."""

    def __init__(self, pool: BlockPool, limits: Limits, policy: DraftLengthPolicy, followed: Followed | None = None):
        self.pool = pool
        self.followed = followed or AnyText()
        self.policy = policy
        self.counters = SchedulerCounters()
        self.waiting: list[Sequence] = []  # both: the most important first, and of these the oldest
        self.running: list[Sequence] = []
        self.waiting_for = WaitingFor()
        self.bound = StepBound()
        self._limits = limits
        self._leaders = _Leaders()
        self._by_request: dict[str, dict[int, Sequence]] = {}

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def max_step_tokens(self) -> int:
        """What the next plan may hold."""
        return int(min(self._limits.max_step_tokens, self.bound.now))

    def holds(self, seq: Sequence) -> bool:
        """Whether the sequence has neither ended nor been aborted."""
        return self._by_request.get(seq.request.id, {}).get(seq.choice.index) is seq

    # ------------------------------------------------------------------ in and out
    def add(self, request: Request) -> None:
        """Queue every choice of an admitted request."""
        if request.id in self._by_request:
            raise ValueError(f"Request id {request.id!r} is already in the engine.")
        seqs = {choice.index: Sequence(request, choice) for choice in request.choices}
        self._by_request[request.id] = seqs
        for seq in seqs.values():
            insort_right(self.waiting, seq, key=_priority)
        first, *others = seqs.values()
        self.followed.is_ready(first)  # what has to be made for it is begun now, and not when a place is free
        num_shared = len(request.prompt_ids) // self.pool.block_size
        if others and num_shared:  # hash a long prompt once, not once a choice
            self.pool.key(first, num_shared - 1)
            for other in others:
                other.block_keys = first.block_keys[:num_shared]

    def abort(self, request_id: str, choice: int) -> Sequence | None:
        """Drop a choice and free its blocks. None where it has already ended."""
        seq = self._by_request.get(request_id, {}).get(choice)
        if seq is None:
            return None
        if seq in self.running:
            self.running.remove(seq)
        else:
            self.waiting.remove(seq)
        self._retire(seq)
        return seq

    # ------------------------------------------------------------------ planning
    def schedule(self) -> StepPlan:
        """Everyone catches up with its own length, first come first; then who waits; drafts get what is left."""
        plan: list[Chunk] = []
        left, preemptions = self.max_step_tokens, self.counters.num_preemptions
        index = 0
        while left and index < len(self.running):
            num_placed = self._place(self.running[index], left, plan)
            left -= num_placed
            index += num_placed > 0  # 0: it was itself preempted, the last of the list
        if self.counters.num_preemptions == preemptions:  # else memory is short, and who was just preempted would come back
            left -= self._admit_waiting(left, plan)
        else:
            self.waiting_for = WaitingFor(memory=len(self.waiting))
        return StepPlan(tuple(self._with_drafts(plan, left)))

    def _admit_waiting(self, budget: int, plan: list[Chunk]) -> int:
        """Start waiting sequences, in their order, but for those that wait for a leader or are not ready. Returns the tokens given out."""
        left, index, is_short = budget, 0, False
        while left and index < len(self.waiting) and len(self.running) < self._limits.max_sequences:
            seq = self.waiting[index]
            hit = self.pool.match(seq)
            if self._is_led(seq, len(hit)) or not self.followed.is_ready(seq):
                index += 1
                continue
            if is_short := not self._admit(seq, hit, left):
                break
            del self.waiting[index]
            left -= self._place(seq, left, plan)
        if index < len(self.waiting):
            self.followed.is_ready(self.waiting[index])  # nor when it is its turn, where another one was being made ready as it came
        self.waiting_for = self._reasons(index, is_short)
        return budget - left

    def _reasons(self, num_led: int, is_short: bool) -> WaitingFor:
        """Why the others wait, where so many wait for a leader. Those behind one that cannot start wait for what it waits for."""
        num = len(self.waiting) - num_led
        if is_short:
            return WaitingFor(memory=num, leader=num_led)
        is_full = len(self.running) >= self._limits.max_sequences
        return WaitingFor(place=num, leader=num_led) if is_full else WaitingFor(leader=num_led, budget=num)

    def _is_led(self, seq: Sequence, next_index: int) -> bool:
        """Whether the first block that the sequence would compute is being computed right now by another one, as important or more; or
        whether the request's first choice has yet to score the prompt, which they all have in common."""
        first = self._by_request[seq.request.id].get(seq.request.choices[0].index)
        if first is not None and first is not seq and first.is_scoring:
            return True
        if (next_index + 1) * self.pool.block_size > seq.num_reusable:  # it is not full, or must be computed in any case
            return False
        leader = self._leaders.by_key.get(self.pool.key(seq, next_index))
        return leader is not None and _priority(leader) <= _priority(seq)

    def _admit(self, seq: Sequence, hit: list[int], left: int) -> bool:
        """Start a waiting sequence on the published blocks that hold its first tokens. False where memory is short."""
        size = self.pool.block_size
        self.pool.share(seq, hit)
        seq.num_computed = len(hit) * size
        seq.drafter_computed = self.pool.num_valid(hit, Model.DRAFTER) * size
        seq.num_published, seq.num_drafter_marked = len(hit), seq.drafter_computed // size
        if not self.pool.grow(seq, seq.num_computed + min(seq.num_pending, left)):
            self._release(seq)
            return False
        insort_right(self.running, seq, key=_priority)
        self._leaders.add(seq, self._unpublished_keys(seq))
        self.counters.num_prefix_queried_tokens += len(seq.tokens)
        self.counters.num_prefix_hit_tokens += seq.num_computed
        if seq.num_cached is None:
            seq.num_cached = min(seq.num_computed, len(seq.request.prompt_ids))
            seq.queue_seconds = time.monotonic() - seq.request.arrived_at
        return True

    def _place(self, seq: Sequence, left: int, plan: list[Chunk]) -> int:
        """Give the sequence up to `left` of its pending tokens, preempting later ones for memory. Returns how many."""
        num_tokens = min(seq.num_pending, left)
        while not self.pool.grow(seq, seq.num_computed + num_tokens):
            if self._preempt_last() is seq:
                return 0
        rows = RowsWanted.ALL if seq.is_scoring else RowsWanted.WINDOW
        plan.append(Chunk(seq, num_tokens, completes=num_tokens == seq.num_pending, rows_wanted=rows))
        return num_tokens

    def _preempt_last(self) -> Sequence:
        """Take the blocks of the least important, and of these the youngest. Plans are made from the first on, so it is not in the plan
        yet."""
        victim = self.running.pop()
        self._release(victim)
        insort_left(self.waiting, victim, key=_priority)
        self.counters.num_preemptions += 1
        return victim

    def _with_drafts(self, plan: list[Chunk], left: int) -> Iterator[Chunk]:
        """Reserve draft slots where budget and memory are left. Drafts preempt nobody."""
        seqs = [chunk.seq for chunk in plan if chunk.completes]  # who may not draft emits, too
        limits = [self._draft_limit(seq) for seq in seqs]
        lengths = self.policy.lengths(seqs, limits, left, sum(chunk.num_tokens for chunk in plan))
        wanted = dict(zip(seqs, lengths, strict=True))
        for chunk in plan:
            num = wanted.get(chunk.seq, 0)
            while num and not self.pool.grow(chunk.seq, chunk.seq.num_computed + chunk.num_tokens + num):
                num -= 1
            yield replace(chunk, max_draft=num) if num else chunk

    def _draft_limit(self, seq: Sequence) -> int:
        """Drafts that the request allows, and that may still be emitted in front of one more token."""
        if not seq.request.speculation.enabled or not self.followed.may_draft(seq):
            return 0
        asked = seq.request.speculation.max_draft
        return max(0, min(seq.num_remaining - 1, self.policy.max_length if asked is None else asked))

    # ------------------------------------------------------------------ where memory ran out
    def take_back(self, plan: StepPlan) -> bool:
        """A plan that cannot be run: nothing of it was committed, and the next one is smaller. False where none is."""
        for chunk in plan.chunks:
            self.pool.trim(chunk.seq, chunk.seq.num_computed)
        return self.bound.shrink(sum(chunk.num_tokens + chunk.max_draft for chunk in plan.chunks))

    def give_up(self, seq: Sequence) -> TokenDelta:
        """End an answer of which not even one token can be run."""
        self.running.remove(seq)
        self._retire(seq)
        return ended(seq, FinishReason.MEMORY)

    # ------------------------------------------------------------------ committing
    def commit(self, plan: StepPlan, drafts: DraftBatch, verdict: Verdict, logprobs: Logprobs | None = None) -> list[TokenDelta]:
        """Append what was emitted, roll back what was rejected, publish full blocks, free what has ended."""
        deltas, row, logprobs = list[TokenDelta](), 0, logprobs or Logprobs()
        if plan.chunks:
            self.bound.note_good(sum(chunk.num_tokens for chunk in plan.chunks) + drafts.num_draft_tokens, self._limits.max_step_tokens)
        for index, chunk in enumerate(plan.chunks):
            seq = chunk.seq
            seq.num_computed += chunk.num_tokens
            seq.num_target_calls += chunk.num_tokens > 0
            seq.num_drafter_calls += drafts.num_calls[index]
            if scores := logprobs.prompts.get(seq):
                seq.num_scored += len(scores)
                deltas.append(scored(seq, scores))
            reason = None
            if chunk.completes:
                if self.followed.is_broken(seq):
                    delta = ended(seq, FinishReason.ERROR)
                else:
                    what = emission_of(seq, drafts, verdict, row, self.followed)
                    confidences = drafts.confidences[row] if drafts.confidences else ()
                    delta = self._emit(seq, what, confidences, logprobs.emitted[row] if logprobs.emitted else ())
                deltas.append(delta)
                reason, row = delta.finish_reason, row + 1
            seq.drafter_computed = min(drafts.drafter_computed[index], seq.num_computed)  # rollback moves two pointers
            self.pool.trim(seq, seq.num_computed)
            num_published = seq.num_published
            self.pool.publish(seq)
            self._leaders.discard(seq, seq.block_keys[num_published : seq.num_published])
            if reason is not None:
                self.running.remove(seq)
                self._retire(seq)
        return deltas

    def _emit(self, seq: Sequence, what: Emission, confidences: ListLike[float], logprobs: tuple[TokenLogprobs, ...]) -> TokenDelta:
        seq.tokens.extend(what.token_ids)
        seq.num_computed += what.num_computed
        self.policy.observe(seq, what.became.num_draft, what.became.num_accepted, confidences)
        return TokenDelta(
            request_id=seq.request.id,
            choice=seq.choice.index,
            token_ids=what.token_ids,
            finish_reason=what.reason,
            round=what.became if what.became.num_draft else None,
            logprobs=logprobs[: len(what.token_ids)],
            drafted_mask=what.drafted_mask,
            num_cached_tokens=seq.num_cached or 0,
            queue_seconds=seq.queue_seconds,
            num_target_calls=seq.num_target_calls,
            num_drafter_calls=seq.num_drafter_calls,
        )

    # ------------------------------------------------------------------ letting go
    def _unpublished_keys(self, seq: Sequence) -> list[bytes]:
        num_full = len(seq.tokens) // self.pool.block_size
        return [self.pool.key(seq, index) for index in range(seq.num_computed // self.pool.block_size, num_full)]

    def _release(self, seq: Sequence) -> None:
        """Give back all blocks; what was published of them may be found again."""
        self._leaders.discard(seq, seq.block_keys)
        self.pool.trim(seq, 0)
        seq.num_computed = seq.drafter_computed = seq.num_published = seq.num_drafter_marked = 0

    def _retire(self, seq: Sequence) -> None:
        self._release(seq)
        self.policy.forget(seq)
        choices = self._by_request[seq.request.id]
        del choices[seq.choice.index]
        if not choices:
            del self._by_request[seq.request.id]

    def check(self) -> None:
        """Raise AssertionError unless the bookkeeping is consistent; for tests and for an idle engine."""
        live = [*self.running, *self.waiting]
        self.pool.check(live)
        for seqs in (self.running, self.waiting):
            assert seqs == sorted(seqs, key=_priority), "the order of priority is broken"
        assert not any(seq.block_table or seq.num_computed for seq in self.waiting), "a waiting sequence holds blocks"
        assert {seq for choices in self._by_request.values() for seq in choices.values()} == set(live), "a sequence is lost"
        assert set(self._leaders.by_key.values()) <= set(self.running), "a block is awaited from a sequence that does not run"
        for seq in self.running:
            awaited = {key for key, leader in self._leaders.by_key.items() if leader is seq}
            assert awaited.isdisjoint(seq.block_keys[: seq.num_published]), "a block is awaited that was published"
            assert seq.drafter_computed <= seq.num_computed < len(seq.tokens), "a watermark is off"
            assert len(seq.block_table) >= self.pool.blocks_for(seq.num_computed), "KV without a block"
            assert not seq.is_scoring or seq.num_computed < seq.num_scored, "a row of a prompt is lost"


def _priority(seq: Sequence) -> int:
    return seq.request.priority
