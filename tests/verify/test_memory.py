"""Memory that runs out in a step: it is tried with less, what cannot be run alone is given up, and everybody else's text stays.

The fake is a model whose pass says what torch says when a device has no room, whenever the test wants it to.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import msgspec
import pytest

from engine.client import EngineClient, ThreadClient
from engine.config import FixedLengthConfig
from engine.core import EngineCore
from engine.model.paged import PagedModel
from engine.process import ProcessClient
from engine.request import FinishReason, Request, SamplingParams
from engine.sched.bound import StepBound
from tests.process.fake import make_config
from tests.process.memory import FACTORY, HUNGRY, Wall, drafter_of, narrow, target_of
from tests.reference import answer
from tests.tiny import Setup, drive, make_core, naive_drafter, naive_target
from tests.verify.requests import greedy, seeded

SETUP = Setup(drafter="model", policy=FixedLengthConfig(max=3), num_blocks=80)
Answers = dict[tuple[str, int], tuple[int, ...]]


def requests(num: int, suffix: str = "") -> list[Request]:
    """Whose tokens are not HUNGRY, and neither are those of their answers."""
    return [msgspec.structs.replace(request, id=request.id + suffix) for request in greedy(num)]


def expected(asked: list[Request]) -> Answers:
    return {(r.id, 0): answer(r, naive_target(), naive_drafter() if r.sampling.is_seeded else None) for r in asked}


@pytest.mark.parametrize("whose", [target_of, drafter_of])
def test_a_step_is_tried_with_less_and_texts_stay(whose: Callable[[EngineCore], PagedModel]) -> None:
    core, asked = make_core(SETUP), requests(8)
    wall = Wall(lambda _, ids: len(ids) > 7)
    wall.in_front_of(whose(core))
    assert drive(core, asked).tokens == expected(asked)
    assert 0 < wall.num_refused < wall.num_passes / 2, "what was too much is not tried again in every step"


@pytest.mark.parametrize("every", [2, 3, 7])
@pytest.mark.parametrize("num_blocks", [13, 80])
def test_now_and_then_is_survived(every: int, num_blocks: int) -> None:
    core, asked = make_core(replace(SETUP, num_blocks=num_blocks)), requests(8)
    wall = Wall(lambda number, ids: number % every == 0 and len(ids) > 1)
    wall.in_front_of(target_of(core))
    assert drive(core, asked).tokens == expected(asked)
    assert wall.num_refused


def test_seeded_answers_keep_their_text_where_memory_is_short() -> None:
    core, asked = make_core(SETUP), seeded()
    Wall(lambda _, ids: len(ids) > 9).in_front_of(target_of(core))
    Wall(lambda number, ids: len(ids) > 5 and number % 3 == 0).in_front_of(drafter_of(core))
    assert drive(core, asked).tokens == expected(asked)


def test_what_cannot_be_run_alone_is_given_up_and_all_others_go_on() -> None:
    core, asked = narrow(), [*requests(3), hungry(), *requests(3, "-later")]
    reasons, tokens = dict[str, FinishReason | None](), defaultdict[tuple[str, int], tuple[int, ...]](tuple)
    for request in asked:
        core.add(request)
    while core.has_work:
        for delta in core.step().deltas:
            tokens[delta.request_id, 0] += delta.token_ids
            reasons[delta.request_id] = delta.finish_reason
        core.check()
    assert core._parts.scheduler.pool.num_used == 0, "no block is lost"
    assert (reasons.pop("hungry"), tokens.pop(("hungry", 0))) == (FinishReason.MEMORY, ())
    assert set(reasons.values()) <= {FinishReason.STOP, FinishReason.LENGTH}
    assert tokens == expected([request for request in asked if request.id != "hungry"])


def test_what_is_kept_for_the_next_step_is_given_up_before_the_next_try() -> None:
    core, asked = make_core(SETUP), requests(2)
    models, sizes = (target_of(core), drafter_of(core)), list[list[int]]()

    def note(is_due: bool) -> None:
        if is_due:
            sizes.append([model._cache._read.shape[0] for model in models])

    def refuses(number: int, _: object) -> bool:
        note(number == 4)
        return number == 4

    def looks(*_: object) -> bool:  # the first pass of the next try is the drafter's
        note(len(sizes) == 1)
        return False

    Wall(refuses).in_front_of(models[0])
    Wall(looks).in_front_of(models[1])
    assert drive(core, asked).tokens == expected(asked)
    before, after = sizes
    assert all(size > 0 for size in before)
    assert after == [0, 0]


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: out of memory",
        "CUDA driver error: out of memory",
        "Triton Error [CUDA]: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED when",
        "DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_what_libraries_say_of_it_counts_as_well(text: str) -> None:
    core, asked = make_core(SETUP), requests(2)
    Wall(lambda number, _: number == 3, lambda: RuntimeError(f"[x] {text}")).in_front_of(target_of(core))
    assert drive(core, asked).tokens == expected(asked)


def test_any_other_error_is_still_the_engines_end() -> None:
    core = make_core(SETUP)
    Wall(lambda *_: True, lambda: RuntimeError("a bug")).in_front_of(target_of(core))
    core.add(requests(1)[0])
    with pytest.raises(RuntimeError, match="a bug"):
        core.step()


def test_more_is_tried_again_later_and_less_often_where_that_was_in_vain() -> None:
    bound = StepBound()

    def steps_until(more_than: float) -> int:
        num = 0
        while bound.now <= more_than:
            bound.note_good(int(min(bound.now, 64)), 64)
            num += 1
        return num

    assert bound.shrink(40)
    assert bound.now == 20
    first = steps_until(20)
    assert bound.now == 40
    assert bound.shrink(40)
    assert steps_until(20) == 2 * first
    steps_until(1e9)
    assert bound.shrink(1)
    assert bound.now == 1
    assert not bound.shrink(1), "there is nothing less than a token"


def test_the_halvings_of_one_descent_cost_no_patience() -> None:
    bound, limit, num = StepBound(), 256, 0
    tried = limit
    while bound.shrink(tried):
        tried = int(bound.now)
    assert bound.now == 1
    while bound.now < limit:
        bound.note_good(int(bound.now), limit)
        num += 1
    assert num <= 8 * 8, "eight doublings, each as soon as at first"


@pytest.mark.parametrize("wall", [256, 100])
def test_a_wall_is_met_ever_more_seldom(wall: int) -> None:
    """Also where only the deployment's own limit is too much."""
    bound, limit, num_failed = StepBound(), 256, 0
    for _ in range(2000):
        tried = int(min(bound.now, limit))
        if tried >= wall:
            assert bound.shrink(tried)
            num_failed += 1
        else:
            bound.note_good(tried, limit)
    assert num_failed < 12


def test_small_steps_do_not_prove_that_large_ones_fit() -> None:
    bound = StepBound()
    assert bound.shrink(200)
    for _ in range(1000):
        bound.note_good(3, 256)
    assert bound.now == 100


def test_what_memory_was_like_is_forgotten_in_the_end() -> None:
    bound, limit = StepBound(), 256

    def steps_until_all() -> int:
        num = 0
        while bound.now < limit:
            bound.note_good(int(bound.now), limit)
            num += 1
        return num

    bound.shrink(limit)
    first = steps_until_all()
    bound.shrink(limit)
    assert steps_until_all() == 2 * first
    for _ in range(1000):
        bound.note_good(limit, limit)
    bound.shrink(limit)
    assert steps_until_all() == first


# ---------------------------------------------------------------------- behind the clients
def hungry() -> Request:
    """A request of which no token can be run."""
    return Request(id="hungry", prompt_ids=(HUNGRY,) * 9, sampling=SamplingParams(max_tokens=6, temperature=0.0))


async def outcome_of(client: EngineClient, asked: list[Request]) -> tuple[Answers, dict[str, FinishReason | None]]:
    tokens, reasons = defaultdict[tuple[str, int], tuple[int, ...]](tuple), dict[str, FinishReason | None]()
    for stream in [client.submit(request) for request in asked]:
        async for deltas in stream:
            for delta in deltas:
                tokens[delta.request_id, delta.choice] += delta.token_ids
                reasons[delta.request_id] = delta.finish_reason
    return dict(tokens), reasons


@pytest.mark.parametrize(
    "make", [lambda: ThreadClient(narrow), lambda: ProcessClient(make_config(), factory=FACTORY)], ids=["thread", "process"]
)
async def test_an_engine_goes_on_and_is_not_restarted(make: Callable[[], EngineClient]) -> None:
    client = make()
    await client.start()
    incarnation = client.info.incarnation
    for suffix in ("", "-again"):
        others = requests(4, suffix)
        tokens, reasons = await outcome_of(client, [*others[:2], hungry(), *others[2:]])
        assert (reasons["hungry"], tokens.pop(("hungry", 0))) == (FinishReason.MEMORY, ())
        assert tokens == expected(others)
    assert (client.info.incarnation, client.health.is_ready) == (incarnation, True)
    await client.close()
