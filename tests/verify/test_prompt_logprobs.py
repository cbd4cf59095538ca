"""Log-probabilities of prompts are those of the naive loop, to 1e-9, whatever the steps were like; and the answers stay what they were."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import msgspec
import pytest

from engine.config import AdaptiveLengthConfig, FixedLengthConfig
from engine.model.runner import ModelRunner, Passed
from engine.request import Choice, Request, TokenLogprobs
from engine.sched.scheduler import Scheduler
from engine.sequence import Sequence
from tests.reference import answer, softmax
from tests.tiny import Setup, drive, make_core, naive_drafter, naive_target
from tests.verify.requests import guided, mask_of, prompt, seeded

SETUPS = {
    "model": Setup(drafter="model"),
    "model, lagging": Setup(drafter="model", max_drafter_tokens=3),
    "model, adaptive": Setup(drafter="model", policy=AdaptiveLengthConfig(max=5)),
    "model, block": Setup(drafter="model", verification="block", policy=FixedLengthConfig(max=0)),
    "ngram": Setup(drafter="ngram"),
    "none": Setup(drafter="none"),
}


def scoring(request: Request, num: int | None, **sampling: Any) -> Request:
    return msgspec.structs.replace(
        request, sampling=msgspec.structs.replace(request.sampling, num_prompt_logprobs=num, num_logprobs=num, **sampling)
    )


def asked(setup: Setup) -> list[Request]:
    """Every rule and wish; of every four one is not scored, and one has its prompt scored alone. Many share their prompts' heads."""
    requests = [r for r in guided(seeded()) if setup.drafter == "model" or not r.speculation.rule.startswith("token_")]
    scored = [scoring(request, (None, 0, 3, 1)[i % 4]) for i, request in enumerate(requests)]
    return [scoring(r, 2, max_tokens=0, min_tokens=0) if i % 4 == 3 and r.grammar is None else r for i, r in enumerate(scored)]


def check_scores(request: Request, found: tuple[TokenLogprobs, ...]) -> None:
    num, ids = request.sampling.num_prompt_logprobs, request.prompt_ids
    assert len(found) == (0 if num is None else len(ids) - 1), request.id
    for i, token in enumerate(found, 1):
        row = [math.log(x) for x in softmax(naive_target().logits(list(ids[:i])))]
        assert token.logprob == pytest.approx(row[ids[i]], abs=1e-9)
        likeliest = sorted(range(len(row)), key=lambda t: -row[t])[:num]
        assert [t for t, _ in token.top] == likeliest
        assert [x for _, x in token.top] == pytest.approx([row[t] for t in likeliest], abs=1e-9)


@pytest.mark.parametrize("name", SETUPS)
def test_prompts_are_scored_at_any_chunk_size_and_pool(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = SETUPS[name]
    requests, cut = asked(base), list[int]()
    drafter = naive_drafter() if base.drafter == "model" else None
    want = {(r.id, 0): answer(r, naive_target(), drafter, mask=mask_of(r)) for r in requests}
    release = Scheduler._release

    def noted(scheduler: Scheduler, seq: Sequence) -> None:
        if seq.is_scoring and seq.num_scored > 1 and seq.num_computed:
            cut.append(seq.num_scored)
        release(scheduler, seq)

    monkeypatch.setattr(Scheduler, "_release", noted)
    for i, ((num_blocks, block_size), budget) in enumerate(itertools.product(((13, 2), (7, 4), (200, 4)), (3, 7, 64))):
        setup = replace(base, num_blocks=num_blocks, block_size=block_size, max_step_tokens=budget, max_sequences=(8, 3)[i % 2])
        outcome = drive(make_core(setup), requests)
        if base.verification == "token":  # block verification has its law, and no promise of text
            assert outcome.tokens == want, setup
        for request in requests:
            check_scores(request, outcome.prompt_logprobs[request.id])
            assert len(outcome.logprobs[request.id, 0]) == (
                len(outcome.tokens[request.id, 0]) if request.sampling.num_logprobs is not None else 0
            )
    assert cut, "nothing was preempted in the middle of a prompt"


def test_what_is_cached_is_computed_anew_for_its_scores_and_serves_others() -> None:
    core, plain = make_core(Setup()), seeded()[0]
    hits = []
    for i, num in enumerate((None, 1, None, 0)):
        request = msgspec.structs.replace(scoring(plain, num), id=f"r{i}")
        outcome = drive(core, [request])
        check_scores(request, outcome.prompt_logprobs[request.id])
        hits.append(sum(step.num_prefix_hit_tokens for step in outcome.steps))
    assert hits[0] == hits[1] == hits[3] == 0
    assert hits[2] > 0


def test_a_prompt_is_scored_once_for_all_choices() -> None:
    base = scoring(seeded()[0], 2)
    request = msgspec.structs.replace(base, prompt_ids=prompt(4), choices=tuple(Choice(i) for i in (2, 0, 1)))
    for max_tokens, budget in itertools.product((0, 6), (3, 64)):
        asked = scoring(request, 2, max_tokens=max_tokens, min_tokens=0)
        outcome = drive(make_core(Setup(max_step_tokens=budget)), [asked])
        check_scores(asked, outcome.prompt_logprobs[asked.id])
        assert outcome.tokens == {(asked.id, i): answer(asked, naive_target(), naive_drafter(), choice=i) for i in range(3)}
        shared = (len(asked.prompt_ids) - 1) // 4 * 4
        assert sum(step.num_prefix_hit_tokens for step in outcome.steps) == 2 * shared, "the others reuse what the first computed"


def test_a_prompt_of_one_token_has_nothing_to_score() -> None:
    request = msgspec.structs.replace(scoring(seeded()[0], 1, max_tokens=0), prompt_ids=(3,))
    outcome = drive(make_core(Setup()), [request])
    assert outcome.tokens == {(request.id, 0): ()}
    assert not outcome.prompt_logprobs


def test_no_more_rows_are_there_at_once_than_a_step_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, forward = list[int](), ModelRunner.forward

    def noted(runner: ModelRunner, *args: Any) -> Passed:
        passed = forward(runner, *args)
        sizes.append(len(passed.logits))
        return passed

    monkeypatch.setattr(ModelRunner, "forward", noted)
    request = msgspec.structs.replace(scoring(seeded()[0], 1, max_tokens=0), prompt_ids=prompt(1) * 5)
    check_scores(request, drive(make_core(Setup(max_step_tokens=7)), [request]).prompt_logprobs[request.id])
    assert max(sizes) == 7
    sizes.clear()
    drive(make_core(Setup(max_step_tokens=7)), [scoring(request, None)])
    assert max(sizes) == 1, "nobody pays for rows that nobody asked for"
