"""Several servers under one load, and an engine beside transformers' generate."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks.errors import BenchmarkError, RequestFailed
from benchmarks.load import LoadResult, Outcome
from benchmarks.peers import openai, transformers
from tests.benchmarks.conftest import fake_server
from tests.benchmarks.test_figures import ANSWER
from tests.fakes import Part, Script


async def test_two_servers_get_the_same_load_and_are_compared_request_by_request(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "peers.json"
    async with fake_server(folder) as (quick_url, quick), fake_server(folder) as (slow_url, slow):
        quick.script = Script(parts=[Part((70,))], endless=True, delay=0.001)
        slow.script = replace(quick.script, delay=0.02)
        peers = ("--peer", f"quick={quick_url}", "--peer", f"slow={slow_url},tiny:off")
        load = ("--num-requests", "4", "--rounds", "2", "--max-tokens", "6", "--concurrency", "2", "--output", str(out))
        result = await asyncio.to_thread(CliRunner().invoke, openai.app, [*peers, *load])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    assert report == json.loads(out.read_text())
    first, second = report["peers"]
    assert (first["over_first"], second["model"], len(second["rounds"])) == (None, "tiny:off", 2)
    assert second["over_first"]["tpot"]["median"] > 3
    assert second["over_first"]["output_throughput"] < 0.5
    assert (second["over_first"]["equal_texts"], second["over_first"]["pairs"]) == (8, 8)
    assert len(quick.requests) == len(slow.requests) == 9  # two rounds of four, and one to warm up
    assert {request.prompt_ids for request in quick.requests} == {request.prompt_ids for request in slow.requests}


def test_a_request_that_failed_on_one_side_is_in_no_ratio() -> None:
    def result(*results: Any) -> LoadResult:
        return LoadResult(tuple(Outcome(i, None, 0.0, one) for i, one in enumerate(results)), 1.0, 0.0)

    later = replace(ANSWER, delivered_at=(11.0,), ended_at=12.0)
    ratios = openai.ratios([result(ANSWER, ANSWER)], [result(later, RequestFailed("timeout", ""))])
    assert ratios.pairs == 1
    assert ratios.ttft is not None
    assert ratios.ttft.median == pytest.approx(1.0 / 0.5)
    assert openai.ratios([result(RequestFailed("timeout", ""))], [result(ANSWER)]).ttft is None


@pytest.mark.parametrize("texts", [["a=http://x"], ["a=http://x", "a=http://y"], ["http://x", "b=http://y"], ["a=x", "b=http://y"]])
def test_peers_are_two_with_names_of_their_own(texts: list[str]) -> None:
    with pytest.raises(BenchmarkError):
        openai.parse_peers(texts)


def test_an_engine_and_generate_give_the_same_greedy_tokens(tiny_config: Path) -> None:
    arguments = ["--config", str(tiny_config), "--num-requests", "3", "--max-tokens", "12", "--prefill-tokens", "40", "--repetitions", "2"]
    result = CliRunner().invoke(transformers.app, arguments)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout.splitlines()[-1])
    engine, plain, lookup = report["decoding"]
    assert (engine["name"], engine["engine_over_it"]) == ("engine, drafter ngram", None)
    assert [(peer["equal_answers"], peer["answers"]) for peer in (plain, lookup)] == [(6, 6), (6, 6)]
    assert plain["engine_over_it"]["low"] <= plain["engine_over_it"]["median"] <= plain["engine_over_it"]["high"]
    assert report["prefill"]["engine_seconds"] > 0
