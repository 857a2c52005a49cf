"""How far a long work is, on stderr: a bar on a terminal, lines in a log file.

Promise: a terminal gets one bar that disappears at the end; a log gets whole lines, without
         control characters. The time left is what the work took so far, carried on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

PROGRESS = (True, False, "log")
_QUIET = 30.0  # seconds between two lines of a log that was not asked for


class Meter:
    """Counts rounds (epochs, or one pass) and what passes through them; itself it shows nothing.

    label: what is done; rounds: how many; done: how many were done before.
    """

    def __init__(self, label: str, rounds: int, unit: str) -> None:
        self.label, self.rounds, self.unit = label, rounds, unit
        self.done, self.facts = 0.0, ""
        self._begin = self._round = self._last = time.perf_counter()
        self._first, self._images = 0.0, 0

    def resume(self, done: float) -> None:
        """So many rounds were done earlier: they took none of this run's time."""
        self._first = self.done = done
        self._begin = time.perf_counter()
        self.begin_round()

    def begin_round(self) -> None:
        """From here on, images count for the speed of a new round."""
        self._round = self._last = time.perf_counter()
        self._images = 0

    def step(self, done: float, images: int, facts: str | None = None) -> None:
        """`done` rounds (2.5: halfway through the third) and `images` more; new words about them."""
        self.done = done
        self._images += images
        self._last = time.perf_counter()
        self.facts = self.facts if facts is None else facts
        self.show()

    def finish_round(self, done: int, facts: str) -> None:
        """A round is over; `facts` sums it up."""
        self.done, self.facts = done, facts
        self.show_round()

    def rate(self) -> float:
        """Images per second in this round, up to its last step."""
        return self._images / max(self._last - self._round, 1e-9)

    def left(self) -> float:
        """Seconds to the end, as far as one can tell; infinite at the beginning."""
        passed = self.done - self._first
        took = time.perf_counter() - self._begin
        return took / passed * (self.rounds - self.done) if passed > 0 else float("inf")

    def words(self) -> str:
        """Round, facts and speed, for example "epoch 3 of 10, loss 0.412, 812 images/s"."""
        where = f"{self.unit} {min(int(self.done) + 1, self.rounds)} of {self.rounds}"
        speed = f"{self.rate():,.0f} images/s" if self._images else ""
        return ", ".join(filter(None, [where if self.unit else "", self.facts, speed]))

    def show(self) -> None:
        """Show a step."""

    def show_round(self) -> None:
        """Show a round that is over."""


class _Bar(Meter):
    """A bar on the terminal."""

    bar: Any  # rich.progress.Progress, imported where it is made

    def start(self, bar: Any) -> None:
        self.bar = bar
        self.task = bar.add_task(self.label, total=self.rounds, words="", left="")
        self.show()

    def show(self) -> None:
        self.bar.update(
            self.task, completed=self.done, words=self.words(), left=_clock(self.left())
        )

    show_round = show


class _Log(Meter):
    """One line a round; at least `quiet` seconds apart, or after them for the first."""

    def __init__(self, label: str, rounds: int, unit: str, quiet: float) -> None:
        super().__init__(label, rounds, unit)
        self.quiet, self.told = quiet, time.perf_counter()

    def show_round(self) -> None:
        now = time.perf_counter()
        if now - self.told < self.quiet:
            return
        self.told = now
        where = f"{self.unit} {self.done:.0f} of {self.rounds}" if self.unit else ""
        speed = f"{self.rate():,.0f} images/s"
        left = f"{_clock(self.left())} left" if self.done < self.rounds else ""
        told = ", ".join(filter(None, [where, self.facts, speed, left]))
        print(f"{self.label}: {told}", file=sys.stderr, flush=True)


@contextmanager
def meter(
    progress: bool | Literal["log"], label: str, rounds: int, unit: str = "epoch"
) -> Iterator[Meter]:
    """What to tell the steps to.

    progress: True is a bar on a terminal, and elsewhere a line after a round, at most every 30
    seconds (short work stays silent); "log" is a line after every round, wherever; False nothing.
    """
    if progress == "log":
        yield _Log(label, rounds, unit, 0.0)
        return
    if not progress:
        yield Meter(label, rounds, unit)
        return
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Log(label, rounds, unit, _QUIET)
        return
    from rich.progress import BarColumn, Progress, TextColumn

    columns = [TextColumn(text) for text in ("{task.description}", "{task.fields[words]}", "{task.fields[left]}")]  # fmt: skip
    shown = _Bar(label, rounds, unit)
    with Progress(columns[0], BarColumn(24), *columns[1:], console=console, transient=True) as bar:
        shown.start(bar)
        yield shown


def _clock(seconds: float) -> str:
    """0:07, 12:34, 1:02:03; -:-- where nothing is known."""
    if seconds == float("inf"):
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
