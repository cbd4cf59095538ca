"""The program `cascade`. Parses, reports and returns an exit code; torch is imported only by the commands that need it.

Exit codes: 0 done, 2 the deployment or the command line is wrong (one line on standard error; --debug shows where it came from).
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from getpass import getpass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from engine import logs
from engine.errors import EngineError
from engine.threads import set_defaults
from server.fit import DIGEST
from server.listener import bind
from server.logs import AboutRequests
from server.settings import ServerSettings, load

Config = Annotated[Path, typer.Argument(metavar="CONFIG", help="Deployment file, such as configs/default.yaml.", show_default=False)]
Debug = Annotated[bool, typer.Option("--debug", help="Show where an error came from.")]

app = typer.Typer(
    help="Cascade Serve: an OpenAI-compatible server with speculative decoding.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its tables show a type even for a flag
)

train = typer.Typer(help="Train what speeds a target up.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(train, name="train")


def main() -> None:
    """Entry point of the program."""
    set_defaults()
    app()


def _say_version(is_wanted: bool) -> None:
    if is_wanted:
        Console().print(f"cascade {version('cascade-serve')}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    is_version_wanted: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


@app.command()
def serve(
    config: Config,
    host: Annotated[str | None, typer.Option(metavar="ADDRESS", help="Address to listen on, instead of the file's.")] = None,
    port: Annotated[int | None, typer.Option(metavar="PORT", help="Port to listen on, instead of the file's.")] = None,
    debug: Debug = False,
) -> None:
    """Load a deployment and serve it until SIGTERM or Ctrl-C."""
    _set_up_first_logging()
    with one_line_errors(debug):
        deployment = load(config, host=host, port=port)
        _set_up_logging(deployment.server)
        say = logs.say if deployment.server.log_format == "json" else progress_to(Console(stderr=True))
        say(f"Cascade Serve {version('cascade-serve')}: loading {config}")
        listener = bind(deployment.server)
        from server.launch import run  # the web framework takes a second

        run(deployment, listener, say)


@app.command()
def check(
    config: Config,
    no_load: Annotated[bool, typer.Option("--no-load", help="Read configs only; no weights, no conversion.")] = False,
    debug: Debug = False,
) -> None:
    """Print what a deployment would serve and the memory it needs."""
    with one_line_errors(debug):
        deployment = load(config)
        _set_up_logging(deployment.server)
        from server.report import doubt_of, estimated_figures, loaded_figures, table_of  # torch and transformers take seconds

        part = deployment.engine_part
        figures = estimated_figures(part) if no_load else loaded_figures(part, progress_to(Console(stderr=True)))
        Console().print(table_of(config, deployment, figures))
        if doubt := doubt_of(figures):
            Console().print(doubt, markup=False, highlight=False, soft_wrap=True)


@app.command("hash-key")
def hash_key() -> None:
    """Print the digest of an API key that is read from standard input, to stand in a file instead of it."""
    from server.keys import digest_of  # the web framework takes a second

    key = (getpass("API key: ") if sys.stdin.isatty() else sys.stdin.readline()).strip()
    if not key:
        raise typer.BadParameter("standard input holds no key")
    if key.startswith(DIGEST):
        raise typer.BadParameter(f"no key begins with {DIGEST}: this is a digest already, or would be taken for one")
    print(f"{DIGEST}{digest_of(key).hex()}")  # noqa: T201


@app.command()
def chat(
    url: Annotated[str, typer.Option(metavar="URL", help="A server of this kind.")] = "http://127.0.0.1:8000",
    model: Annotated[str | None, typer.Option(metavar="ID", help="Model id or name of a preset. Default: the deployment's own.")] = None,
    api_key_env: Annotated[str, typer.Option(metavar="NAME", help="Environment variable that holds the API key.")] = "OPENAI_API_KEY",
    debug: Debug = False,
) -> None:
    """Talk to a running server; each token has the colour of who wrote it. /help lists what can be set.

    Ctrl-C stops an answer, and ends the conversation where none is running. Where standard input is no terminal, each line of it is a
    prompt, and the answers alone are printed.
    """
    from server.terminal.chat import Terminal, run
    from server.terminal.client import Client
    from server.terminal.session import start

    with one_line_errors(debug), closing(Client(url, os.environ.get(api_key_env))) as client:
        run(client, start(client.controls(), model), Terminal.standard())


# Its options are declared beside what they mean, in benchmarks/serve.py, which reads everything that is left unread here.
@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def bench(context: typer.Context) -> None:
    """Measure a running server, or an engine in this process."""
    from benchmarks.serve import app as benchmark

    with one_line_errors("--debug" in context.args):
        benchmark(context.args, prog_name="cascade bench")


@train.command("distil")
def train_distil(
    recipe: Annotated[Path, typer.Argument(metavar="CONFIG", help="Recipe, such as configs/train/smollm2-135m-drafter.yaml.")],
    data_only: Annotated[bool, typer.Option("--data-only", help="Make the training data and stop.")] = False,
    export_only: Annotated[bool, typer.Option("--export-only", help="Train no further: export what the checkpoint holds.")] = False,
    debug: Debug = False,
) -> None:
    """Train a drafter on what its target writes. Run again, it goes on where it was ended."""
    from server.distil import Parts, run

    with one_line_errors(debug):
        console = Console(stderr=True)
        run(recipe, Parts(data_only, export_only), console, progress_to(console))


# Its options are declared beside what they mean, in benchmarks/evaluate/command.py.
@app.command(add_help_option=False, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def evaluate(context: typer.Context) -> None:
    """Measure quality against cost of the rules: the curve that says where to set the dial."""
    from benchmarks.evaluate.command import app as evaluation

    with one_line_errors("--debug" in context.args):
        evaluation(context.args, prog_name="cascade evaluate")


def progress_to(console: Console) -> Callable[[str], None]:
    """A progress callback that prints a line with the seconds since now."""
    start = time.monotonic()

    def say(text: str) -> None:
        console.print(f"{time.monotonic() - start:6.1f} s  {text}", markup=False, highlight=False, soft_wrap=True)

    return say


@contextmanager
def one_line_errors(is_debugging: bool) -> Iterator[None]:
    """What the operator can mend is a line and exit code 2; anything else is a bug and keeps its traceback."""
    try:
        yield
    except EngineError as error:
        if is_debugging:
            raise
        if logs.format_in_use() == "json":
            logging.getLogger(logs.SAID).error("%s", error)
        else:
            Console(stderr=True).print(f"Error: {error}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(2) from error


def _set_up_logging(settings: ServerSettings) -> None:
    logs.set_up(settings.log_level.upper(), settings.log_format, filters=[AboutRequests()])


def _set_up_first_logging() -> None:
    """For what is said of the deployment file itself: as the environment says, which a program that collects lines will have set."""
    logs.set_up("INFO", "json" if os.environ.get("CASCADE_LOG_FORMAT") == "json" else "console")
