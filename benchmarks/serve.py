"""`cascade bench`: a load on a running server or on an engine in this process, as a table for people and as JSON for programs.

Standard output gets one line, the JSON object; everything for people goes to standard error. Exit codes: 0 measured, 1 every request
failed, 2 it could not be run as asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import httpx2
import msgspec
import typer
from rich.console import Console

from benchmarks import options
from benchmarks.body import BodyMaker
from benchmarks.client import PATHS, HttpTarget, base_url_of, open_client, served_models
from benchmarks.environment import Environment, environment
from benchmarks.errors import BenchmarkError, RequestFailed
from benchmarks.figures import Figures, Goal, answers_of, figures_of, parse_goal
from benchmarks.load import LoadResult, Outcome, Target, run_load
from benchmarks.options import LoadOptions, PromptOptions, extra_fields, require_askable
from benchmarks.output import progress_bar, write
from benchmarks.prompts import Prompt, random_words
from benchmarks.table import category_table, latency_table, totals_table

DEFAULT_URL = "http://127.0.0.1:8000"
NO_MODEL = ""  # to be asked for

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@dataclass(frozen=True)
class Source:
    """Who answers: a server, or a deployment that is loaded here."""

    url: str | None
    config: Path | None
    api_key: str | None
    timeout: float


@dataclass(frozen=True)
class Plan:
    """Everything that one run is."""

    source: Source
    maker: BodyMaker
    prompts: list[Prompt]
    load: LoadOptions
    goals: tuple[Goal, ...]
    warmup: int


class Report(msgspec.Struct, frozen=True):
    """What a run leaves behind."""

    benchmark: str
    headline: tuple[str, ...]
    environment: Environment
    target: dict[str, Any]
    load: dict[str, Any]
    figures: Figures


@app.command()
def bench(
    url: Annotated[str | None, typer.Option(metavar="URL", help=f"A server; a bare host gets /v1. Default: {DEFAULT_URL}.")] = None,
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="Instead of a server: load this deployment here; no HTTP.")] = None,
    model: Annotated[str | None, typer.Option(metavar="ID", help="Default: the first of /v1/models, or the deployment's name.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", metavar="KEY", show_envvar=True)] = None,
    endpoint: options.EndpointName = "chat",
    prompts: options.Prompts = None,
    category: options.Category = None,
    random_input_len: options.RandomInputLen = None,
    num_requests: options.NumRequests = None,
    concurrency: Annotated[int | None, typer.Option(metavar="N", min=1, help="Closed loop: N requests are open. Default: 1.")] = None,
    request_rate: Annotated[float | None, typer.Option(metavar="R", min=0.001, help="Open loop: R requests a second, Poisson.")] = None,
    max_concurrency: Annotated[int | None, typer.Option(metavar="N", min=1, help="Open loop: at most N are open, others wait.")] = None,
    max_tokens: options.MaxTokens = 128,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = None,
    ignore_eos: options.IgnoreEos = False,
    speculation: options.Speculation = None,
    warmup: options.Warmup = 1,
    goodput: Annotated[
        list[str] | None, typer.Option(metavar="GOAL", help="ttft:500ms, tpot:60ms or e2e:5s; several times for several goals.")
    ] = None,
    timeout: options.Timeout = 600.0,
    output: options.Output = None,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error came from.")] = False,  # read by `cascade`
) -> None:
    """Measure a running server, or an engine in this process.

    TTFT is the time from sending a request to its first text, E2E to its finish reason. TPOT is (E2E - TTFT) / (n - 1), n being the
    server's count of output tokens. ITL is the gap between two deliveries, of which each may hold several tokens. Answers that were
    cached are not excluded: see "cached" beside the prompt tokens.
    """
    if url is not None and config is not None:
        raise BenchmarkError("--url measures a server and --config an engine in this process; choose one.")
    plan = Plan(
        source=Source(url or (None if config else DEFAULT_URL), config, api_key, timeout),
        maker=BodyMaker(model or NO_MODEL, endpoint, max_tokens, temperature, seed, extra_fields(ignore_eos, speculation)),
        prompts=PromptOptions(prompts, category, random_input_len, num_requests, seed).choose(),
        load=LoadOptions(concurrency, request_rate, max_concurrency, seed),
        goals=tuple(map(parse_goal, goodput or ())),
        warmup=warmup,
    )
    report, outcomes = asyncio.run(measure(plan, Console(stderr=True)))
    finish(report, outcomes, output)


async def measure(plan: Plan, console: Console) -> tuple[Report, tuple[Outcome, ...]]:
    """Run a plan. Raises BenchmarkError or ConfigError where it cannot be begun."""
    plan.load.plan(1)  # mistakes on the command line are said before anything is loaded
    require_askable(plan.maker, plan.prompts)
    async with _opened(plan, console) as (target, about):
        await warm_up(target, plan.warmup)
        result = await send(target, plan.prompts, plan.load, console)
    figures = figures_of(result, plan.goals, plan.load.is_open)
    if plan.source.config is not None:
        figures = msgspec.structs.replace(figures, cpu_ms_per_token=None)  # it would be the engine's
    answers = answers_of(result.outcomes)
    about |= {"fingerprint": answers[0].fingerprint if answers else None}
    report = Report("serve", _headline(figures, plan), environment("cascade bench"), about, _load_entry(plan), figures)
    _print_tables(report, console)
    return report, result.outcomes


async def warm_up(target: Target, count: int) -> None:
    """Ask for something that no prompt of the load begins with. Raises RequestFailed."""
    for i in range(count):
        await target.ask(random_words(24, seed=-1 - i), i)


async def send(target: Target, asked: Sequence[Prompt], load: LoadOptions, console: Console) -> LoadResult:
    """Run a load under a progress bar, where somebody can see it."""
    with progress_bar(console, "Requests", len(asked)) as advance:
        return await run_load(target, asked, load.plan(len(asked)), lambda outcome: advance())


def finish(report: Report, outcomes: Sequence[Outcome], output: Path | None) -> None:
    """Write what is for programs, and end with 1 if nothing succeeded."""
    print(msgspec.json.encode(report).decode(), flush=True)
    if output is not None:
        write(output, msgspec.to_builtins(report) | {"requests": [_request_entry(outcome) for outcome in outcomes]})
    if not answers_of(outcomes):
        failure = report.figures.failures[0]
        Console(stderr=True).print(
            f"Error: all {len(outcomes)} requests failed; {failure.count} times {failure.kind}: {failure.example}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(1)


# ---------------------------------------------------------------------- who answers
@asynccontextmanager
async def _opened(plan: Plan, console: Console) -> AsyncIterator[tuple[Target, dict[str, Any]]]:
    """The target of a plan, and what is known of it."""
    source, maker = plan.source, plan.maker
    if source.config is not None:
        async with _engine(source.config, maker, console) as opened:
            yield opened
        return
    async with open_client(source.api_key, source.timeout) as client:
        base_url = base_url_of(source.url or DEFAULT_URL)
        target = await server_target(client, base_url, maker)
        yield target, {"kind": "server", "url": base_url, "model": target.maker.model, "device": None}


async def server_target(client: httpx2.AsyncClient, base_url: str, maker: BodyMaker) -> HttpTarget:
    """A server's endpoint; its first model where none was named. Raises RequestFailed."""
    if maker.model == NO_MODEL:
        models = await served_models(client, base_url)
        if not models:
            raise RequestFailed("malformed response", f"{base_url}/models lists none; name one with --model")
        maker = replace(maker, model=models[0])
    return HttpTarget(client, f"{base_url}/{PATHS[maker.endpoint]}", maker)


@asynccontextmanager
async def _engine(config: Path, maker: BodyMaker, console: Console) -> AsyncIterator[tuple[Target, dict[str, Any]]]:
    from benchmarks.inthread import EngineTarget, open_engine  # torch and transformers take seconds
    from engine.build import build
    from engine.client import ThreadClient
    from server.settings import load

    deployment = load(config, {})
    engine = ThreadClient(
        lambda: build(deployment.engine_part, lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True))
    )
    async with open_engine(engine, deployment) as serving:
        target = EngineTarget(serving, replace(maker, model=maker.model or deployment.model.name))
        device = f"{target.info.device}, {target.info.dtype}"
        yield target, {"kind": "thread", "config": str(config), "model": target.maker.model, "device": device}


# ---------------------------------------------------------------------- what is said
def _print_tables(report: Report, console: Console) -> None:
    figures, about = report.figures, report.target
    place = about.get("url") or about["config"]
    console.print(totals_table(figures, f"{about['model']} at {place}, {report.load['text']}"))
    if report.figures.all.e2e_ms is not None:
        console.print(latency_table(figures))
    if len(figures.categories) > 1:
        console.print(category_table(figures.categories))
    for failure in figures.failures:
        console.print(f"{failure.count} failed: {failure.kind}: {failure.example}", markup=False, highlight=False, soft_wrap=True)


def _headline(figures: Figures, plan: Plan) -> tuple[str, ...]:
    """The figures of a run that fit a line of a table."""
    whole = figures.all
    medians = (("TTFT", whole.ttft_ms), ("TPOT", whole.tpot_ms), ("E2E", whole.e2e_ms))
    return (
        _load_text(plan),
        f"{figures.output_tokens_per_second:.1f} output tokens/s",
        *(f"median {name} {summary.median:.1f} ms" for name, summary in medians if summary is not None),
        *((f"{whole.drafting.acceptance_rate:.0%} of drafts accepted",) if whole.drafting is not None else ()),
        *((f"{whole.num_failed} of {whole.num_requests} failed",) if whole.num_failed else ()),
    )


def _load_text(plan: Plan) -> str:
    load, maker = plan.load, plan.maker
    loop = f"{load.request_rate:g} requests/s" if load.is_open else f"concurrency {load.concurrency or 1}"
    return f"{len(plan.prompts)} requests, {loop}, at most {maker.max_tokens} tokens, temperature {maker.temperature:g}"


def _load_entry(plan: Plan) -> dict[str, Any]:
    return {
        "text": _load_text(plan),
        "num_requests": len(plan.prompts),
        "concurrency": None if plan.load.is_open else plan.load.concurrency or 1,
        "request_rate": plan.load.request_rate,
        "max_concurrency": plan.load.max_concurrency,
        "warmup": plan.warmup,
        "endpoint": plan.maker.endpoint,
        "max_tokens": plan.maker.max_tokens,
        "temperature": plan.maker.temperature,
        "seed": plan.maker.seed,
        "extra": dict(plan.maker.extra),
    }


def _request_entry(outcome: Outcome) -> dict[str, Any]:
    """One request as numbers; times in milliseconds."""
    head = {"number": outcome.number, "category": outcome.category}
    if isinstance(outcome.result, RequestFailed):
        return head | {"failure": outcome.result.kind, "message": outcome.result.message}
    answer = outcome.result
    return head | {
        "ttft_ms": 1000 * answer.ttft,
        "tpot_ms": None if answer.tpot is None else 1000 * answer.tpot,
        "e2e_ms": 1000 * answer.e2e,
        "itl_ms": [1000 * gap for gap in answer.gaps],
        "prompt_tokens": answer.num_prompt_tokens,
        "cached_tokens": answer.num_cached_tokens,
        "output_tokens": answer.num_output_tokens,
        "finish_reason": answer.finish_reason,
    }
