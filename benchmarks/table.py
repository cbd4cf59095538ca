"""Figures as tables for people. JSON for programs is written elsewhere, from the same structs."""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from benchmarks.figures import Figures, Goodput, Group
from benchmarks.stats import Summary


def totals_table(figures: Figures, title: str) -> Table:
    """Counts, throughput and drafting."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("value", justify="right")
    for what, value in _totals(figures):
        table.add_row(what, value)
    return table


def latency_table(figures: Figures) -> Table:
    """Latencies in milliseconds."""
    table = Table(title="Milliseconds", title_justify="left")
    for column in ("", "mean", "median", "p95", "p99"):
        table.add_column(column, justify="left" if not column else "right")
    whole = figures.all
    rows = (
        ("time to first token (TTFT)", whole.ttft_ms),
        ("time per output token (TPOT)", whole.tpot_ms),
        ("gap between deliveries (ITL)", whole.itl_ms),
        ("end to end (E2E)", whole.e2e_ms),
        ("waiting to be sent", figures.client_wait_ms),
    )
    for name, summary in rows:
        if summary is not None:
            table.add_row(name, *(f"{value:,.1f}" for value in (summary.mean, summary.median, summary.p95, summary.p99)))
    return table


def category_table(categories: dict[str, Group]) -> Table:
    """Medians by category."""
    table = Table(title="By category (medians, milliseconds)", title_justify="left")
    for column in ("category", "ok", "failed", "TTFT", "TPOT", "E2E", "accepted", "tokens a round"):
        is_wide = column in ("category", "tokens a round")  # these wrap where the terminal is narrow, and no figure is cut
        table.add_column(column, justify="left" if column == "category" else "right", no_wrap=not is_wide, overflow="fold")
    for name, group in categories.items():
        accepted, length = _drafting(group)
        medians = (_median(group.ttft_ms), _median(group.tpot_ms), _median(group.e2e_ms))
        table.add_row(name, str(group.num_requests - group.num_failed), str(group.num_failed), *medians, accepted, length)
    return table


def _totals(figures: Figures) -> Iterator[tuple[str, str]]:
    whole = figures.all
    accepted, length = _drafting(whole)
    yield "requests ok", str(whole.num_requests - whole.num_failed)
    yield "requests failed", str(whole.num_failed)
    for failure in figures.failures:
        yield f"  {failure.kind}", str(failure.count)
    yield "duration", f"{figures.seconds:,.2f} s"
    yield "requests", f"{figures.requests_per_second:,.3f} /s"
    yield "output tokens", f"{figures.output_tokens_per_second:,.2f} /s"
    yield "prompt and output tokens", f"{figures.total_tokens_per_second:,.2f} /s"
    yield "prompt tokens", f"{whole.num_prompt_tokens:,} ({whole.num_cached_prompt_tokens:,} cached)"
    yield "output tokens, in all", f"{whole.num_output_tokens:,}"
    yield "drafts accepted", accepted
    yield "tokens a round with drafts", length
    calls = whole.tokens_per_target_call
    yield "tokens a target call, prompts included", "-" if calls is None else f"{calls:.2f}"
    if figures.goodput is not None:
        yield from _goodput(figures.goodput)


def _goodput(goodput: Goodput) -> Iterator[tuple[str, str]]:
    goals = ", ".join(f"{goal.metric} <= {1000 * goal.seconds:g} ms" for goal in goodput.goals)
    yield f"goodput ({goals})", f"{goodput.requests_per_second:,.3f} /s ({goodput.share:.0%})"


def _drafting(group: Group) -> tuple[str, str]:
    drafting = group.drafting
    return ("-", "-") if drafting is None else (f"{drafting.acceptance_rate:.1%}", f"{drafting.mean_accepted_length:.2f}")


def _median(summary: Summary | None) -> str:
    return "-" if summary is None else f"{summary.median:,.1f}"
