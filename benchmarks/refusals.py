"""`python -m benchmarks.refusals`: how soon a running server says no, at a fixed rate of requests that it refuses.

Each request goes out when it is due, whatever became of those before it, and its time counts from then. Standard output gets one line, a
JSON object; the table goes to standard error. A server without keys is not asked with a wrong one.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, cycle, islice
from typing import Annotated
from urllib.parse import urlsplit

import typer
from rich.console import Console
from rich.table import Table

from benchmarks.errors import BenchmarkError
from benchmarks.stats import percentile
from server.cli import one_line_errors

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

BODY = {"prompt": "What is the capital of France?", "max_tokens": 8}


@dataclass(frozen=True)
class Kind:
    """One kind of refused request, as it is sent."""

    status: int
    request: bytes
    keeps_connection: bool = True


@dataclass(frozen=True)
class Server:
    """Where it is."""

    host: str
    port: int
    model: str
    key: str | None

    def kinds(self) -> list[Kind]:
        """Every kind that this server refuses."""
        closing = self._post(b"", length=1 << 40)  # announced, and never sent
        return [
            Kind(400, self._post(_json(self.model, temperature=-1))),
            Kind(400, self._post(b'{"model": ')),
            Kind(404, self._post(_json("no such model"))),
            Kind(413, closing, keeps_connection=False),
            *([Kind(401, self._post(_json(self.model), key="wrong"))] if self.key else []),
        ]

    def _post(self, body: bytes, length: int | None = None, key: str | None = None) -> bytes:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {self.host}\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body) if length is None else length}\r\n"
        if (sent := key or self.key) is not None:
            head += f"Authorization: Bearer {sent}\r\n"
        return f"{head}\r\n".encode() + body


@dataclass
class Connections:
    """Open ones that are free."""

    server: Server
    free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = field(default_factory=list)

    async def ask(self, kind: Kind) -> None:
        """Raises BenchmarkError for another answer than the kind's."""
        reader, writer = self.free.pop() if self.free else await asyncio.open_connection(self.server.host, self.server.port)
        keeps = False
        try:
            writer.write(kind.request)
            head = await reader.readuntil(b"\r\n\r\n")
            status = int(head.split(b" ", 2)[1])
            lines = head.lower().split(b"\r\n")
            await reader.readexactly(next(int(line.split(b":")[1]) for line in lines if line.startswith(b"content-length:")))
            if status != kind.status:
                raise BenchmarkError(f"The server answered {status} where {kind.status} was expected.")
            keeps = kind.keeps_connection
        finally:
            if keeps:
                self.free.append((reader, writer))
            else:
                writer.close()

    async def close(self) -> None:
        for _, writer in self.free:
            writer.close()
        await asyncio.gather(*(writer.wait_closed() for _, writer in self.free), return_exceptions=True)


@dataclass(frozen=True)
class Figures:
    """Milliseconds from when a request was due to the end of its answer."""

    status: int
    num_requests: int
    p50_ms: float
    p99_ms: float
    max_ms: float


def _json(model: str, **fields: object) -> bytes:
    return json.dumps({"model": model, **BODY, **fields}).encode()


def figures(status: int, seconds: Sequence[float]) -> Figures:
    """Of some times."""
    times = [1000 * second for second in seconds]
    return Figures(status, len(times), percentile(times, 50), percentile(times, 99), max(times))


async def measure(server: Server, rate: float, seconds: float) -> list[Figures]:
    """Ask the kinds in turn, and then say of each, and of all (status 0), how long it took."""
    connections, kinds = Connections(server), server.kinds()
    for kind in kinds:  # the first answers of a process are its slowest
        await connections.ask(kind)
    begin, times = time.perf_counter() + 0.1, [list[float]() for _ in kinds]

    async def one(number: int, index: int) -> None:
        due = begin + number / rate
        await asyncio.sleep(due - time.perf_counter())
        await connections.ask(kinds[index])
        times[index].append(time.perf_counter() - due)

    order: Iterator[int] = islice(cycle(range(len(kinds))), int(rate * seconds))
    try:
        await asyncio.gather(*(one(number, index) for number, index in enumerate(order)))
    finally:
        await connections.close()
    return [
        figures(0, list(chain.from_iterable(times))),
        *(figures(kind.status, of_kind) for kind, of_kind in zip(kinds, times, strict=True)),
    ]


@app.command()
def refusals(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model id that the server has.")] = "smollm2-135m-instruct",
    url: Annotated[str, typer.Option(metavar="URL", help="Where the server is.")] = "http://127.0.0.1:8000",
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", metavar="KEY", help="One of the server's, if it has any.")] = None,
    rate: Annotated[float, typer.Option(min=1, help="Requests a second.")] = 200.0,
    seconds: Annotated[float, typer.Option(min=1, help="For how long.")] = 10.0,
) -> None:
    """Measure how soon a running server refuses what it refuses."""
    with one_line_errors(False):
        address = urlsplit(url)
        if address.scheme != "http" or address.hostname is None:
            raise BenchmarkError(f"{url} is no http:// address.")
        try:
            found = asyncio.run(measure(Server(address.hostname, address.port or 80, model, api_key), rate, seconds))
        except (OSError, asyncio.IncompleteReadError) as error:
            raise BenchmarkError(f"{url} cannot be asked: {error}") from error
        table = Table("status", "requests", "p50 ms", "p99 ms", "longest ms")
        for row in found:
            times = (f"{value:.2f}" for value in (row.p50_ms, row.p99_ms, row.max_ms))
            table.add_row(str(row.status) if row.status else "all", str(row.num_requests), *times)
        Console(stderr=True).print(table)
        print(json.dumps({"rate": rate, "seconds": seconds, "refusals": [vars(row) for row in found]}))


if __name__ == "__main__":
    app()
