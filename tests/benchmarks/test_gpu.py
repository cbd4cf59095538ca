"""The bars of a GPU on tiny shapes and a CPU: that all of it runs, what it compares, and what is left of a run that is cut off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from benchmarks import gpu, gpu_bars
from benchmarks.errors import BenchmarkError
from benchmarks.gpu import app
from benchmarks.gpu_bars import GPU_MEASURES
from benchmarks.gpu_models import FULL, TINY, AgreeingPair, Asked, Models, bisect, first_layers, pass_operations, random_model, read_bytes
from benchmarks.gpu_predictions import BARS
from benchmarks.gpu_rates import busy_seconds, copy_rate, covered, matrix_rate
from benchmarks.gpu_setting import Decoding, GpuSetting
from benchmarks.measuring import BarSkipped, Measured
from benchmarks.programs import Run
from benchmarks.stats import Estimate
from benchmarks.turns import Sides, Turns, in_turns

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pair() -> AgreeingPair:
    return AgreeingPair(TINY, CPU)


def setting_of(tmp_path: Path) -> GpuSetting:
    return GpuSetting(Models(TINY, CPU), tmp_path / "absent.yaml", repetitions=1, seconds=60)


def test_every_bar_has_a_measure() -> None:
    assert list(BARS) == list(GPU_MEASURES)


def test_shapes_are_those_that_are_named() -> None:
    """Parameters of Llama 3.1 8B, and the share of its bytes that the first layer and the head are."""
    meta = torch.device("meta")
    target, small = random_model(FULL.target, FULL.dtype, meta), random_model(FULL.drafter, FULL.dtype, meta)
    assert sum(weight.numel() for weight in target.parameters()) == 8_030_261_248
    assert read_bytes(target) == pytest.approx(15.0e9, rel=0.01)
    layer = sum(weight.nbytes for weight in target.model.layers[0].parameters())
    assert (layer + target.lm_head.weight.nbytes) / sum(weight.nbytes for weight in target.parameters()) == pytest.approx(0.093, abs=0.001)
    assert read_bytes(small) == pytest.approx(1.14e9, rel=0.01)
    assert pass_operations(target, 8192) == pytest.approx(132e12, rel=0.01)


def test_a_pass_has_the_operations_that_its_products_have() -> None:
    """Against torch's own count, which takes attention for that of all with all."""
    from torch.utils.flop_counter import FlopCounterMode

    model, num = random_model(TINY.target, torch.float32, CPU), 16
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, num, dtype=torch.long), use_cache=False)
    config = model.config
    attention = 4 * num**2 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    head = 2 * model.lm_head.weight.numel()
    assert pass_operations(model, num) - attention / 2 - head in (
        counter.get_total_flops() - num * head - attention,  # attention counted
        counter.get_total_flops() - num * head,  # a kernel that it does not know
    )


def test_the_drafter_is_the_targets_first_layer_and_both_scale_together(pair: AgreeingPair) -> None:
    ids = torch.arange(10).unsqueeze(0)

    def rows(model: object) -> torch.Tensor:
        with torch.inference_mode():
            return model(ids, use_cache=False).logits[0]  # type: ignore[operator,no-any-return]

    pair.scale(0.0)
    torch.testing.assert_close(rows(pair.model), rows(pair.drafting_model))
    assert pair._share_at(0.0) == 1.0, "the engine's own copies scale with transformers'"
    pair.scale(3.0)
    assert (rows(pair.model) - rows(pair.drafting_model)).abs().max() > 0.01
    assert pair.drafting_model.lm_head.weight.data_ptr() == pair.model.lm_head.weight.data_ptr()
    assert first_layers(pair.model, 2).config.num_hidden_layers == 2


@pytest.mark.parametrize("goal", [0.6, 0.8])
def test_agreement_is_tuned(pair: AgreeingPair, goal: float) -> None:
    found = pair.agree(goal)
    assert found["tuned_agreement"] == pytest.approx(goal, abs=2 * TINY.tolerance)
    assert pair._share_at(found["factor"]) == pytest.approx(goal, abs=0.2), "with other prompts, too"


def test_a_share_is_found_wherever_it_is() -> None:
    assert bisect(lambda x: 1 / (1 + x), 0.25, 0.001)[0] == pytest.approx(3.0, rel=0.02)
    assert bisect(lambda x: 1 / (1 + 1000 * x), 0.8, 0.001)[1] == pytest.approx(0.8, abs=0.001)
    with pytest.raises(BenchmarkError, match="reached nowhere"):
        bisect(lambda x: 1.0, 0.8, 0.01)
    with pytest.raises(BenchmarkError, match="the nearest was"):
        bisect(lambda x: 1.0 if x < 0.3 else 0.0, 0.5, 0.01)


def test_overlaps_are_covered_once() -> None:
    assert covered([(0, 2), (1, 3), (1.5, 2), (5, 6)]) == 4
    assert covered([]) == 0


def test_rates_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1e8 < copy_rate(CPU, 1 << 20) < 1e12
    assert 1e6 < matrix_rate(CPU, torch.float32, 64) < 1e14
    seconds, num = busy_seconds(CPU, lambda: torch.ones(1000).sum())
    assert 0 < seconds < 1
    assert num > 1
    with pytest.raises(BarSkipped, match="saw no kernels"):
        busy_seconds(CPU, lambda: None)


def test_turns_end_when_their_time_is_over() -> None:
    def slow(i: int) -> int:
        time.sleep(0.02)
        return i

    def rows(seconds: float) -> list[list[list[int]]]:
        return in_turns(Sides(lambda i: i, [slow]), Turns(3, 3, lambda: None, seconds))

    assert rows(60) == [[[0], [1], [2]]] * 3
    assert rows(0) == [[[0]]], "one prompt is measured in any case"
    assert rows(0.09) == [[[0], [1], [2]]], "an incomplete repetition is left out"


def test_a_batch_decodes_what_was_asked(tmp_path: Path) -> None:
    setting = setting_of(tmp_path)
    batch = Decoding(setting.program(Asked(3, 60)), setting.prompts(3, 40), 20)
    before = batch.num_context
    assert before >= 3 * 41
    assert batch.seconds(2) > 0
    assert batch.num_context == before + 6
    with pytest.raises(BenchmarkError, match="ended while"):
        batch.seconds(20)
    batch.close()


def test_streams_that_were_begun_together_count_as_one() -> None:
    one = gpu_bars._as_one([Run((1, 2), 2.0, 1.0, 1, 2, 4, 1), Run((3, 4, 5), 3.0, 1.0, 1, 3, 2, 2)])
    assert (one.tokens_per_second, one.num_target_calls, one.num_draft, one.num_accepted) == (5 / 3, 5, 6, 3)


def test_the_command_runs_all_bars_on_a_cpu(tiny_config: Path, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    arguments = ["--device", "cpu", "--shape", "tiny", "--repetitions", "1", "--budget", "2", "--config", str(tiny_config)]
    result = CliRunner().invoke(app, [*arguments, "--output", str(out)])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert report == json.loads(out.read_text()) | {"environment": report["environment"]}
    assert report["is_quick"], "so that the table of results refuses it"
    found = {each["name"]: each for each in report["bars"]}
    assert list(found) == list(BARS)
    assert "there is none for cpu" in found.pop("fp8")["skipped"]
    assert "Triton is not installed" in (why := found.pop("fused")["skipped"]) or "run on a CUDA device" in why
    if found["int8"]["skipped"]:
        assert "quantization: 'int8'" in found.pop("int8")["skipped"]
    for name, each in found.items():
        assert each["value"]["median"] > 0 or name == "idle-32", each
        assert each["predicted"] == BARS[name].predicted
    tuned = [line for line in report["headline"] if "agreement tuned to" in line]
    assert len(tuned) == 10, "wherever a figure hangs on it, it is said"
    assert found["agreement-0.7"]["detail"]["tuned_agreement"] == pytest.approx(0.7, abs=2 * TINY.tolerance)
    assert 0 < found["agreement-0.8"]["detail"]["accepted_of_drafts"] < 1
    generate = found["generate"]["detail"]
    assert generate["equal_answers"] == generate["answers"], "greedy answers are those of generate"
    assert found["generate-assisted"]["detail"]["equal_answers"] == generate["answers"]


def test_a_bar_that_fails_costs_no_other_and_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, seen = tmp_path / "gpu.json", list[int]()

    def good(setting: GpuSetting) -> Measured:
        seen.append(len(json.loads(out.read_text())["bars"]) if out.exists() else 0)
        return Measured(Estimate(70.0, 69.0, 71.0), (70.0,))

    def bad(setting: GpuSetting) -> Measured:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(gpu_bars, "GPU_MEASURES", {"decode-1": good, "prefill": bad, "decode-64": good})
    arguments = ["--device", "cpu", "--shape", "tiny", "--output", str(out)]
    result = CliRunner().invoke(app, [*arguments, "--bar", "decode-1", "--bar", "prefill", "--bar", "decode-64"])
    assert result.exit_code == 2
    assert seen == [0, 2]
    report = json.loads(out.read_text())
    assert [each["failed"] for each in report["bars"]] == [None, "OutOfMemoryError: CUDA out of memory", None]
    assert [each["is_met"] for each in report["bars"]] == [False, None, True]
    assert "predicted 70 %" in result.stderr
    assert "(+0 %)" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bar", "high"], "--bar high: there is none of that name"),
        (["--shape", "huge", "--device", "cpu"], "--shape huge: there are full and tiny"),
        (["--device", "abacus"], "engine.device: 'abacus' - must be"),
    ],
)
def test_what_cannot_be_run_is_one_line(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert said in result.stderr


def test_a_deployment_whose_model_is_not_here_is_skipped(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text("model: {name: x, target: {source: package:no_such_module/file.gguf}}\n")
    with pytest.raises(BarSkipped, match="no_such_module is not installed"):
        GPU_MEASURES["real-text"](GpuSetting(Models(TINY, CPU), file, 1, 60))


def test_predictions_have_their_arithmetic() -> None:
    assert all(bar.predicted > 0 and bar.why for bar in BARS.values())


def test_the_page_says_what_is_promised_and_predicted() -> None:
    page = (Path(gpu.__file__).parent / "README.md").read_text("utf-8")
    for name, bar in BARS.items():
        assert f"| {name} | {bar.text} | {bar.predicted:g}{bar.unit} | {bar.why} |" in page


def test_the_script_runs_every_bar_once() -> None:
    """In pieces, and what stands behind a name is a piece's own file."""
    script = (Path(gpu.__file__).parent / "gpu.sh").read_text("utf-8")
    pieces = [line.split(") bars ")[1].removesuffix(" ;;") for line in script.splitlines() if ") bars " in line]
    named = [name for piece in pieces for name in piece.split()[1:]]
    assert sorted(named) == sorted(BARS)


def test_a_piece_is_run(tmp_path: Path) -> None:
    """Without a GPU: the one line that says so, and the exit code of what cannot be run."""
    script = Path(gpu.__file__).parent / "gpu.sh"
    environment = {**os.environ, "PYTHON": sys.executable, "OUT": str(tmp_path)}
    found = subprocess.run(
        ["sh", str(script), "text", "nonsense"], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert found.returncode == 2
    assert "== text" in found.stderr
    assert "There is no piece nonsense" in found.stderr
    assert "torch sees 0 CUDA devices here" in found.stderr or torch.cuda.is_available()
