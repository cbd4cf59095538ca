"""A drafter that reads its target's states: its rows are those of the naive forward, it reads them only where the text may depend on
rounds, and what it emits has the target's law all the same."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Literal

import msgspec
import pytest
import torch

from engine.config import FixedLengthConfig
from engine.core import EngineCore
from engine.draft.model import ModelDrafter
from engine.plan import DraftBatch, StepPlan
from engine.request import Request, SamplingParams, SpeculationParams
from engine.sequence import Sequence
from tests.recording import CallingRecorder, FixedGather
from tests.tiny import VOCAB, Setup, adapter_weights, drafter_model, drive, make_core, naive_target, target_model
from tests.verify.requests import greedy, prompt

_WAYS: tuple[Literal["", "all"], ...] = ("all", "")
READING = Setup(drafter="model", reads_states="all", policy=FixedLengthConfig(max=3))


def sampled(number: int, is_seeded: bool = False, num_tokens: int = 8, rule: str = "exact") -> Request:
    sampling = SamplingParams(max_tokens=num_tokens, temperature=1.0, seed=number, is_seeded=is_seeded)
    return Request(id=str(number), prompt_ids=prompt(3), sampling=sampling, speculation=SpeculationParams(rule=rule, alpha=0.3))


def scored(request: Request) -> Request:
    return msgspec.structs.replace(request, sampling=msgspec.structs.replace(request.sampling, num_prompt_logprobs=1))


@dataclass
class Proposals:
    """What a core's drafter proposed: of each sequence, per round, its text in front, and its drafts with their rows q."""

    found: list[tuple[Sequence, tuple[int, ...], list[int], torch.Tensor]] = field(default_factory=list)

    @classmethod
    def of(cls, core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> Proposals:
        own, self = ModelDrafter.propose, cls()

        def propose(drafter: ModelDrafter, plan: StepPlan, budget: int) -> DraftBatch:
            drafts = own(drafter, plan, budget)
            for row, chunk in enumerate(plan.held_back(drafts.lagging).completing):
                if drafts.lengths[row]:
                    assert drafts.rows is not None
                    ids = [int(token) for token in drafts.ids[row][: drafts.lengths[row]]]
                    self.found.append((chunk.seq, tuple(chunk.seq.tokens), ids, drafts.rows.probs[row].clone()))
            return drafts

        monkeypatch.setattr(ModelDrafter, "propose", propose)
        return self


@torch.inference_mode()
def naive_rows(text: tuple[int, ...], drafts: list[int], reads_target: bool, is_chained: bool) -> torch.Tensor:
    """[len(drafts), V] at temperature 1, each from a forward over all of the text: as the adapter's first lines say."""
    weights, drafter, before, rows = adapter_weights(is_chained), drafter_model(), None, []
    if reads_target:
        before = target_model().model(torch.tensor([text[:-1]])).last_hidden_state[0, -1:]
    for depth in range(len(drafts)):
        state = drafter.model(torch.tensor([[*text, *drafts[:depth]]])).last_hidden_state[0, -1:]
        if before is not None:
            read = weights.from_target if depth == 0 else weights.from_drafter
            assert read is not None
            state = before = state + weights.out(torch.nn.functional.silu(weights.own(state) + read(before)))
            before = before if is_chained else None
        rows.append(drafter.lm_head(state)[0].softmax(-1))
    return torch.stack(rows)


RECORDED = Setup(recorder=CallingRecorder(), attention=FixedGather())


@pytest.mark.parametrize("setup", [Setup(), RECORDED], ids=["launched", "recorded"])
@pytest.mark.parametrize("reads", ["first", "all"])
def test_rows_are_those_of_the_naive_forward(reads: Literal["first", "all"], setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixed batches: requests that read states beside ones that do not, some of which are taken up again after a preemption, and some of
    which want rows of their prompts, too."""
    core = make_core(replace(setup, reads_states=reads, policy=FixedLengthConfig(max=3), num_blocks=14, block_size=2))
    proposals = Proposals.of(core, monkeypatch)
    requests = [sampled(i, is_seeded=i % 3 == 0, rule=("exact", "token_v3")[i % 4 == 1]) for i in range(16)]
    requests += [scored(sampled(i)) for i in range(16, 20)]
    outcome = drive(core, requests)
    assert sum(step.num_preemptions for step in outcome.steps) > 0
    num = Counter[bool]()
    for seq, text, drafts, rows in proposals.found:
        is_first = len(text) == len(seq.request.prompt_ids)  # the target has not run yet
        reads_target = not seq.needs_q and not is_first
        torch.testing.assert_close(rows[: len(drafts)], naive_rows(text, drafts, reads_target, reads == "all"), rtol=0, atol=1e-10)
        num[reads_target] += 1
    assert min(num[True], num[False]) > 10


def test_a_seeded_request_and_a_cascade_draft_from_the_text_alone() -> None:
    requests = [sampled(i, is_seeded=i % 2 == 0, rule=("exact", "token_v1")[i % 2]) for i in range(6)]
    texts = [drive(make_core(Setup(drafter="model", reads_states=reads)), requests) for reads in _WAYS]
    assert texts[0].tokens == texts[1].tokens
    assert texts[0].rounds == texts[1].rounds


@pytest.mark.parametrize("verification", ["token", "block"])
def test_what_is_emitted_has_the_targets_law(verification: Literal["token", "block"]) -> None:
    """The third token behind a prompt, over all first two: drafted and verified in rounds that begin wherever drafts fell."""
    start = list(prompt(3))

    def row(*behind: int) -> torch.Tensor:
        return torch.tensor(naive_target().logits([*start, *behind]), dtype=torch.float64).softmax(-1)

    first = row()
    want = sum(first[a] * row(a)[b] * row(a, b) for a in range(VOCAB) for b in range(VOCAB))
    assert isinstance(want, torch.Tensor)
    number = 3000
    outcome = drive(
        make_core(replace(READING, verification=verification)), [sampled(i, num_tokens=3) for i in range(number)], max_steps=10**5
    )
    got = torch.bincount(torch.tensor([tokens[2] for tokens in outcome.tokens.values()]), minlength=VOCAB)
    common = want * number >= 5
    statistic = ((got - want * number)[common].square() / (want * number)[common]).sum()
    rest, wanted_rest = got[~common].sum(), (want * number)[~common].sum()
    statistic += (rest - wanted_rest).square() / wanted_rest.clamp_min(1)
    degrees = int(common.sum())
    assert float(statistic) < degrees + 4 * (2 * degrees) ** 0.5, "four deviations of a chi-squared variable"


def test_the_state_changes_what_is_drafted() -> None:
    """Else the tests above prove nothing."""
    requests = greedy(8)
    outcomes = [drive(make_core(Setup(drafter="model", reads_states=reads)), requests) for reads in _WAYS]
    assert outcomes[0].tokens == outcomes[1].tokens
    assert outcomes[0].rounds != outcomes[1].rounds


def test_nothing_is_kept_of_a_sequence_that_ended() -> None:
    core = make_core(READING)
    drive(core, [sampled(i) for i in range(3)])
    assert isinstance(core._parts.drafter, ModelDrafter)
    assert core._parts.drafter._target_states is not None
    assert not core._parts.drafter._target_states._before
