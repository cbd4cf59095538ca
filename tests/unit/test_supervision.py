"""What is decided about a lost engine: back-off, budget, suspects, and how errors and frames travel. No process is started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from engine.config import MOST_DRAFTS, FixedLengthConfig
from engine.errors import ContextLengthExceeded, CrashingRequest, EngineDead, EngineError, InvalidRequest, QueueFull, SourceError
from engine.request import Choice, FinishReason, Request, SamplingParams, TokenDelta
from engine.stats import StepOutput, StepStats
from engine.streams import OpenRequests
from engine.supervision import RestartBudget, Supervision, Suspects
from engine.wire import Add, Failed, Heartbeat, Stepped, decode_command, decode_report, encode
from tests.unit.factories import make_request
from tests.unit.test_admission import INFO


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_restarts_wait_twice_as_long_each_time_and_earlier_ones_expire() -> None:
    clock = Clock()
    budget = RestartBudget(Supervision(max_restarts=6, window_seconds=100, max_backoff_seconds=20), clock)
    assert [budget.take() for _ in range(8)] == [1, 2, 4, 8, 16, 20, None, None]
    clock.now = 99
    assert budget.take() is None
    clock.now = 101
    assert budget.take() == 1


def lose(suspects: Suspects, request: Request, times: int) -> None:
    for _ in range(times):
        suspects.accuse([request, request])  # two equal ones at one loss are one


def test_a_request_is_refused_after_three_losses() -> None:
    suspects = Suspects(Supervision())
    lose(suspects, make_request(id="a"), 2)
    suspects.check(make_request(id="b"))
    lose(suspects, make_request(id="c"), 1)
    with pytest.raises(CrashingRequest, match="failed 3 times while it ran a request equal to this one"):
        suspects.check(make_request(id="d"))
    suspects.check(make_request(prompt=(1, 2)))
    suspects.check(make_request(max_tokens=5))


@pytest.mark.parametrize(
    "what", [{"grammar": "a"}, {"prediction_ids": (1,)}, {"choices": (Choice(0), Choice(1))}, {"cache_salt": "a"}], ids=str
)
def test_all_that_shapes_an_answer_and_a_salt_make_it_another_request(what: dict[str, Any]) -> None:
    suspects, plain = Suspects(Supervision(max_losses=1)), make_request()
    crashing = msgspec.structs.replace(plain, **what)
    suspects.accuse([crashing])
    suspects.check(plain)
    suspects.acquit(plain)
    with pytest.raises(CrashingRequest):
        suspects.check(msgspec.structs.replace(crashing, id="again", priority=3, arrived_at=7.0))


def test_a_seed_counts_only_where_it_was_given() -> None:
    def seeded(seed: int, is_seeded: bool) -> Request:
        return msgspec.structs.replace(make_request(), sampling=SamplingParams(max_tokens=4, seed=seed, is_seeded=is_seeded))

    suspects = Suspects(Supervision(max_losses=1))
    suspects.accuse([seeded(1, False), seeded(3, True)])
    with pytest.raises(CrashingRequest):
        suspects.check(seeded(2, False))
    with pytest.raises(CrashingRequest):
        suspects.check(seeded(3, True))
    suspects.check(seeded(4, True))


def test_suspicion_ends_when_the_request_does_or_with_time() -> None:
    clock = Clock()
    suspects = Suspects(Supervision(suspicion_seconds=100), clock)
    lose(suspects, make_request(), 2)
    suspects.acquit(make_request(id="equal"))
    lose(suspects, make_request(), 2)
    suspects.check(make_request())
    lose(suspects, make_request(), 1)
    clock.now = 101
    suspects.check(make_request())
    lose(suspects, make_request(), 2)
    suspects.check(make_request())


def test_suspects_are_bounded() -> None:
    suspects = Suspects(Supervision(max_suspects=3, max_losses=1))
    suspects.accuse([make_request(prompt=(0,))])
    suspects.accuse(make_request(prompt=(i,)) for i in range(1, 4))
    suspects.check(make_request(prompt=(0,)))
    with pytest.raises(CrashingRequest):
        suspects.check(make_request(prompt=(3,)))
    assert len(suspects._found) == 3


def test_the_longest_round_fits_a_frame() -> None:
    """All drafts stand, and the bonus is the drafter's word, too."""
    longest = FixedLengthConfig(max=MOST_DRAFTS)
    delta = TokenDelta(request_id="a", choice=0, token_ids=(1,) * (longest.max + 1), drafted_mask=(1 << longest.max + 1) - 1)
    stats = StepStats(**dict.fromkeys(StepStats.__struct_fields__, 0) | {"draft_lengths": ()})  # type: ignore[arg-type]
    frame = Stepped(incarnation="i", output=StepOutput(deltas=(delta,), stats=stats))
    assert decode_report(encode(frame)) == frame


async def test_those_that_a_pass_was_begun_for_may_be_running() -> None:
    """Also where they were given up since; not where they are at their end, or where they only wait."""
    requests = OpenRequests(10, lambda request: None, lambda request_id, choice: None)
    requests.admit_to(INFO)

    def running() -> list[str]:
        return [request.id for request in requests.may_be_running()]

    streams = {name: requests.open(make_request(id=name, num_choices=num)) for name, num in (("a", 1), ("b", 2), ("c", 1), ("d", 1))}
    assert running() == []
    requests.note_running(("b", "c"))
    assert running() == ["b", "c"]
    requests.deliver([TokenDelta(request_id="c", choice=0, token_ids=(), finish_reason=FinishReason.STOP)])
    streams["b"].abort(0)
    streams["b"].abort(1)
    streams["d"].abort(0)
    assert running() == ["b"]
    requests.note_running(("a", "d"))
    assert running() == ["a", "d"], "it was given up when its pass was about to begin"
    requests.note_running(())
    assert running() == []


async def test_a_stream_of_a_lost_engine_aborts_nothing_in_the_next_one() -> None:
    aborted: list[tuple[str, int]] = []
    requests = OpenRequests(10, lambda request: None, lambda request_id, choice: aborted.append((request_id, choice)))
    requests.admit_to(INFO)
    lost = requests.open(make_request(id="a"))
    requests.fail(EngineDead("lost"))
    requests.open(make_request(id="a"))
    lost.abort(0)
    assert (aborted, len(requests)) == ([], 1)


@pytest.mark.parametrize(
    "error",
    [SourceError("no such model"), ContextLengthExceeded(5, 6, 7), QueueFull(3, 9), InvalidRequest("no", "n"), EngineDead("dead")],
    ids=lambda error: type(error).__name__,
)
def test_an_error_travels_with_class_message_and_attributes(error: EngineError) -> None:
    frame = decode_report(encode(Failed.of("i", error)))
    assert isinstance(frame, Failed)
    again = frame.error()
    assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_an_error_of_another_module_travels_as_the_nearest_known_class() -> None:
    class Gone(SourceError):
        """Known here only."""

    again = Failed.of("i", Gone("no weights")).error()
    assert (type(again), str(again)) == (SourceError, "no weights")
    gone = Gone("no weights")
    gone.path = Path("/models")  # type: ignore[attr-defined]
    frame = decode_report(encode(Failed.of("i", gone)))
    assert isinstance(frame, Failed)
    assert vars(frame.error()) == {"path": "/models"}
    odd = Failed(incarnation="i", kind="annotations", message="?", attributes={}).error()
    assert isinstance(odd, EngineDead)


def test_frames_are_told_apart_by_their_class() -> None:
    add = Add(incarnation="i", request=make_request())
    assert decode_command(encode(add)) == add
    assert decode_report(encode(Heartbeat(incarnation="i"))) == Heartbeat(incarnation="i")
    with pytest.raises(msgspec.ValidationError):
        decode_command(encode(Heartbeat(incarnation="i")))
