"""Training a drafter to read its target's states: gradients and scores against one example at a time, kills, and what is exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from engine.errors import ConfigError
from engine.model.state_adapter import AdapterWeights, read_adapter
from engine.train.batches import collate, passes
from engine.train.config import DistilConfig
from engine.train.distil import Distillation, Examples, Report
from engine.train.models import Adapter, Student, TargetTeacher, new_drafter
from engine.train.shards import Example
from tests.train.conftest import Recipe
from tests.train.test_distil import CPU, SHAPE, lines, naive_rows, train, training, weights

NUM_DRAFTS = 3


@pytest.fixture
def run(model: Any, examples: list[Example]) -> Distillation:
    torch.manual_seed(2)
    adapter = AdapterWeights(8, 5, model.config.hidden_size, is_chained=True).double()
    for weight in adapter.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    student = Student(new_drafter(SHAPE, model, 0).double(), None, Adapter(adapter, NUM_DRAFTS))
    teacher = TargetTeacher(model, None)
    return Distillation(training(), student, (teacher, teacher), Examples(examples, examples), CPU)


def naive_drafts(run: Distillation, model: Any, example: Example) -> list[torch.Tensor]:
    """Logarithms of q at the answer's tokens, by draft: of each draft in a row one row fewer than of the one in front of it."""
    student = run._student
    assert student.adapter is not None
    ids, first = torch.tensor([[*example.prompt_ids, *example.answer_ids]]), len(example.prompt_ids) - 1
    own = student.model.model(ids).last_hidden_state[0, first:-1]
    before = model.model(ids).last_hidden_state[0, first:-1]
    found = [student.model.lm_head(own).log_softmax(-1)]
    for draft in range(NUM_DRAFTS):
        states = [student.adapter.weights(own[draft + 1 + i], before[i], is_targets=draft == 0) for i in range(len(own) - draft - 1)]
        before = torch.stack(states) if states else own[:0]
        found.append(student.model.lm_head(before).log_softmax(-1))
    return found


def test_the_gradient_is_that_of_the_naive_loss(run: Distillation, model: Any, examples: list[Example]) -> None:
    for chosen in passes([len(example) for example in examples], 80, 0, 0):
        run._accumulate(collate(examples, chosen))
    named = [(name, parameter) for module in run._student.modules for name, parameter in module.named_parameters()]
    gradients = [parameter.grad.clone() for _, parameter in named if parameter.grad is not None]
    assert len(gradients) == len(named)
    for _, parameter in named:
        parameter.grad = None
    shares = [0.5, *(0.5 * 0.7**draft / sum(0.7**d for d in range(NUM_DRAFTS)) for draft in range(NUM_DRAFTS))]
    losses = []
    for example in examples:
        log_p = naive_rows(model, example)
        for draft, log_q in enumerate(naive_drafts(run, model, example)):
            p = log_p[draft:]
            losses.append(shares[draft] * (p.exp() * (p - log_q)).sum())
    torch.stack(losses).sum().backward()
    for (name, parameter), gradient in zip(named, gradients, strict=True):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-8, atol=1e-10, msg=name)


def test_scores_tell_each_draft_of_a_row(run: Distillation, model: Any, examples: list[Example]) -> None:
    found = run.scores()
    assert list(found) == ["all", "draft 1", "draft 2", "draft 3", "self"]
    for draft in range(1, NUM_DRAFTS + 1):
        with torch.no_grad():
            p = torch.cat([naive_rows(model, e)[draft:] for e in examples]).exp()
            q = torch.cat([naive_drafts(run, model, e)[draft] for e in examples]).exp()
        assert found[f"draft {draft}"].num_tokens == len(p)
        assert found[f"draft {draft}"].acceptance == pytest.approx(float(torch.minimum(p, q).sum(-1).mean()), rel=1e-9)


@pytest.fixture
def beginning(recipe: Recipe, shards: list[Path], tmp_path: Path) -> str:
    """A drafter that drafts from the text alone, of 20 tokens."""
    config = recipe(output=str(tmp_path / "beginning"), training__folder=str(tmp_path / "first"), drafter__draft_vocabulary=20)
    train(config, shards)
    return config.output


def further(recipe: Recipe, beginning: str, **changes: Any) -> DistilConfig:
    return recipe(
        drafter__state_adapter={"width": 6, "drafts": 2},
        drafter__draft_vocabulary=20,
        drafter__init={"drafter": beginning},
        training__learns="adapter",
        **changes,
    )


def test_the_adapter_alone_learns_and_the_rest_stays(recipe: Recipe, beginning: str, shards: list[Path]) -> None:
    config = further(recipe, beginning, training__steps=40, training__keep_states=True)
    train(config, shards)
    kept = sorted(path.name for path in Path(beginning).glob("*.safetensors"))
    assert len(kept) > 1
    for name in kept:
        assert (Path(config.output) / name).read_bytes() == (Path(beginning) / name).read_bytes(), name
    validations = [entry["sources"] for entry in lines(config) if entry["kind"] == "validation"]
    assert validations[0]["all"] == validations[-1]["all"]
    assert validations[-1]["draft 1"]["loss"] < validations[0]["draft 1"]["loss"]
    adapter = read_adapter(Path(config.output), 8, torch.float32, CPU)
    assert adapter is not None
    assert float(adapter.out.weight.abs().max()) > 0
    card = (Path(config.output) / "README.md").read_text("utf-8")
    assert "state adapter | 246 more, to read the target's last state; the only part that was trained here" in card
    assert "### With the target's state" in card
    more = {"training__folder": config.training.folder + "-more", "output": config.output + "-more"}
    again = further(recipe, config.output, training__steps=4, training__learning_rate=1e-9, **more)
    train(again, shards)
    first = next(entry["sources"] for entry in lines(again) if entry["kind"] == "validation")
    assert first["draft 1"]["loss"] == pytest.approx(validations[-1]["draft 1"]["loss"], rel=1e-4), "it went on from what was there"
    assert json.loads((Path(again.output) / "training.json").read_text("utf-8"))["before"]["before"]["before"] is None


def test_a_run_that_was_ended_goes_on_bit_for_bit(recipe: Recipe, beginning: str, shards: list[Path]) -> None:
    class Killed(BaseException):
        pass

    def kill(report: Report) -> None:
        if report.position.step == 7:
            raise Killed

    plain, killed = (further(recipe, beginning, training__folder=recipe().training.folder + name) for name in ("1", "2"))
    train(plain, shards)
    with pytest.raises(Killed):
        train(killed, shards, on_report=kill)
    train(killed, shards)
    assert lines(killed) == lines(plain)
    assert weights(killed).keys() == weights(plain).keys()
    assert all(torch.equal(weight, weights(killed)[name]) for name, weight in weights(plain).items())


def test_what_cannot_be_is_refused(recipe: Recipe, beginning: str, shards: list[Path]) -> None:
    with pytest.raises(ValidationError, match=r"learns is adapter, which needs drafter\.state_adapter and drafter\.init\.drafter"):
        recipe(training__learns="adapter")
    config = further(recipe, beginning, training__steps=1)
    train(config, shards)
    other = recipe(
        drafter__state_adapter={"width": 7},
        drafter__init={"drafter": config.output},
        training__folder=config.training.folder + "-other",
    )
    with pytest.raises(ConfigError, match=r"state_adapter: is .*\[7, 16\].*, and in .*\[6, 16\]"):
        train(other, shards)
