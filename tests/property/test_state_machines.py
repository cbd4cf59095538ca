"""Random operations on pool and scheduler; the invariants hold after each."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.draft.length import HeuristicLength
from engine.kv.block_pool import BlockPool
from engine.plan import StepPlan, Verdict
from engine.request import Choice, FinishReason, Request, SamplingParams, SpeculationParams
from engine.sched.scheduler import Limits, Scheduler
from engine.sequence import Sequence
from tests.unit.factories import make_drafts, make_scores, make_sequence

TOKENS = st.integers(0, 2)  # few, so that prefixes are shared
PRIORITIES = st.sampled_from([0, 0, 0, -1, 1])


class PoolMachine(RuleBasedStateMachine):
    """Sequences grow, compute, publish, trim and share."""

    def __init__(self) -> None:
        super().__init__()
        self.live: list[Sequence] = []

    @initialize(num_blocks=st.integers(1, 12), block_size=st.integers(1, 4))
    def make(self, num_blocks: int, block_size: int) -> None:
        self.pool = BlockPool(num_blocks, block_size)

    @rule(tokens=st.lists(TOKENS, min_size=1, max_size=12))
    def start(self, tokens: list[int]) -> None:
        seq = make_sequence(tuple(tokens))
        hit = self.pool.match(seq)
        assert len(hit) * self.pool.block_size < len(tokens)
        self.pool.share(seq, hit)
        seq.num_computed = len(hit) * self.pool.block_size
        seq.num_published = len(hit)
        self.live.append(seq)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), num=st.integers(0, 12))
    def compute(self, data: st.DataObject, num: int) -> None:
        seq = data.draw(st.sampled_from(self.live))
        end = min(len(seq.tokens), seq.num_computed + num)
        before = list(seq.block_table)
        if self.pool.grow(seq, end):
            seq.num_computed = end
            self.pool.publish(seq)
        else:
            assert seq.block_table == before

    @precondition(lambda self: self.live)
    @rule(data=st.data())
    def stop(self, data: st.DataObject) -> None:
        seq = data.draw(st.sampled_from(self.live))
        self.live.remove(seq)
        self.pool.trim(seq, 0)

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check(self.live)


class SchedulerMachine(RuleBasedStateMachine):
    """Requests are added, aborted, and stepped with random verdicts, a drafter that lags at random, and random stops. Some have their
    prompts scored: all of them, in order, once, and before any choice has a token."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.emitted: dict[tuple[str, int], list[int]] = {}
        self.limit: dict[tuple[str, int], int] = {}
        self.told: dict[str, list[float]] = {}  # positions of each prompt
        self.to_tell: dict[str, int] = {}

    @initialize(num_blocks=st.integers(6, 24), block_size=st.integers(1, 4), max_sequences=st.integers(1, 5), budget=st.integers(1, 20))
    def make(self, num_blocks: int, block_size: int, max_sequences: int, budget: int) -> None:
        self.capacity = num_blocks * block_size
        self.scheduler = Scheduler(BlockPool(num_blocks, block_size), Limits(max_sequences, budget), HeuristicLength(2, 5))
        self.budget = budget

    @rule(
        tokens=st.lists(TOKENS, min_size=1, max_size=14),
        max_tokens=st.integers(0, 8),
        n=st.integers(1, 3),
        enabled=st.booleans(),
        priority=PRIORITIES,
        scores=st.booleans(),
    )
    def add(self, tokens: list[int], max_tokens: int, n: int, enabled: bool, priority: int, scores: bool) -> None:
        if len(tokens) + max_tokens > self.capacity:
            return
        self.count += 1
        request = Request(
            id=f"r{self.count}",
            prompt_ids=tuple(tokens),
            sampling=SamplingParams(max_tokens=max_tokens, stop_token_ids=(2,), num_prompt_logprobs=0 if scores else None),
            speculation=SpeculationParams(enabled=enabled),
            choices=tuple(Choice(i) for i in range(n)),
            priority=priority,
        )
        self.scheduler.add(request)
        self.told[request.id], self.to_tell[request.id] = [], len(tokens) if scores else 0
        for i in range(n):
            self.emitted[request.id, i], self.limit[request.id, i] = [], max_tokens

    @precondition(lambda self: self.limit)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.limit)))
        assert self.scheduler.abort(*key) is not None
        del self.limit[key]
        if key[1] == 0:
            self.to_tell[key[0]] = 0  # with the first choice the scores have gone
        assert self.scheduler.abort(*key) is None

    @rule(data=st.data())
    def step(self, data: st.DataObject) -> None:
        oldest = self.scheduler.running[:1]
        before = self.scheduler.running.copy()
        plan = self.scheduler.schedule()
        assert sum(c.num_tokens + c.max_draft for c in plan.chunks) <= self.budget
        assert not oldest or plan.chunks[0].seq is oldest[0], "the oldest comes first"
        self._check_order(before)
        assert bool(plan.chunks) == self.scheduler.has_work, "there is work, and nobody may run"
        for chunk in plan.chunks:
            assert chunk.num_tokens >= 1
            assert chunk.max_draft == 0 or (chunk.completes and chunk.seq.request.speculation.enabled)
        lagging = [c.completes and data.draw(st.booleans()) for c in plan.chunks]
        lengths = [data.draw(st.integers(0, c.max_draft)) for c, lag in zip(plan.chunks, lagging, strict=True) if c.completes and not lag]
        plan = plan.held_back(lagging)
        ends = [c.seq.num_computed + c.num_tokens for c in plan.chunks]
        marks = [data.draw(st.integers(c.seq.drafter_computed, end)) for c, end in zip(plan.chunks, ends, strict=True)]
        self._commit(data, plan, lengths, marks)

    @rule()
    def run_out_of_memory(self) -> None:
        """A plan that is not run: everybody stays, and the next one is smaller, until an answer cannot be run alone."""
        plan = self.scheduler.schedule()
        if not plan.chunks:
            return
        num_planned = sum(c.num_tokens + c.max_draft for c in plan.chunks)
        if self.scheduler.take_back(plan):
            assert self.scheduler.max_step_tokens <= max(1, num_planned // 2)
            return
        assert num_planned == 1
        delta = self.scheduler.give_up(plan.chunks[0].seq)
        assert (delta.token_ids, delta.finish_reason) == ((), FinishReason.MEMORY)
        del self.limit[delta.request_id, delta.choice]

    def _check_order(self, before: list[Sequence]) -> None:
        """Who stayed is in front of whoever was preempted, in the order of before; who came in stands behind its equals."""
        priorities = [seq.request.priority for seq in self.scheduler.running]
        assert priorities == sorted(priorities)
        stayed = [seq for seq in before if seq in self.scheduler.running]
        assert stayed == before[: len(stayed)], "a more important or an older one was preempted"
        for seq in self.scheduler.running:
            equals = [other for other in self.scheduler.running if other.request.priority == seq.request.priority]
            assert equals == sorted(equals, key=lambda other: other not in stayed)

    def _commit(self, data: st.DataObject, plan: StepPlan, lengths: list[int], marks: list[int]) -> None:
        accepted = [data.draw(st.integers(0, n)) for n in lengths]
        ids = tuple(tuple(data.draw(TOKENS) for _ in range(m + 1)) for m in accepted)
        verdict = Verdict(ids, tuple(accepted), (0,) * len(ids), (0,) * len(ids), (False,) * len(ids))
        for delta in self.scheduler.commit(plan, make_drafts(plan, lengths, marks), verdict, make_scores(plan)):
            key = delta.request_id, delta.choice
            if delta.prompt_logprobs:
                told = self.told[delta.request_id]
                told += [token.logprob for token in delta.prompt_logprobs]
                assert told == list(range(1, len(told) + 1))
                continue
            assert len(self.told[delta.request_id]) >= self.to_tell[delta.request_id] - 1, "an answer began before its prompt was scored"
            self.emitted[key] += delta.token_ids
            assert len(self.emitted[key]) <= self.limit[key]
            assert 2 not in self.emitted[key][:-1], "nothing is emitted behind a stop token"
            is_over = self.emitted[key][-1:] == [2] or len(self.emitted[key]) == self.limit[key]
            assert (delta.finish_reason is not None) == is_over
            if is_over:
                del self.limit[key]

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check()
            assert {(s.request.id, s.choice.index) for s in (*self.scheduler.running, *self.scheduler.waiting)} == set(self.limit)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
