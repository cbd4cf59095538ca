"""A step asks its device for the verdict and, where a policy or a drafter looks at what was drafted, once a pass of the drafter. Nothing
else waits for a GPU's queue, but for log-probabilities that were asked for. Shown on the CPU, by what torch is asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from engine.config import AdaptiveLengthConfig, FixedLengthConfig
from engine.request import Request
from engine.sampling.processors import has_penalty
from engine.transfer import to_device
from tests.tiny import Setup, drive, make_core
from tests.verify.requests import seeded

_READS_OF_SCORES = 2  # their values, and the likeliest tokens
_READS = frozenset({"tolist", "item", "numpy", "cpu", "nonzero", "equal", "allclose", "__bool__", "__int__", "__float__", "__index__"})


class Waits(TorchFunctionMode):
    """Counts what makes the host wait for a GPU: reading numbers, and sending them by anything but `to_device`."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.sends: Counter[str] = Counter()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.__name__, kwargs or {}
        if name in _READS or (name == "__getitem__" and _has(args[1], _is_mask)):
            self.reads[name] += 1
        if name == "new_tensor" or (name in ("tensor", "as_tensor") and kwargs.get("device") is not None):
            self.sends[name] += 1
        if name in ("__getitem__", "__setitem__") and _has(args[1], lambda index: isinstance(index, list)):
            self.sends[name] += 1
        return func(*args, **kwargs)


def _is_mask(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype is torch.bool


def _has(index: Any, is_such: Callable[[Any], bool]) -> bool:
    return any(map(is_such, index)) if isinstance(index, tuple) else is_such(index)


def unhurried() -> list[Request]:
    """All rules, temperatures, biases and least lengths. Truncated rows may need a longer sort, and penalties look at the drafts."""
    return [r for r in seeded() if r.sampling.top_p == 1 and not has_penalty(r.sampling)]


def scored() -> Request:
    """One that wants its prompt scored."""
    request = unhurried()[0]
    return msgspec.structs.replace(request, id="scored", sampling=msgspec.structs.replace(request.sampling, num_prompt_logprobs=2))


def test_what_waits_is_counted() -> None:
    x = torch.arange(3.0)
    with Waits() as waits:
        x[[0, 1]] = x[torch.tensor([0, 1])]
        assert len(x[x > 0].tolist()) == float(x[2])
        torch.tensor([1.0], device="cpu")
    assert waits.reads == {"__getitem__": 1, "tolist": 1, "__float__": 1}
    assert waits.sends == {"__setitem__": 1, "tensor": 1}


@pytest.mark.parametrize(
    ("setup", "reads_a_pass"),
    [
        pytest.param(Setup(drafter="none"), 0, id="no drafter"),
        pytest.param(Setup(drafter="ngram", policy=FixedLengthConfig(max=3)), 0, id="looked up"),
        pytest.param(Setup(drafter="model", policy=FixedLengthConfig(max=3)), 0, id="a model"),
        pytest.param(Setup(drafter="model", policy=FixedLengthConfig(max=3), reads_states="all"), 0, id="a model that reads states"),
        pytest.param(Setup(drafter="model", policy=AdaptiveLengthConfig(max=3)), 1, id="a model whose confidence is read"),
        pytest.param(Setup(drafter="model", policy=FixedLengthConfig(max=3), doubt=0.5), 1, id="a model that copies"),
    ],
)
def test_a_step_waits_once_for_its_verdict(setup: Setup, reads_a_pass: int) -> None:
    core = make_core(setup)
    for request in (*unhurried(), scored()):
        core.add(request)
    num_steps = num_scoring = 0
    while core.has_work:
        with Waits() as waits:
            output = core.step()
        num_reads = _READS_OF_SCORES * any(delta.prompt_logprobs for delta in output.deltas)
        num_steps, num_scoring = num_steps + 1, num_scoring + (num_reads > 0)
        assert not waits.sends
        assert sum(waits.reads.values()) <= 1 + reads_a_pass * (setup.policy.max + 1) + num_reads
    assert num_steps > 3
    assert num_scoring


def test_to_device_keeps_what_is_there() -> None:
    x = torch.arange(4)
    assert to_device(x, torch.device("cpu")) is x
    assert to_device([[1, 2], [3, 4]], torch.device("cpu"), torch.float64).dtype is torch.float64
    assert to_device([True], torch.device("cpu")).dtype is torch.bool


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_but_the_verdict_waits_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch itself says where it waited."""
    core = make_core(Setup(drafter="model", policy=FixedLengthConfig(max=3), device="cuda"))
    drive(core, seeded()[:2])
    for request in unhurried():
        core.add(request)
    core.step()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchroniz") as caught:
            core.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(caught) == 1
