"""How long calls take, measured side by side in one process.

Promise: the candidates take turns, in an order that rotates from round to round, so that a
machine that slows down slows all of them; one sample repeats its call until `min_seconds` have
passed, so that the clock's resolution does not matter; work queued on a GPU is waited for.
Says nothing about: what a call does with gradients, threads or memory. Set those before.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fxprune.errors import OptionError


@dataclass(frozen=True)
class Timing:
    """Seconds per call: the median over all rounds, and the 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float
    rounds: int = 1  # samples taken
    calls: int = 1  # calls per sample


def latency(
    callables: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 25,
    warmup: int = 3,
    min_seconds: float = 0.02,
) -> dict[str, Timing]:
    """Seconds per call of every candidate, in the order given.

    callables: name -> function without arguments; its result is dropped.
    rounds:    samples per candidate, at least 1.
    warmup:    calls per candidate before anything is measured, at least 0.
    min_seconds: the least duration of one sample; the call is repeated to fill it. 0 calls once.
    All of it takes about `len(callables) * rounds * max(min_seconds, one call)` seconds.
    OptionError for no candidates or a number out of range; an error in a candidate passes through.
    """
    if not callables:
        raise OptionError("there is nothing to measure", where="callables", fix="pass {name: call}")
    if rounds < 1 or warmup < 0 or not 0 <= min_seconds < math.inf:
        raise OptionError(
            f"bad measurement: rounds={rounds}, warmup={warmup}, min_seconds={min_seconds}",
            why="rounds must be at least 1, warmup and min_seconds at least 0",
        )
    for call in callables.values():
        for _ in range(warmup):
            call()
    repeats = {name: _repeats(call, min_seconds) for name, call in callables.items()}
    samples: dict[str, list[float]] = {name: [] for name in callables}
    order = list(callables)
    collecting = gc.isenabled()
    gc.disable()  # a collection inside one sample would be charged to whoever is on turn
    try:
        for turn in range(rounds):
            start = turn % len(order)
            for name in order[start:] + order[:start]:
                samples[name].append(_seconds(callables[name], repeats[name]) / repeats[name])
    finally:
        if collecting:
            gc.enable()
    return {name: _timing(samples[name], repeats[name]) for name in order}


def _seconds(call: Callable[[], object], repeats: int) -> float:
    """Wall-clock seconds of `repeats` calls, queued GPU work included."""
    _wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_initialized():  # never wake a GPU that nobody uses
        torch.cuda.synchronize()


def _repeats(call: Callable[[], object], min_seconds: float) -> int:
    """How many calls fill `min_seconds`, found by doubling."""
    repeats = 1
    while True:
        took = _seconds(call, repeats)
        if took >= min_seconds:
            return repeats
        grown = math.ceil(1.2 * repeats * min_seconds / max(took, 1e-9))
        repeats = min(max(grown, repeats + 1), 10 * repeats)


def _timing(seconds: list[float], calls: int) -> Timing:
    ordered = sorted(seconds)
    return Timing(
        median=statistics.median(ordered),
        p20=_quantile(ordered, 0.2),
        p80=_quantile(ordered, 0.8),
        rounds=len(ordered),
        calls=calls,
    )


def _quantile(ordered: list[float], q: float) -> float:
    """Linear interpolation between the two nearest of the ascending values."""
    place = q * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])
