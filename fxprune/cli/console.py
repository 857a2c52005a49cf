"""What a command says: numbered steps and lines for a person, or one JSON document for a program.

Promise: with `--json`, stdout holds that document and nothing else; whatever is told along the way,
and whatever a user's model prints, goes to stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxprune.views import words

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@contextlib.contextmanager
def telling(as_json: bool) -> Iterator[Console]:
    """The console to tell things on; inside, nothing but `print_json` reaches stdout with --json."""
    from rich.console import Console

    console = Console(stderr=as_json, highlight=False)
    with _stdout_to_stderr() if as_json else contextlib.nullcontext():
        yield console


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """What Python prints, and what children and libraries in C write to file descriptor 1."""
    if sys.stdout is not None:  # closed by who started us
        sys.stdout.flush()
    with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as restored:
        with contextlib.suppress(OSError):  # a descriptor is closed: there is nothing to move
            saved = os.dup(1)
            restored.callback(os.close, saved)
            restored.callback(os.dup2, saved, 1)
            os.dup2(2, 1)
        yield


def print_json(document: Mapping[str, Any]) -> None:
    """The one document of `--json`, strict JSON on stdout."""
    print(json.dumps(document, indent=2, allow_nan=False))


def title(console: Console, text: str) -> None:
    """A line across the terminal with what is being done."""
    from rich.text import Text

    console.rule(Text(text, "bold"), align="left")


def step(console: Console, number: int, text: str) -> None:
    """The head of a numbered step."""
    from rich.text import Text

    console.print(Text.assemble((f"\n{number}", "bold cyan"), f"  {text}"))


def tell(console: Console, text: str) -> None:
    """A line below a step; one that does not fit goes on below itself."""
    from rich.padding import Padding
    from rich.text import Text

    console.print(Padding(Text(text, "dim"), (0, 0, 0, 3), expand=False))


def tell_files(console: Console, folder: Path, files: Mapping[str, str]) -> None:
    """Name by name what a folder holds, and what each is for; paths are never broken."""
    console.print(f"{folder}{os.sep}", style="bold", markup=False, soft_wrap=True)
    longest = max(map(len, files), default=0)
    for name, purpose in files.items():
        console.print(f"  {name:{longest}}", markup=False, end="", soft_wrap=True)
        console.print(f"  {purpose}", style="dim", markup=False, soft_wrap=True)


def table(*columns: str) -> Table:
    """A table whose first column holds words, and the others numbers."""
    from rich import box
    from rich.table import Table

    new = Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="dim")
    for i, name in enumerate(columns):
        new.add_column(name, justify="right" if i else "left")
    return new


def percent(share: float, digits: int = 2) -> str:
    """0.9339 -> "93.39 %", as reports write accuracies."""
    return words.percent(share, digits)


def say(text: str) -> None:
    """One line on stderr, from the program as a whole."""
    with contextlib.suppress(OSError):  # nobody reads stderr any more
        print(f"fxprune: {text}", file=sys.stderr)


@contextlib.contextmanager
def timed() -> Iterator[Callable[[], float]]:
    """Yields a function that says how many seconds the block took, or has taken so far."""
    start = time.perf_counter()
    end: list[float] = []
    try:
        yield lambda: (end[0] if end else time.perf_counter()) - start
    finally:
        end.append(time.perf_counter())
