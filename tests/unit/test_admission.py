"""What is refused before it is queued."""

from __future__ import annotations

import math

import msgspec
import pytest

from engine.errors import ContextLengthExceeded, InvalidRequest, QueueFull
from engine.request import Choice, SpeculationParams
from engine.sched.admission import Admission
from tests.fakes import make_info
from tests.unit.factories import make_request

INFO = make_info(vocab_size=10, max_model_len=12, max_sequences=2)
ADMISSION = Admission(INFO, max_queued=3)


def test_what_fits_is_let_through() -> None:
    ADMISSION.check(make_request(prompt=(1,) * 8, max_tokens=4), num_open=0)


def test_the_context_is_the_limit_and_the_numbers_are_said() -> None:
    with pytest.raises(ContextLengthExceeded, match=r"12 tokens, but 13 .* \(8 in the prompt, 5 for the completion\)"):
        ADMISSION.check(make_request(prompt=(1,) * 8, max_tokens=5), num_open=0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -1),
        ("min_p", 2.0),
        ("max_tokens", -1),
    ],
)
def test_a_bad_sampling_value_is_named(field: str, value: float) -> None:
    request = make_request()
    bad = msgspec.structs.replace(request, sampling=msgspec.structs.replace(request.sampling, **{field: value}))
    with pytest.raises(InvalidRequest) as caught:
        ADMISSION.check(bad, num_open=0)
    assert caught.value.param == field
    assert str(value) in str(caught.value)


def test_prompts_that_cannot_be_run_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="no tokens"):
        ADMISSION.check(make_request(prompt=()), num_open=0)
    with pytest.raises(InvalidRequest, match="Token id 10 "):
        ADMISSION.check(make_request(prompt=(1, 10)), num_open=0)


def test_an_unknown_rule_and_a_finished_choice_are_refused() -> None:
    for rule, said in (("best", "Unknown rule 'best'"), ("chow", "this drafter has none")):
        with pytest.raises(InvalidRequest, match=said):
            ADMISSION.check(msgspec.structs.replace(make_request(), speculation=SpeculationParams(rule=rule)), num_open=0)
    with pytest.raises(InvalidRequest, match="already emitted"):
        ADMISSION.check(msgspec.structs.replace(make_request(max_tokens=2), choices=(Choice(0, (1, 1)),)), num_open=0)


@pytest.mark.parametrize("choices", [(), (Choice(0), Choice(0))])
def test_choices_are_there_and_distinct(choices: tuple[Choice, ...]) -> None:
    with pytest.raises(InvalidRequest, match="at least one choice"):
        ADMISSION.check(msgspec.structs.replace(make_request(), choices=choices), num_open=0)


def test_the_queue_is_bounded() -> None:
    ADMISSION.check(make_request(), num_open=4)
    with pytest.raises(QueueFull) as caught:
        ADMISSION.check(make_request(), num_open=5)
    assert caught.value.retry_after >= 1
    with pytest.raises(InvalidRequest, match="n is 6"):
        ADMISSION.check(make_request(num_choices=6), num_open=0)
