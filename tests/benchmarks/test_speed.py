"""Speed bars on a tiny model: that they run, compare what they say, and skip with a reason. Their figures mean nothing here."""

from __future__ import annotations

import itertools
import json
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import bars, programs
from benchmarks.bars import MEASURES, SUMMARIES_AND_RETRIEVAL
from benchmarks.errors import BenchmarkError
from benchmarks.measuring import NO_DRAFTER, BarSkipped, Measured, Setting
from benchmarks.prompts import of_text
from benchmarks.served import ServedDeployment, serve
from benchmarks.speed import BARS, Bar, app
from engine.config import EngineConfig
from engine.model.loader import load as load_model


@pytest.fixture
def setting(tiny_config: Path, tmp_path: Path) -> Setting:
    return Setting(tiny_config, tmp_path / "absent.jsonl", tmp_path / "absent.jsonl", repetitions=1, is_quick=True)


def test_every_bar_has_a_measure() -> None:
    assert list(BARS) == list(MEASURES)


def test_a_bar_is_met_on_its_good_side() -> None:
    at_least, at_most = Bar("", 2.0, "at least"), Bar("", 2.0, "at most")
    assert [at_least.is_met(value) for value in (1.9, 2.0, 2.1)] == [False, True, True]
    assert [at_most.is_met(value) for value in (1.9, 2.0, 2.1)] == [True, True, False]


@pytest.mark.parametrize("name", ["one-stream", "prefill"])
def test_greedy_answers_equal_those_of_generate(name: str, setting: Setting) -> None:
    measured = MEASURES[name](setting)
    assert measured.detail["equal_answers"] == measured.detail["answers"] == 2
    assert measured.value.median > 0


def test_streams_and_windows_are_measured(setting: Setting) -> None:
    assert MEASURES["eight-streams"](setting).detail["tokens_per_second"] > 0
    window = MEASURES["forward-window"](setting)
    assert window.value.median == pytest.approx(window.detail["ms_of_6"] / window.detail["ms_of_1"], rel=1.0)


def test_drafts_change_no_text_and_absent_questions_skip_the_bar(setting: Setting, tmp_path: Path) -> None:
    with pytest.raises(BarSkipped, match=r"absent\.jsonl is not there; --data names"):
        MEASURES["ngram"](setting)
    questions = tmp_path / "absent.jsonl"
    lines = [{"question_id": number, "turns": [f"the the the {number}"]} for number in SUMMARIES_AND_RETRIEVAL]
    questions.write_text("\n".join(map(json.dumps, lines)))
    measured = MEASURES["ngram"](setting)
    assert measured.detail["ids"] == [245, 501]
    assert measured.detail["equal_answers"] == measured.detail["answers"]
    questions.write_text(json.dumps(lines[0]))
    with pytest.raises(BenchmarkError, match="lacks the questions 251"):
        MEASURES["ngram"](setting)


def test_perplexity_is_that_of_the_answers_alone(setting: Setting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the model's own loss, one token after the other; int8 of float32's own weights differs, float32 of itself does not."""
    file = tmp_path / "answers.jsonl"
    file.write_text("".join(json.dumps({"question": f"the {word} of", "answer": f"{word} is the {word}"}) + "\n" for word in ("a", "the")))
    monkeypatch.setattr(bars, "INT8", {})
    measured = MEASURES["int8-perplexity"](replace(setting, answers=file))
    assert (measured.value.low, measured.value.median, measured.value.high) == (1, 1, 1)
    core = programs.engine_program(setting.engine(NO_DRAFTER)).core
    question, answer = (5, 6, 7, 8), (9, 10, 11)
    theirs = load_model(Path(core.info.target_path), torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        rows = theirs(torch.tensor([question + answer])).logits[0, 3:6].log_softmax(-1)
    assert bars._loss(core, question, answer) == pytest.approx(-rows[range(3), answer].sum().item(), rel=1e-4)


@pytest.mark.parametrize("name", ["int8", "int8-perplexity"])
def test_a_processor_without_8_bit_products_skips_their_bars(name: str, setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.model.onednn.why_not_int8", lambda: "8-bit products saturate on this processor")
    with pytest.raises(BarSkipped, match="saturate on this processor"):
        MEASURES[name](setting)


def test_answers_that_end_at_once_leave_the_time_per_token_to_the_others(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [of_text(f"the the the {number}") for number in range(2)]
    monkeypatch.setattr(bars, "_chosen", lambda setting: questions)
    real, calls = programs.EngineProgram.answer, itertools.count()

    def answer(self: programs.EngineProgram, ids: Sequence[int], num_tokens: int, stops: bool = True) -> programs.Run:
        return real(self, ids, 1 if next(calls) < 2 else num_tokens, stops)

    monkeypatch.setattr(programs.EngineProgram, "answer", answer)
    assert MEASURES["ngram"](replace(setting, repetitions=2)).detail["without_prompts"] > 0


def test_tokens_that_come_with_the_first_have_no_time_of_their_own() -> None:
    run = programs.Run(token_ids=(1, 2, 3, 4, 5), seconds=3.0, first_seconds=1.0, num_first=3)
    assert run.seconds_per_token == 1.0
    with pytest.raises(BenchmarkError, match="behind the first"):
        _ = programs.Run((1, 2), 3.0, 1.0, num_first=2).seconds_per_token


def test_a_figure_that_the_prefix_cache_had_a_part_in_is_refused(setting: Setting) -> None:
    engine = programs.engine_program(setting.engine(NO_DRAFTER))
    encoder = programs.PromptEncoder(engine.info.target_path)
    prompt = of_text("the quick brown fox jumps over the lazy dog")
    first, second = encoder.new(prompt), encoder.new(prompt)
    engine.answer(first, 2)
    engine.answer(second, 2)
    with pytest.raises(BenchmarkError, match="prefix cache held"):
        engine.answer(first, 2)


def test_stopping_is_chosen(setting: Setting) -> None:
    """Without stops an answer has exactly as many tokens as were asked for."""
    engine = programs.engine_program(setting.engine(NO_DRAFTER))
    run = engine.answer(tuple(range(3, 20)), 9, stops=False)
    assert len(run.token_ids) == 9
    assert run.first_seconds is not None
    assert run.seconds_per_token == pytest.approx((run.seconds - run.first_seconds) / 8)


def test_a_server_is_started_looked_at_and_ended(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASCADE_API_KEYS", "sesame")  # of the user's own server; that of the bar must not ask for it
    measured = MEASURES["memory"](replace(setting, repetitions=2))
    assert len(measured.repetitions) == 2
    for (early, late), ratio in zip(measured.detail["resident_bytes"], measured.repetitions, strict=True):
        assert early > 10 << 20
        assert late / early == ratio
    assert 0.5 < measured.value.low <= measured.value.median <= measured.value.high < 2


def test_the_start_that_is_timed_is_of_the_deployment_as_it_is_and_not_the_first(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """A smaller KV cache would be there sooner."""
    asked: list[EngineConfig] = []

    @contextmanager
    def served(config: EngineConfig) -> Iterator[ServedDeployment]:
        asked.append(config)
        yield ServedDeployment(cast("subprocess.Popen[bytes]", None), "", float(len(asked)))

    monkeypatch.setattr(bars, "serve", served)
    assert MEASURES["start"](replace(setting, repetitions=3)).repetitions == (2, 3, 4)
    assert {config.engine.kv_cache for config in asked} == {4 << 20}


def test_a_server_that_cannot_start_is_one_line_with_its_last_words(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setattr("benchmarks.served._free_port", lambda: taken.getsockname()[1])
        with pytest.raises(BenchmarkError, match=r"did not become ready \(exit code 2\): .* is in use"), serve(setting.engine()):
            pass


def test_the_command_prints_json_last_and_writes_the_same(tiny_config: Path, tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    arguments = ["--quick", "--bar", "ngram", "--bar", "eight-streams", "--config", str(tiny_config), "--output", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--data", str(tmp_path / "no")])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert report == json.loads(out.read_text())
    skipped, measured = report["bars"]
    assert (skipped["value"], skipped["is_met"]) == (None, None)
    assert "no is not there" in skipped["skipped"]
    assert measured["value"]["median"] > 0
    assert report["headline"][0] == "ngram: skipped, bar at least 1.5x", "a bar that was asked for is in the table, without paths"
    assert report["headline"][1].startswith("eight-streams ")
    assert report["target"]["device"] == "cpu"


def test_a_bar_that_fails_leaves_what_the_others_measured(tiny_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(setting: Setting) -> Measured:
        raise BenchmarkError("the lamp went out")

    monkeypatch.setattr(bars, "MEASURES", {**MEASURES, "ngram": fail})
    out = tmp_path / "speed.json"
    arguments = ["--quick", "--bar", "eight-streams", "--bar", "ngram", "--config", str(tiny_config), "--output", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    report = json.loads(out.read_text())
    measured, failed = report["bars"]
    assert report["headline"][1] == "ngram: failed, bar at least 1.5x"
    assert measured["value"]["median"] > 0
    assert (failed["failed"], failed["value"], failed["is_met"]) == ("the lamp went out", None, None)
    assert "ngram: failed: the lamp went out" in result.stderr


def test_an_unwritable_file_does_not_lose_what_was_measured(tiny_config: Path, tmp_path: Path) -> None:
    arguments = ["--quick", "--bar", "eight-streams", "--config", str(tiny_config), "--output", str(tmp_path)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert json.loads(result.stdout.splitlines()[-1])["bars"][0]["value"]["median"] > 0
    assert "cannot be written: Is a directory" in result.stderr


def test_a_bad_deployment_is_one_line_before_anything_is_measured(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["--config", str(tmp_path / "no.yaml")])
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)


def test_an_unknown_bar_is_one_line() -> None:
    result = CliRunner().invoke(app, ["--bar", "high"])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.startswith("Error: --bar high: there is none of that name; there are one-stream")
