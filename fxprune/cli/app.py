"""The command line, `fxprune`. Thin: what a command does, a user can do with the same few calls.

Exit codes: 0 done, 2 bad usage, 130 after Ctrl-C, 143 after SIGTERM, 1 anything else, then with
one clear line on stderr (`--debug`: the traceback). With `--json` stdout holds one JSON document
and nothing else; what is told along the way goes to stderr.
"""

from __future__ import annotations

import contextlib
import functools
import io
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

import typer

from fxprune._version import __version__
from fxprune.cli import analyze, compile, completion, demo, report, scratch
from fxprune.cli.console import say
from fxprune.cli.options import Debug
from fxprune.errors import FxPruneError, OptionError, OptionTypeError

app = typer.Typer(
    name="fxprune",
    help="Structured pruning of PyTorch models: a smaller network that computes what the masked "
    "original computes.",
    epilog="`fxprune COMMAND --help` shows examples. `fxprune --install-completion` lets the shell "
    "complete the names of models, methods, presets and data.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    arguments: the words after `fxprune`; None takes them from `sys.argv`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):  # names of files that the terminal cannot show
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    with _signals() as received:
        try:
            with completion.whole_words():
                app(words, prog_name="fxprune", obj=words)
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        except KeyboardInterrupt:
            code = 128 + signal.SIGINT
        except Exception as error:
            code = 2 if isinstance(error, OptionError | OptionTypeError) else 1
            if "--debug" in words:
                traceback.print_exception(error)
            else:
                say(f"error: {_one_line(error)}")
    if received:
        say(f"stopped by {received[-1].name}")
        code = 128 + received[-1]
    return code


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fxprune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: Debug = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    del debug, version  # `main` reads the one, `_print_version` the other


def _stoppable(command: Callable[..., None]) -> Callable[..., None]:
    """A stop leaves as SystemExit, of which typer has nothing to say."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            raise SystemExit(128 + signal.SIGINT) from None

    return run


for _command, _examples in (
    (compile.compile, compile.EXAMPLES),
    (analyze.analyze, analyze.EXAMPLES),
    (report.report, report.EXAMPLES),
    (scratch.scratch, scratch.EXAMPLES),
    (demo.demo, demo.EXAMPLES),
):
    app.command(epilog=_examples)(_stoppable(_command))


def _one_line(error: Exception) -> str:
    """The facts of an error on one line."""
    if isinstance(error, FxPruneError):
        facts = (("at", error.where), ("because", error.why), ("fix", error.fix))
        text = "; ".join([error.what, *(f"{label}: {fact}" for label, fact in facts if fact)])
    elif isinstance(error, OSError) and error.strerror:
        text = error.strerror + (f": {error.filename}" if error.filename else "")
    else:
        text = f"{type(error).__name__}: {error} (--debug shows the traceback)"
    return " ".join(text.split())


@contextlib.contextmanager
def _signals() -> Iterator[list[signal.Signals]]:
    """SIGTERM, like Ctrl-C, raises KeyboardInterrupt inside; yields the list of what arrived."""
    received: list[signal.Signals] = []

    def stop(number: int, frame: object) -> None:
        del frame
        received.append(signal.Signals(number))
        raise KeyboardInterrupt

    old = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not in the main thread: leave signals alone
                old[number] = signal.signal(number, stop)
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
