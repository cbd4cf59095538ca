"""`python -m benchmarks.peers.openai --peer ours=URL --peer other=URL`: the same load on several servers, and ratios to the first.

Whatever serves OpenAI's API is a peer: vLLM, SGLang, llama.cpp's server. In each round every peer gets the whole load, one peer at a time;
who is first changes with the round. Latencies are compared request by request, throughput round by round.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from statistics import median
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from benchmarks import options
from benchmarks.body import BodyMaker
from benchmarks.client import HttpTarget, base_url_of, open_client
from benchmarks.environment import Environment, environment
from benchmarks.errors import BenchmarkError
from benchmarks.figures import Figures, figures_of
from benchmarks.load import Answer, LoadResult
from benchmarks.options import LoadOptions, PromptOptions, extra_fields, require_askable
from benchmarks.output import write
from benchmarks.prompts import Prompt
from benchmarks.serve import NO_MODEL, send, server_target, warm_up
from benchmarks.stats import Estimate, estimate
from server.cli import one_line_errors

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@dataclass(frozen=True)
class Peer:
    """A server by a name for the table."""

    name: str
    base_url: str
    model: str  # empty: its first one


class Ratios(msgspec.Struct, frozen=True):
    """A peer over the first one. Of latencies below 1 is better, of throughput above 1."""

    ttft: Estimate | None  # None where no request succeeded on both
    tpot: Estimate | None
    e2e: Estimate | None
    output_throughput: float | None
    equal_texts: int  # of `pairs`
    pairs: int


class PeerResult(msgspec.Struct, frozen=True):
    """What a peer did, round by round."""

    name: str
    url: str
    model: str
    fingerprint: str | None
    rounds: tuple[Figures, ...]
    over_first: Ratios | None  # None for the first


class PeersReport(msgspec.Struct, frozen=True):
    """What a run leaves behind."""

    benchmark: str
    headline: tuple[str, ...]
    environment: Environment
    load: dict[str, Any]
    peers: tuple[PeerResult, ...]


@dataclass(frozen=True)
class Plan:
    """The load that every peer gets."""

    maker: BodyMaker
    prompts: list[Prompt]
    load: LoadOptions
    rounds: int
    warmup: int
    api_key: str | None
    timeout: float


@app.command()
def run(
    peer: Annotated[list[str], typer.Option(metavar="NAME=URL", help="A server, perhaps with ,MODEL behind it. At least two.")],
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", metavar="KEY", show_envvar=True, help="For all of them.")] = None,
    endpoint: options.EndpointName = "chat",
    prompts: options.Prompts = None,
    category: options.Category = None,
    random_input_len: options.RandomInputLen = None,
    num_requests: options.NumRequests = None,
    concurrency: Annotated[int | None, typer.Option(metavar="N", min=1, help="Closed loop: N requests are open. Default: 1.")] = None,
    request_rate: Annotated[float | None, typer.Option(metavar="R", min=0.001, help="Open loop: R requests a second, Poisson.")] = None,
    max_tokens: options.MaxTokens = 128,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = None,
    ignore_eos: options.IgnoreEos = False,
    rounds: Annotated[int, typer.Option(metavar="N", min=1, help="How often each peer gets the load.")] = 3,
    warmup: options.Warmup = 1,
    timeout: options.Timeout = 600.0,
    output: options.Output = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,
) -> None:
    """Compare servers under the same load."""
    console = Console(stderr=True)
    with one_line_errors(debug):
        plan = Plan(
            maker=BodyMaker(NO_MODEL, endpoint, max_tokens, temperature, seed, extra_fields(ignore_eos, None)),
            prompts=PromptOptions(prompts, category, random_input_len, num_requests, seed).choose(),
            load=LoadOptions(concurrency, request_rate, None, seed),
            rounds=rounds,
            warmup=warmup,
            api_key=api_key,
            timeout=timeout,
        )
        report = asyncio.run(measure(parse_peers(peer), plan, console))
        console.print(_table(report))
        print(msgspec.json.encode(report).decode(), flush=True)
        if output is not None:
            write(output, msgspec.to_builtins(report))
    if any(figures.all.num_requests == figures.all.num_failed for result in report.peers for figures in result.rounds):
        raise typer.Exit(1)


def parse_peers(texts: Sequence[str]) -> list[Peer]:
    """Raises BenchmarkError."""
    peers = []
    for text in texts:
        match = re.fullmatch(r"([^=]+)=([^,]+)(?:,(.+))?", text)
        if match is None:
            raise BenchmarkError(f"--peer {text}: write NAME=URL, or NAME=URL,MODEL.")
        peers.append(Peer(match[1], base_url_of(match[2]), match[3] or NO_MODEL))
    if len({peer.name for peer in peers}) < len(peers) or len(peers) < 2:
        raise BenchmarkError("--peer is given at least twice, each time with a name of its own.")
    return peers


async def measure(peers: Sequence[Peer], plan: Plan, console: Console) -> PeersReport:
    """Give every peer the load in every round. Raises BenchmarkError where a peer cannot be asked at all."""
    plan.load.plan(1)  # mistakes on the command line are said before anything is sent
    require_askable(plan.maker, plan.prompts)
    async with AsyncExitStack() as exits:
        targets = []
        for peer in peers:
            client = await exits.enter_async_context(open_client(plan.api_key, plan.timeout))
            targets.append(await server_target(client, peer.base_url, replace(plan.maker, model=peer.model)))
            await warm_up(targets[-1], plan.warmup)
        rounds = [await _round(targets, number, plan, console) for number in range(plan.rounds)]
    results = tuple(_result(peer, targets[i], i, rounds, plan) for i, peer in enumerate(peers))
    load = {"requests": len(plan.prompts), "rounds": plan.rounds, "max_tokens": plan.maker.max_tokens, "endpoint": plan.maker.endpoint}
    return PeersReport("peers.openai", _headline(results), environment("python -m benchmarks.peers.openai"), load, results)


async def _round(targets: Sequence[HttpTarget], number: int, plan: Plan, console: Console) -> list[LoadResult]:
    """What each target made of the load, in the order of the targets."""
    first = number % len(targets)
    found = {i: await send(targets[i], plan.prompts, plan.load, console) for i in (*range(first, len(targets)), *range(first))}
    return [found[i] for i in range(len(targets))]


def _result(peer: Peer, target: HttpTarget, index: int, rounds: Sequence[Sequence[LoadResult]], plan: Plan) -> PeerResult:
    own = [results[index] for results in rounds]
    figures = tuple(figures_of(result, is_open=plan.load.is_open) for result in own)
    answers = [outcome.result for outcome in own[0].outcomes if isinstance(outcome.result, Answer)]
    return PeerResult(
        name=peer.name,
        url=peer.base_url,
        model=target.maker.model,
        fingerprint=answers[0].fingerprint if answers else None,
        rounds=figures,
        over_first=ratios([results[0] for results in rounds], own) if index else None,
    )


def ratios(first: Sequence[LoadResult], other: Sequence[LoadResult]) -> Ratios:
    """Of requests that succeeded on both; a request's ratio is the median over the rounds."""
    pairs: dict[int, list[tuple[Answer, Answer]]] = {}
    for ours, theirs in zip(first, other, strict=True):
        for a, b in zip(ours.outcomes, theirs.outcomes, strict=True):
            if isinstance(a.result, Answer) and isinstance(b.result, Answer):
                pairs.setdefault(a.number, []).append((a.result, b.result))
    rates = [(_rate(ours), _rate(theirs)) for ours, theirs in zip(first, other, strict=True)]
    return Ratios(
        ttft=_over(pairs, lambda answer: answer.ttft),
        tpot=_over(pairs, lambda answer: answer.tpot),
        e2e=_over(pairs, lambda answer: answer.e2e),
        output_throughput=median(b / a for a, b in rates) if all(a for a, _ in rates) else None,
        equal_texts=sum(a.text == b.text for of_request in pairs.values() for a, b in of_request),
        pairs=sum(map(len, pairs.values())),
    )


def _over(pairs: dict[int, list[tuple[Answer, Answer]]], metric: Callable[[Answer], float | None]) -> Estimate | None:
    values = []
    for of_request in pairs.values():
        both = [(metric(a), metric(b)) for a, b in of_request]
        known = [b / a for a, b in both if a and b is not None]
        if known:
            values.append(median(known))
    return estimate(values) if values else None


def _rate(result: LoadResult) -> float:
    return figures_of(result).output_tokens_per_second


def _table(report: PeersReport) -> Table:
    table = Table(title=f"{report.load['requests']} requests, {report.load['rounds']} rounds, medians", title_justify="left")
    columns = ("peer", "failed", "output tokens/s", "TTFT ms", "TPOT ms", "over the first: tokens/s", "TTFT", "TPOT", "equal texts")
    for column in columns:
        table.add_column(column, justify="left" if column == "peer" else "right")
    for result in report.peers:
        table.add_row(*_cells(result))
    return table


def _cells(result: PeerResult) -> list[str]:
    rounds, over = result.rounds, result.over_first
    failed = sum(figures.all.num_failed for figures in rounds)
    ttft = [figures.all.ttft_ms.median for figures in rounds if figures.all.ttft_ms]
    tpot = [figures.all.tpot_ms.median for figures in rounds if figures.all.tpot_ms]
    rate = f"{median(figures.output_tokens_per_second for figures in rounds):.1f}"
    own = [result.name, str(failed), rate, f"{median(ttft):.1f}" if ttft else "-", f"{median(tpot):.1f}" if tpot else "-"]
    if over is None:
        return [*own, "", "", "", ""]
    throughput = "-" if over.output_throughput is None else f"{over.output_throughput:.2f}x"
    return [*own, throughput, _interval(over.ttft), _interval(over.tpot), f"{over.equal_texts} of {over.pairs}"]


def _headline(results: Sequence[PeerResult]) -> tuple[str, ...]:
    return tuple(
        f"{result.name} over {results[0].name}: TTFT {_interval(result.over_first.ttft)}, TPOT {_interval(result.over_first.tpot)}"
        for result in results
        if result.over_first is not None
    )


def _interval(value: Estimate | None) -> str:
    return "-" if value is None else f"{value.median:.2f}x ({value.low:.2f} to {value.high:.2f})"


if __name__ == "__main__":
    app()
