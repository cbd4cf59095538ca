"""Temperature, top-k, top-p, min-p and processors, against the slow way."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.plan import RowBatch
from engine.request import Choice, Request, SamplingParams
from engine.sampling.distributions import Distributions, probabilities
from engine.sequence import Sequence
from tests.reference import processed

PARAMS = [
    SamplingParams(max_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for temperature, top_k, top_p, min_p in itertools.product((0.0, 0.6, 1.0), (0, 1, 7, 5000), (1.0, 0.9, 0.05), (0.0, 0.2))
]


def logits_of(vocab: int, scale: float = 2.0, num: int = len(PARAMS)) -> Tensor:
    generator = torch.Generator().manual_seed(vocab)
    return scale * torch.randn(num, vocab, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("vocab", [11, 3000])
def test_every_combination_is_that_of_the_reference(vocab: int) -> None:
    logits = logits_of(vocab)
    got = probabilities(logits, PARAMS)
    for row, params, ours in zip(logits, PARAMS, got, strict=True):
        want = torch.tensor(processed(tuple(row.tolist()), params), dtype=torch.float64)
        torch.testing.assert_close(ours, want, rtol=1e-9, atol=1e-12)


def test_top_p_over_a_flat_row_needs_more_than_the_first_thousand_tokens() -> None:
    params = [SamplingParams(max_tokens=1, top_p=0.95)]
    logits = logits_of(20_000, scale=0.1, num=1)
    got = probabilities(logits, params)
    assert int((got > 0).sum()) > 15_000
    torch.testing.assert_close(got[0], torch.tensor(processed(tuple(logits[0].tolist()), params[0]), dtype=torch.float64))


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    """Bit by bit, also where a neighbour forces the full sort or a larger top-k."""
    logits = torch.cat([logits_of(3000), logits_of(3000, scale=0.01)]).float()
    params = PARAMS * 2
    together = probabilities(logits, params)
    for i in range(len(params)):
        assert torch.equal(together[i], probabilities(logits[i : i + 1], params[i : i + 1])[0])


def test_equal_tokens_stand_or_fall_together() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    assert probabilities(logits, [SamplingParams(max_tokens=1, top_k=2)])[0].tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3, 0])


class Ban:
    """A hard mask on one token."""

    is_mask = True

    def apply(self, logits: Tensor, rows: RowBatch) -> Tensor:
        return logits.index_fill(-1, torch.tensor([0]), -torch.inf)


class Shift:
    """A soft processor that sees which position it works on."""

    is_mask = False

    def apply(self, logits: Tensor, rows: RowBatch) -> Tensor:
        shift = torch.zeros_like(logits)
        shift[torch.arange(len(rows.offsets)), list(rows.offsets)] = 5.0
        return logits + shift


def rows_for(num: int, sampling: SamplingParams | None = None) -> RowBatch:
    seq = Sequence(Request(id="x", prompt_ids=(1,), sampling=sampling or SamplingParams(max_tokens=9)), Choice())
    return RowBatch((seq,) * num, tuple(range(num)), (0,) * num, torch.zeros(1, num, dtype=torch.long))


def test_masks_reach_rules_and_soft_processors_do_not() -> None:
    logits = torch.zeros(3, 4)
    rows = Distributions([Shift(), Ban()]).of(logits, rows_for(3))
    assert rows.allowed is not None
    assert rows.logits is not None
    assert not rows.allowed[:, 0].any()
    assert rows.allowed[:, 1:].all()
    assert (rows.probs[:, 0] == 0).all()
    assert rows.logits[:, 1:].eq(0).all(), "rules see masked logits without penalties"
    assert rows.probs[2].argmax() == 2, "a processor knows which position a row is of"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [1e-5, 9e-6, 1e-38, 1e-320])
def test_tiny_temperatures_are_those_of_the_most_likely_token(temperature: float, dtype: Any) -> None:
    logits = logits_of(300, num=4).to(dtype)
    probs = Distributions().of(logits, rows_for(4, SamplingParams(max_tokens=1, temperature=temperature))).probs
    assert torch.equal(probs.argmax(-1), logits.argmax(-1))
    assert torch.allclose(probs.sum(-1), torch.ones(4, dtype=probs.dtype))


def test_without_masks_everything_is_allowed() -> None:
    assert Distributions().of(torch.zeros(2, 4), rows_for(2)).allowed is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_halves_are_widened(dtype: Any) -> None:
    rows = Distributions().of(torch.zeros(1, 4, dtype=dtype), rows_for(1))
    assert rows.probs.dtype == torch.promote_types(dtype, torch.float32)
