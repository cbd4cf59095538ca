"""Training: gradients and scores against one example at a time, kills that leave no trace, and that a drafter learns."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from engine.errors import ConfigError
from engine.train.batches import collate, passes
from engine.train.config import DistilConfig, DrafterShape, TrainingConfig
from engine.train.distil import Distillation, Examples, Report, learning_rate
from engine.train.losses import Loss
from engine.train.models import Student, TargetTeacher, frequent_ids, new_drafter
from engine.train.run import Watch, distil
from engine.train.shards import Example
from tests.train.conftest import MATERIAL, VOCAB, Recipe, recipe_content

CPU = torch.device("cpu")
SHAPE = DrafterShape(hidden_size=8, num_layers=1, num_heads=2, intermediate_size=16)


def training(loss: Loss = "kl") -> TrainingConfig:
    return TrainingConfig(folder="run", steps=4, pass_tokens=80, logit_rows=7, loss=loss)


def distillation(model: Any, examples: list[Example], config: TrainingConfig, draft_ids: Any = None) -> Distillation:
    student = Student(new_drafter(SHAPE, model, 0).double(), draft_ids)
    teacher = TargetTeacher(model, student.draft_ids)
    return Distillation(config, student, (teacher, teacher), Examples(examples, examples), CPU)


def naive_rows(model: Any, example: Example) -> torch.Tensor:
    """Distributions of the answer's tokens, of a model's own forward over one example."""
    ids = torch.tensor([[*example.prompt_ids, *example.answer_ids]])
    first = len(example.prompt_ids) - 1
    return model(ids).logits[0, first:-1].log_softmax(-1)  # type: ignore[no-any-return]  # untyped


@pytest.mark.parametrize("is_reduced", [False, True], ids=["all tokens", "some tokens"])
@pytest.mark.parametrize("loss", ["kl", "tv"])
def test_the_gradient_is_that_of_the_naive_loss(loss: Loss, is_reduced: bool, model: Any, examples: list[Example]) -> None:
    ids = frequent_ids(examples, 20, (2,)) if is_reduced else torch.arange(VOCAB)
    run = distillation(model, examples, training(loss), ids if is_reduced else None)
    drafter = run._student.model
    total = 0.0
    for chosen in passes([len(example) for example in examples], 80, 0, 0):
        total += run._accumulate(collate(examples, chosen))
    gradients = {name: parameter.grad.clone() for name, parameter in drafter.named_parameters()}
    drafter.zero_grad()
    losses = []
    for example in examples:
        log_p = naive_rows(model, example)[:, ids]
        hidden = drafter.model(torch.tensor([[*example.prompt_ids, *example.answer_ids]])).last_hidden_state[0]
        rows = hidden[len(example.prompt_ids) - 1 : -1]
        log_q = (rows @ drafter.lm_head.weight[ids].T).log_softmax(-1)
        if loss == "kl":
            losses.append((log_p.exp() * (log_p - log_q)).sum())
        else:
            losses.append(len(log_p) - torch.minimum(log_p.exp(), log_q.exp()).sum())
    want = torch.stack(losses).sum()
    want.backward()
    assert total == pytest.approx(float(want.detach()), rel=1e-10)
    for name, parameter in drafter.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-8, atol=1e-10, msg=name)


def test_scores_are_the_mean_over_all_tokens_of_a_source(model: Any, examples: list[Example]) -> None:
    mixed = [Example(e.prompt_ids, e.answer_ids, "ab"[i % 2], e.temperature) for i, e in enumerate(examples)]
    run = distillation(model, mixed, training())
    found = run.scores()
    assert list(found) == ["a", "all", "b"]
    for name in found:
        chosen = [e for e in mixed if name in (e.source, "all")]
        with torch.no_grad():
            p, q = (torch.cat([naive_rows(m, e) for e in chosen]).exp() for m in (model, run._student.model))
        assert found[name].num_tokens == len(p) == sum(len(e.answer_ids) for e in chosen)
        assert found[name].acceptance == pytest.approx(float(torch.minimum(p, q).sum(-1).mean()), rel=1e-9)
        assert found[name].agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), rel=1e-9)
        assert found[name].loss == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-9)


def test_an_epoch_is_every_example_once_in_an_order_of_its_own() -> None:
    lengths = [3 + i * 7 % 50 for i in range(1300)]
    one, again, other = passes(lengths, 200, 5, 0), passes(lengths, 200, 5, 0), passes(lengths, 200, 5, 1)
    assert one == again != other
    assert sorted(i for chosen in one for i in chosen) == list(range(1300))
    assert all(len(chosen) * max(lengths[i] for i in chosen) <= 200 for chosen in one)
    assert len(passes([500, 3], 200, 5, 0)) == 2, "one that is too long goes alone"


def test_the_learning_rate_rises_and_falls() -> None:
    config = TrainingConfig(folder="run", steps=1, learning_rate=2.0, warmup=0.1, final_learning_rate=0.1)
    rates = [learning_rate(config, progress) for progress in (0, 0.05, 0.1, 0.55, 1)]
    assert rates == pytest.approx([0.02, 1.0, 2.0, 1.1, 0.2])


# ---------------------------------------------------------------------- whole runs
def lines(config: DistilConfig) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.training.folder) / "log.jsonl").read_text("utf-8").splitlines()]


def weights(config: DistilConfig) -> dict[str, torch.Tensor]:
    parts = torch.load(Path(config.training.folder) / "checkpoint.pt", weights_only=True)["student"]
    return {f"{part}.{name}": weight for part, weights in parts.items() for name, weight in weights.items()}


def train(config: DistilConfig, shards: list[Path], **watch: Any) -> None:
    distil(config, MATERIAL, shards, "cascade train distil x.yaml", Watch(**watch))


@pytest.fixture(scope="module")
def plain(shards: list[Path], target: Path, tmp_path_factory: pytest.TempPathFactory) -> DistilConfig:
    """A run of 12 steps that nothing disturbed."""
    config = DistilConfig.model_validate(recipe_content(target, tmp_path_factory.mktemp("plain")))
    train(config, shards)
    return config


def test_the_log_tells_every_step_and_every_validation(plain: DistilConfig) -> None:
    steps = [entry for entry in lines(plain) if entry["kind"] == "step"]
    assert [entry["step"] for entry in steps] == list(range(1, 13))
    assert [entry["step"] for entry in lines(plain) if entry["kind"] == "validation"] == [4, 8, 12]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert steps[-1]["tokens"] >= 12 * 60


@pytest.mark.parametrize("last", [1, 7])
def test_a_run_that_was_ended_goes_on_bit_for_bit(last: int, plain: DistilConfig, recipe: Recipe, shards: list[Path]) -> None:
    class Killed(BaseException):
        pass

    def kill(report: Report) -> None:
        if report.position.step == last:
            raise Killed

    config = recipe()
    with pytest.raises(Killed):
        train(config, shards, on_report=kill)
    train(config, shards)
    assert lines(config) == lines(plain)
    for name, weight in weights(plain).items():
        assert torch.equal(weight, weights(config)[name]), name


def test_a_log_that_lost_lines_is_gone_on_with(recipe: Recipe, shards: list[Path]) -> None:
    """As after a loss of power, whatever it tore apart."""
    train(config := recipe(training__steps=4), shards)
    log = Path(config.training.folder) / "log.jsonl"
    num_lines, content = len(lines(config)), log.read_bytes()
    log.write_bytes(content[:-20])
    train(config, shards)
    assert len(lines(config)) == num_lines - 1


def test_an_export_beside_a_training_leaves_its_log_alone(recipe: Recipe, shards: list[Path]) -> None:
    train(config := recipe(training__steps=4), shards)
    log = Path(config.training.folder) / "log.jsonl"
    told = lines(config)
    with log.open("a", encoding="utf-8") as file:  # the training that runs on
        file.write('{"kind": "validation", "step": 8, "tokens": 1, "sources": {}}\n{"kind": "st')
    before = log.read_bytes()
    output = distil(config, MATERIAL, shards, "x", Watch(), is_export_only=True)
    known = json.loads((output / "training.json").read_text("utf-8"))["validations"]
    assert known == [entry for entry in told if entry["kind"] == "validation"], "of the weights that are exported"
    with pytest.raises(ConfigError, match="another recipe"):
        distil(recipe(training__steps=4, training__learning_rate=0.5), MATERIAL, shards, "x", Watch())
    assert log.read_bytes() == before


def test_kill_9_leaves_no_trace(plain: DistilConfig, recipe: Recipe, shards: list[Path], tmp_path: Path) -> None:
    config = recipe()
    code = """
import sys, yaml
from pathlib import Path
from engine.train.config import DistilConfig
from engine.train.run import Watch, distil
from tests.train.conftest import MATERIAL
import time
config = DistilConfig.model_validate(yaml.safe_load(Path(sys.argv[1]).read_text()))
distil(config, MATERIAL, [Path(name) for name in sys.argv[2:]], "x", Watch(on_report=lambda report: time.sleep(0.2)))
"""
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")), "utf-8")
    process = subprocess.Popen([sys.executable, "-c", code, str(file), *map(str, shards)], cwd=Path(__file__).parents[2])
    log, deadline = Path(config.training.folder) / "log.jsonl", time.monotonic() + 60
    while not log.exists() or log.read_bytes().count(b"\n") < 5:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert len(lines(config)) < 15
    train(config, shards)
    assert lines(config) == lines(plain)
    for name, weight in weights(plain).items():
        assert torch.equal(weight, weights(config)[name]), name


def test_a_run_of_another_recipe_is_refused(plain: DistilConfig, shards: list[Path]) -> None:
    content = plain.model_dump(mode="json")
    content["drafter"]["hidden_size"] = 16
    with pytest.raises(ConfigError, match=r"another recipe: drafter\.hidden_size is 16 now and was 8"):
        train(DistilConfig.model_validate(content), shards)
    with pytest.raises(ConfigError, match=r"data\.num_shards is 1 now"):
        train(plain, shards[:1])
    assert len(lines(plain)) == 15, "a refused run has cut the log"


@pytest.mark.parametrize("vocabulary", [None, 20], ids=["all tokens", "some tokens"])
def test_kept_states_teach_the_same(recipe: Recipe, shards: list[Path], vocabulary: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, kept, again = (
        recipe(training__keep_states=keep, training__folder=recipe().training.folder + name, drafter__draft_vocabulary=vocabulary)
        for keep, name in ((False, "1"), (True, "2"), (True, "3"))
    )
    train(plain, shards)
    train(kept, shards)
    for wanted, found in zip(lines(plain), lines(kept), strict=True):
        assert found.keys() == wanted.keys()
        if found["kind"] == "step":
            assert found["loss"] == pytest.approx(wanted["loss"], rel=5e-3)
        else:
            assert found["sources"]["all"] == pytest.approx(wanted["sources"]["all"], rel=2e-2)
    assert len(list(shards[0].parent.glob("states-*"))) == len(shards)
    monkeypatch.setattr("engine.train.states.hidden_rows", None)  # it would be called if states were made again
    train(again, shards)
    assert lines(again) == lines(kept)


def test_the_other_ways_to_train_run(recipe: Recipe, shards: list[Path]) -> None:
    reduced = recipe(
        drafter__draft_vocabulary=20,
        training__loss="tv",
        training__precision="bfloat16",
        training__steps=None,
        training__tokens=700,
    )
    train(reduced, shards)
    losses = [entry["loss"] for entry in lines(reduced) if entry["kind"] == "step"]
    assert all(0 < loss < 1 for loss in losses), "a total variation is a probability"
    assert lines(reduced)[-1]["tokens"] >= 700 > lines(reduced)[-3]["tokens"]


# ---------------------------------------------------------------------- beginnings
def test_a_drafter_can_begin_with_layers_of_the_target(model: Any) -> None:
    shape = DrafterShape.model_validate(
        {
            "hidden_size": 16,
            "num_layers": 1,
            "num_heads": 4,
            "num_kv_heads": 2,
            "intermediate_size": 24,
            "tie_embeddings": False,
            "init": {"from_target_layers": [1]},
        }
    )
    drafter = new_drafter(shape, model, 0)
    pairs = [(drafter.model.layers[0], model.model.layers[1]), (drafter.lm_head, model.lm_head)]
    for ours, theirs in pairs:
        for (name, weight), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert torch.equal(weight, other.float()), name
    assert torch.equal(drafter.model.embed_tokens.weight, model.model.embed_tokens.weight.float())
    for layer, message in ((2, "must be less than 2"), (0, "has another shape")):
        wrong = shape.model_copy(
            update={"init": shape.init.model_copy(update={"from_target_layers": (layer,)}), "intermediate_size": 24 if layer else 8}
        )
        with pytest.raises(ConfigError, match=message):
            new_drafter(wrong, model, 0)


def test_a_narrow_embedding_keeps_what_can_be_kept(model: Any) -> None:
    """The best approximation of rank 8 has the error of the singular values that it lacks."""
    wide = model.model.embed_tokens.weight.detach().double()
    narrow = new_drafter(SHAPE, model, 0).model.embed_tokens.weight.detach().double()
    fitted = narrow @ torch.linalg.lstsq(narrow, wide).solution
    lost = torch.linalg.svdvals(wide)[8:].square().sum().sqrt()
    assert float((fitted - wide).norm()) == pytest.approx(float(lost), rel=1e-5)
    assert float(narrow.square().mean().sqrt()) == pytest.approx(0.02, rel=1e-4)
