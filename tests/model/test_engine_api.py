"""The engine as a library: batches, streams, refusals; and that naming it loads nothing heavy."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import engine
from engine import Answer, Engine, EngineConfig, FinishReason, Request, SamplingParams, SpeculationParams
from engine.errors import ClientError, ContextLengthExceeded, EngineDead, InvalidRequest
from engine.model.loader import quiet_transformers
from tests.reference import answer
from tests.tiny import drafter_model, naive_target, target_model

ROOT = Path(__file__).parents[2]
PROMPTS = [[i % 20, i % 7, 3] for i in range(10)]
GREEDY = SamplingParams(max_tokens=12, temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pair")
    with quiet_transformers():
        target_model().save_pretrained(path / "target")
        drafter_model().save_pretrained(path / "drafter")
    return path


@pytest.fixture(scope="module")
def running(folder: Path) -> Engine:
    """Two answers at a time, so that the others wait."""
    return Engine(
        EngineConfig.model_validate(
            {
                "model": {
                    "name": "tiny",
                    "target": {"source": str(folder / "target"), "dtype": "float64"},
                    "drafter": {"kind": "model", "source": str(folder / "drafter"), "dtype": "float64"},
                },
                "speculation": {"draft_length": {"policy": "fixed", "max": 4}},
                "engine": {"device": "cpu", "max_sequences": 2, "kv_cache": "128KiB"},
            }
        )
    )


def test_answers_are_the_naive_loops_in_order(running: Engine) -> None:
    progress: list[tuple[int, int]] = []
    answers = running.generate(PROMPTS, GREEDY, on_progress=lambda *numbers: progress.append(numbers))
    requests = [Request(id=str(i), prompt_ids=tuple(prompt), sampling=GREEDY) for i, prompt in enumerate(PROMPTS)]
    assert [made.token_ids for made in answers] == [answer(request, naive_target()) for request in requests]
    assert progress == [(i + 1, len(PROMPTS)) for i in range(len(PROMPTS))]
    for made in answers:
        assert made.finish_reason is FinishReason.LENGTH
        assert made.num_drafter_calls > 0
        assert 0 < made.num_accepted_tokens <= made.num_draft_tokens
        assert len(made.token_ids) == made.num_accepted_tokens + made.num_target_calls, "a pass of the target adds one token of its own"


def test_without_speculation_the_target_writes_alone(running: Engine) -> None:
    (made,) = running.generate([[1, 2, 3]], GREEDY, SpeculationParams(enabled=False))
    assert made == Answer(made.token_ids, FinishReason.LENGTH, 12, 0, 0, 0, made.num_cached_tokens)


def test_each_prompt_has_a_seed_of_its_own_unless_one_was_given(running: Engine) -> None:
    sampling = SamplingParams(max_tokens=30, temperature=1)
    free = running.generate([[1, 2]] * 2, sampling)
    assert free[0].token_ids != free[1].token_ids
    seeded = running.generate([[1, 2]] * 2, SamplingParams(max_tokens=30, temperature=1, seed=3, is_seeded=True))
    assert seeded[0].token_ids == seeded[1].token_ids


def test_prompts_are_cached_for_those_with_the_same_salt(running: Engine) -> None:
    def asked(id: str, salt: str) -> int:
        request = Request(id=id, prompt_ids=tuple(range(3, 20)) * 2, sampling=GREEDY, cache_salt=salt)
        return max(delta.num_cached_tokens for delta in running.stream([request]))

    assert [asked(f"{salt} {i}", salt) for salt in ("", "mine", "yours") for i in range(2)] == [0, 32] * 3


def test_nothing_runs_if_one_prompt_cannot_be_served(running: Engine) -> None:
    with pytest.raises(ContextLengthExceeded):
        running.generate([[1], [1] * 60], GREEDY)
    with pytest.raises(ClientError, match="no tokens"):
        running.stream([Request(id="a", prompt_ids=(), sampling=GREEDY)])
    with pytest.raises(InvalidRequest, match="same id"):
        running.stream([Request(id="a", prompt_ids=(1,), sampling=GREEDY)] * 2)
    assert running.generate([], GREEDY) == []


def test_a_stream_that_is_left_aborts_the_rest(running: Engine) -> None:
    requests = [Request(id=str(i), prompt_ids=tuple(prompt), sampling=GREEDY) for i, prompt in enumerate(PROMPTS)]
    stream = running.stream(requests)
    first = next(stream)
    assert (first.request_id, first.choice) == ("0", 0)
    with pytest.raises(InvalidRequest, match="one call at a time"):
        running.generate([[1]], GREEDY)
    stream.close()  # type: ignore[attr-defined]  # it is a generator
    (again,) = running.generate(PROMPTS[:1], GREEDY)
    assert again.token_ids[: len(first.token_ids)] == first.token_ids


def test_the_readmes_example(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (example,) = [block for block in blocks if "from engine import" in block]
    code = re.sub(r'"package:[^"]+"', repr(str(folder / "target")), example)
    assert code != example
    scope: dict[str, Engine] = {}
    exec(code, scope)
    assert re.fullmatch(r"(\(\d+, [\d, ]+\) \w+ \d+\n){2}", capsys.readouterr().out)
    with pytest.raises(EngineDead, match="closed"):
        _ = scope["engine"].info


def test_naming_the_package_loads_no_torch() -> None:
    code = """
import sys
import engine.request, engine.errors
from engine import EngineConfig, ProcessClient, Request, ThreadClient
sys.exit(any(name in sys.modules for name in ("torch", "transformers", "numpy")))
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_every_name_of_the_package_is_there() -> None:
    assert {getattr(engine, name).__name__ for name in engine.__all__} == set(engine.__all__)
    assert set(engine.__all__) <= set(dir(engine))
    with pytest.raises(AttributeError, match="no attribute 'Engines'"):
        _ = engine.Engines  # type: ignore[attr-defined]
