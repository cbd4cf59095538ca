"""An engine without a model, for tests of the server: says what a script tells it to, when it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from engine.client import Health
from engine.errors import EngineDead, EngineError
from engine.request import FinishReason, Request, Round, TokenDelta, TokenLogprobs
from engine.sched.admission import Admission
from engine.stats import EngineInfo, StepStats
from engine.streams import DeltaStream


def made_up_logprobs(token_ids: Sequence[int], num: int | None) -> tuple[TokenLogprobs, ...]:
    """That of a token is minus its id; the likeliest are those behind it."""
    if num is None:
        return ()
    return tuple(TokenLogprobs(-float(token), tuple((token + 1 + k, -float(k)) for k in range(num))) for token in token_ids)


def make_info(target_path: str = "", **changes: object) -> EngineInfo:
    """What a small engine would say of itself."""
    values: dict[str, object] = {
        "incarnation": "fake-1",
        "target": "some/where/tiny-target",
        "drafter": "model:some/where/tiny drafter",
        "target_path": target_path,
        "device": "cpu",
        "dtype": "float32",
        "vocab_size": 1024,
        "max_model_len": 512,
        "end_token_ids": (),
        "has_grammars": True,
        "rules": ("exact",),
        "max_draft": 4,
        "max_sequences": 8,
        "num_blocks": 64,
        "block_size": 16,
        "weight_bytes": 1,
        "kv_bytes": 1,
    }
    return EngineInfo(**(values | changes))  # type: ignore[arg-type]


@dataclass(frozen=True)
class Part:
    """One delta of a scripted answer."""

    token_ids: tuple[int, ...]
    round: Round | None = None
    num_target_calls: int = 0
    num_drafter_calls: int = 0
    drafted_mask: int = 0


@dataclass
class Script:
    """How the engine answers. Every choice of every request is answered alike."""

    parts: Sequence[Part] | None = None  # None: the prompt's tokens, one a step
    finish: FinishReason = FinishReason.LENGTH
    delay: float = 0.0  # seconds a step
    at_once: bool = False  # all deltas wait before the consumer sees the first
    dies_after: int | None = None  # steps
    refusal: EngineError | None = None  # raised by submit
    num_cached_tokens: int = 0
    endless: bool = False  # the parts again and again
    by_choice: Sequence[tuple[int, ...]] | None = None  # instead of parts: all tokens of each choice, in one step
    hold: asyncio.Event | None = None  # nothing is said before this is set


@dataclass
class FakeEngine:
    """Implements EngineClient on the event loop of the test."""

    given_info: EngineInfo
    script: Script = field(default_factory=Script)
    max_queued: int = 256

    def __post_init__(self) -> None:
        self.health = Health(True, False, "the model is being loaded")
        self.is_started = False
        self.is_closed = False
        self.requests: list[Request] = []
        self.aborted: list[tuple[str, int]] = []
        self.streams: dict[str, DeltaStream] = {}
        self.callbacks: list[Callable[[StepStats], None]] = []
        self.loss_callbacks: list[Callable[[bool], None]] = []
        self.num_steps = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def info(self) -> EngineInfo:
        if not self.is_started:
            raise EngineDead("The engine is not started.")
        return self.given_info

    async def start(self) -> None:
        assert not self.is_started
        self.is_started = True
        self.health = Health(True, True)

    def submit(self, request: Request) -> DeltaStream:
        if self.script.refusal is not None:
            raise self.script.refusal
        Admission(self.info, self.max_queued).check(request, sum(len(s.open_choices) for s in self.streams.values()))
        self.requests.append(request)
        stream = DeltaStream(request, self._abort)
        self.streams[request.id] = stream
        task = asyncio.ensure_future(self._answer(request, stream, self.script))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return stream

    def on_step(self, callback: Callable[[StepStats], None]) -> None:
        self.callbacks.append(callback)

    def on_loss(self, callback: Callable[[bool], None]) -> None:
        self.loss_callbacks.append(callback)

    async def close(self) -> None:
        self.is_closed = True
        self.die("The engine was closed.")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def die(self, reason: str) -> None:
        """Fail all that is open, as an engine does."""
        self.health = Health(False, False, reason)
        for stream in self.streams.values():
            stream.fail(EngineDead(reason))
        self.streams.clear()

    def _abort(self, request_id: str, choice: int) -> None:
        self.aborted.append((request_id, choice))
        stream = self.streams.get(request_id)
        if stream is not None and not stream.open_choices:
            del self.streams[request_id]

    async def _answer(self, request: Request, stream: DeltaStream, script: Script) -> None:
        if script.hold is not None:
            await script.hold.wait()
        parts = list(script.parts) if script.parts is not None else [Part((token,)) for token in request.prompt_ids]
        for score in made_up_logprobs(request.prompt_ids[1:], request.sampling.num_prompt_logprobs):  # a step each
            delta = TokenDelta(request_id=request.id, choice=request.choices[0].index, token_ids=(), prompt_logprobs=(score,))
            stream.deliver(delta)
            if not script.at_once:
                await asyncio.sleep(script.delay)
        num_left = request.sampling.max_tokens
        while True:  # of 0 tokens there is a last one, too
            for i, part in enumerate(parts):
                if script.dies_after is not None and self.num_steps >= script.dies_after:
                    self.die("The engine stopped at an internal error.")
                if not stream.open_choices or request.id not in self.streams:
                    return
                part = replace(part, token_ids=part.token_ids[:num_left])
                num_left -= len(part.token_ids)
                is_last = not num_left or (i == len(parts) - 1 and not script.endless)
                await self._step(request, stream, part, script, is_last)
                if is_last:
                    self.streams.pop(request.id, None)
                    return

    async def _step(self, request: Request, stream: DeltaStream, part: Part, script: Script, is_last: bool) -> None:
        if not script.at_once:
            await asyncio.sleep(script.delay)
        self.num_steps += 1
        for choice in request.choices:
            token_ids = part.token_ids if script.by_choice is None else script.by_choice[choice.index]
            delta = TokenDelta(
                request_id=request.id,
                choice=choice.index,
                token_ids=token_ids,
                finish_reason=script.finish if is_last else None,
                round=part.round,
                logprobs=made_up_logprobs(token_ids, request.sampling.num_logprobs),
                drafted_mask=part.drafted_mask,
                num_cached_tokens=script.num_cached_tokens,
                queue_seconds=0.002,
                num_target_calls=part.num_target_calls,
                num_drafter_calls=part.num_drafter_calls,
            )
            stream.deliver(delta)
        stats = StepStats(
            step_seconds=0.004,
            num_running=1,
            num_waiting=0,
            num_blocks=64,
            num_used_blocks=3,
            num_target_tokens=5,
            num_emitted_tokens=len(part.token_ids),
            num_preemptions=0,
            num_prefix_queried_tokens=10 if self.num_steps == 1 else 0,
            num_prefix_hit_tokens=4 if self.num_steps == 1 else 0,
            schedule_seconds=0.0005,
            draft_seconds=0.001,
            verify_seconds=0.0025,
            wait_seconds=0.25,
            undrafted_seconds=0.006,
            num_sequences=1,
            num_draft_tokens=part.round.num_draft if part.round else 0,
            num_accepted_tokens=part.round.num_accepted if part.round else 0,
            draft_lengths=(0,) * part.round.num_draft + (1,) if part.round else (1,),
            num_cached_blocks=5,
        )
        for callback in self.callbacks:
            callback(stats)
