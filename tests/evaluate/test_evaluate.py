"""`cascade evaluate` on a tiny pair: ends, resuming, files and refusals. The figures mean nothing here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.evaluate import sweep
from benchmarks.evaluate.likelihood import Likelihood
from benchmarks.evaluate.pair import Pair
from benchmarks.evaluate.tasks import TASKS, sample
from engine.api import Engine
from engine.build import build
from engine.errors import ConfigError
from engine.model.loader import load as load_model
from engine.request import SamplingParams, SpeculationParams
from server.settings import load as load_deployment
from tests.evaluate.conftest import Evaluate, Ran, write_config

FEW = ("--num-prompts", "2", "--max-tokens", "8", "--rules", "token_v3", "--alphas", "lossy=0.3;token_v3=0.2")
LABELS = ["target", "exact", "lossy=0.3", "token_v3=0.2", "drafter"]
TIMES = ("ms_per_token", "seconds_per_answer")


def records_of(ran: Ran) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (ran.folder / "answers.jsonl").read_text().splitlines()[1:]]


def untimed(ran: Ran) -> dict[str, Any]:
    """The figures that a clock has no part in."""
    return {
        point: {name: value for name, value in figures["figures"].items() if name not in TIMES} for point, figures in ran.points.items()
    }


def test_points_are_those_of_the_engine(pair_config: Path, evaluate: Evaluate) -> None:
    """Target alone, drafter alone and a cascade against the engine, asked directly."""
    ran = evaluate(pair_config, *FEW)
    assert list(ran.summary["points"]) == [*LABELS]
    by_key = {(record["point"], record["prompt"]): record for record in records_of(ran)}
    pair = Pair.of(pair_config, None, lambda _: None)
    items = sample(TASKS["chat"].read(None), 2, 0)
    prompts = [pair.ids(item) for item in items]
    sampling = SamplingParams(max_tokens=8, temperature=0.0, stop_token_ids=pair.end_token_ids)

    def texts(engine: Engine, speculation: SpeculationParams) -> list[list[int]]:
        return [list(answer.token_ids) for answer in engine.generate(prompts, sampling, speculation)]

    def recorded(point: str) -> list[list[int]]:
        return [by_key[point, item.name]["token_ids"] for item in items]

    with Engine(pair.config) as engine:
        assert recorded("target") == recorded("exact") == texts(engine, SpeculationParams(enabled=False))
        assert recorded("token_v3=0.2") == texts(engine, SpeculationParams(rule="token_v3", alpha=0.2))
    with Engine(pair._alone()) as engine:
        assert recorded("drafter") == texts(engine, SpeculationParams())
    assert recorded("drafter") != recorded("target")
    assert ran.points["target"]["figures"]["agreement"]["median"] == ran.points["exact"]["figures"]["agreement"]["median"] == 1
    assert ran.points["drafter"]["figures"]["tokens_per_target_call"] is None
    assert ran.points["target"]["figures"]["tokens_per_target_call"]["median"] == 1


def test_likelihood_is_the_models_own(pair_config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In pieces, beside prompts that the engine keeps, and none of these is harmed."""
    monkeypatch.setattr("benchmarks.evaluate.likelihood.MAX_ROWS", 3)
    core = build(load_deployment(pair_config, {}).engine_part)
    theirs = load_model(Path(core.info.target_path), torch.float32, torch.device("cpu"))
    judge = Likelihood(core, 40)
    for prompt, answer in (((5, 6, 7, 8), (9, 10, 11, 12, 13, 14, 15)), ((5,), (9,)), (tuple(range(30)), (3, 4, 5, 6))):
        ids = torch.tensor([[*prompt, *answer]])
        with torch.inference_mode():
            rows = theirs(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected = -float(rows[range(len(answer)), list(answer)].sum())
        assert judge.nats(prompt, answer) == pytest.approx(expected, rel=1e-4)


def test_a_killed_run_goes_on_to_the_same_table(pair_config: Path, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate(pair_config, *FEW, folder="whole")
    made, play = 0, sweep.Stage.record

    def dies(*arguments: Any) -> Any:
        nonlocal made
        made += 1
        if made == 6:
            raise KeyboardInterrupt
        return play(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(sweep.Stage, "record", dies)
        killed = evaluate(pair_config, *FEW)
    assert killed.result.exit_code == 130
    assert "The same command goes on" in killed.result.stderr
    before = records_of(killed)
    assert len(before) == 5
    answers = killed.folder / "answers.jsonl"
    answers.write_bytes(answers.read_bytes() + b'{"point": "exa')  # half a line
    ran = evaluate(pair_config, *FEW)
    assert ran.summary["recommended"]
    assert records_of(ran)[:5] == before  # none is made again
    assert len(records_of(ran)) == 2 * len(LABELS)
    assert untimed(ran) == untimed(whole)


def test_a_complete_run_is_reported_again_without_its_models(
    pair_config: Path, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = evaluate(pair_config, *FEW).table
    monkeypatch.setattr("benchmarks.evaluate.pair.build", None)
    again = evaluate(pair_config, *FEW).table
    assert again["points"] == first["points"]


def test_another_run_is_refused(pair_config: Path, evaluate: Evaluate) -> None:
    assert evaluate(pair_config, *FEW).result.exit_code == 0
    ran = evaluate(pair_config, *FEW, "--seed", "1", "--draft-length", "2")
    assert ran.result.exit_code == 2
    assert "seed was 0 and is 1" in ran.result.stderr
    assert "deployment.speculation.draft_length.max was 3 and is 2" in ran.result.stderr
    assert ran.result.stderr.splitlines()[-1].startswith("Error: ")
    assert ran.result.stdout == ""
    assert evaluate(pair_config, *FEW, "--seed", "1", "--fresh").result.exit_code == 0


def test_weights_that_were_trained_again_are_another_run(pair_config: Path, evaluate: Evaluate) -> None:
    assert evaluate(pair_config, *FEW).result.exit_code == 0
    weights = pair_config.parent / "drafter" / "model.safetensors"
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-4] + b"\0\0\0\1")
        ran = evaluate(pair_config, *FEW)
    finally:
        weights.write_bytes(content)
    assert "weights.drafter was" in ran.result.stderr


def test_plots_and_tables_are_written(pair_config: Path, evaluate: Evaluate) -> None:
    ran = evaluate(pair_config, *FEW, plots=True)
    names = ["curve-nats-per-token.png", "curve-agreement.png", "curve-repetition.png"]
    assert [Path(file).name for file in ran.summary["files"]] == ["answers.jsonl", "table.json", "table.md", *names]
    for name in names:
        content = (ran.folder / name).read_bytes()
        assert content.startswith(b"\x89PNG\r\n\x1a\n")
        assert content.rstrip().endswith(b"IEND\xaeB`\x82")
        assert len(content) > 10_000
    page = (ran.folder / "table.md").read_text()
    for part in (*(f"`{label}`" for label in LABELS), "![curve-agreement.png]", "Recommended is the point", "2 prompts, greedy"):
        assert part in page
    assert all(figures["num_prompts"] == 2 for figures in ran.points.values())


def test_sampled_with_one_seed_a_prompt_and_several_streams(pair_config: Path, evaluate: Evaluate) -> None:
    """Seeds fix the texts, in a batch as alone; the greedy text they are compared with is in no table."""
    command = ("--temperature", "1", "--seed", "3", *FEW)
    alone, together = evaluate(pair_config, *command), evaluate(pair_config, *command, "--concurrency", "2", folder="together")
    assert list(alone.summary["points"]) == LABELS
    assert untimed(alone)["token_v3=0.2"] == {
        **untimed(together)["token_v3=0.2"],
        **{name: untimed(alone)["token_v3=0.2"][name] for name in ("tokens_per_target_call", "acceptance", "lossy_kept")},
    }
    assert "greedy" in {record["point"] for record in records_of(alone)}
    assert {record["num_cached_tokens"] > 0 for record in records_of(alone)} == {True}  # prompts of all points alike


def test_a_drafter_without_probabilities(pair_config: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    config = write_config(tmp_path / "ngram.yaml", {"kind": "ngram"}, pair_config.parent / "target")
    ran = evaluate(config, "--quick", "--rules", "token_v2,opt")
    assert list(ran.summary["points"]) == ["target", "exact", "token_v2=0.1"]
    assert ran.summary["skipped"].keys() == {"lossy", "opt", "drafter"}
    assert "Skipped: opt, since it reads the drafter's probabilities" in ran.result.stderr
    assert ran.summary["is_quick"] is True


def test_gsm8k_counts_right_answers(pair_config: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps({"question": f"{i}?", "answer": f"#### {i}"}) + "\n" for i in range(3)))
    ran = evaluate(pair_config, "--task", "gsm8k", "--data", str(file), "--quick", "--rules", "exact")
    assert ran.points["exact"]["figures"]["passed"]["median"] in (0, 1 / 3, 2 / 3, 1)
    assert "passed (higher is better)" in ran.table["criterion"]


def test_humaneval_runs_programs_only_when_told_to(pair_config: Path, evaluate: Evaluate, tmp_path: Path) -> None:
    file = tmp_path / "problems.jsonl"
    file.write_text(json.dumps({"task_id": "T/0", "prompt": "def f():\n", "entry_point": "f", "test": "def check(f):\n    f()\n"}))
    command = ("--task", "humaneval", "--data", str(file), "--quick", "--rules", "exact")
    refused = evaluate(pair_config, *command)
    assert (refused.result.exit_code, refused.result.stderr.count("\n")) == (2, 1)
    assert "--allow-code-execution" in refused.result.stderr
    ran = evaluate(pair_config, *command, "--allow-code-execution")
    assert ran.points["exact"]["figures"]["passed"] is not None
    assert set(ran.table["sandbox"]) == {"network", "processes", "files", "user"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--task", "sums"), "Error: --task sums: there is none of that name; there are chat, gsm8k, humaneval."),
        (("--task", "gsm8k"), "Error: --task gsm8k needs --data FILE: JSON lines with question and answer."),
        (("--rules", "tokenv3"), "Error: --rules tokenv3: there is no such rule;"),
        (("--alphas", "opt=x"), "Error: --alphas opt=x: not a number."),
        (("--num-prompts", "99"), "Error: --num-prompts 99: there are 24, and none is asked twice."),
        (("--max-tokens", "4000"), "Error: Prompt "),
        (("--category", "sports"), "Error: --category sports: no prompt has it;"),
    ],
)
def test_what_cannot_be_run_is_one_line(options: tuple[str, ...], message: str, pair_config: Path, evaluate: Evaluate) -> None:
    ran = evaluate(pair_config, *options)
    assert ran.result.exit_code == 2
    assert ran.result.stderr.splitlines()[-1].startswith(message)
    assert ran.result.stdout == ""


def test_debug_shows_where_an_error_came_from(tmp_path: Path, evaluate: Evaluate) -> None:
    assert isinstance(evaluate(tmp_path / "no.yaml", "--debug").result.exception, ConfigError)
    assert "no.yaml cannot be read" in evaluate(tmp_path / "no.yaml").result.stderr


def test_without_matplotlib_it_is_said_before_anything_is_measured(
    pair_config: Path, evaluate: Evaluate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    ran = evaluate(pair_config, *FEW, plots=True)
    assert ran.result.exit_code == 2
    assert "pip install 'cascade-serve[evaluate]', or leave them out with --no-plots" in ran.result.stderr


def test_help_needs_no_torch() -> None:
    code = "import sys, benchmarks.evaluate.command; sys.exit(any(name in sys.modules for name in ('torch', 'matplotlib')))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
