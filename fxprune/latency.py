"""How long calls and networks take, measured side by side in one process.

Promise: the candidates take turns, in an order that rotates from round to round, so that a
machine that slows down slows all of them; one sample repeats its call until `min_seconds` have
passed, so that the clock's resolution does not matter; work queued on a GPU is waited for.
Says nothing about: what a call does with gradients, threads or memory. Set those before.
"""

from __future__ import annotations

import contextlib
import gc
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fxprune.errors import OptionError, OptionTypeError
from fxprune.graph import evaluating
from fxprune.report import TimingRow


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


def compare(
    networks: Mapping[str, nn.Module],
    example: Tensor,
    *,
    batches: Sequence[int] = (1, 64),
    rounds: int = 25,
    min_seconds: float = 0.02,
    seconds: float = math.inf,
) -> list[TimingRow]:
    """Milliseconds per call of each network at each batch size, in turns, in eval mode.

    networks: name -> network that takes one tensor; all on the device of the first one's weights.
    example: [N, ...], of whose shape and dtype the measured inputs are: noise, or zeros for integers.
    batches: sizes of the first axis. rounds, min_seconds: as in `latency`.
    seconds: about how long to measure per batch size; slow networks get fewer rounds, 3 at least.
    The rows are sorted by batch size, and within one they stand in the order of `networks`. Modes
    are as before afterwards. OptionError or OptionTypeError for a batch size below 1.
    """
    for batch in batches:
        if isinstance(batch, bool) or not isinstance(batch, int):
            raise OptionTypeError(
                f"a batch size is {batch!r}", where="batches", why="it must be a whole number"
            )
        if batch < 1:
            raise OptionError(
                f"a batch size is {batch}", where="batches", why="it must be at least 1"
            )
    rows = []
    with ExitStack() as stack, torch.inference_mode():
        for network in networks.values():
            stack.enter_context(evaluating(network))
        for batch in sorted(set(batches)):
            calls = _calls(networks, _noise(example, batch))
            fitting = _fitting(calls, rounds, seconds)
            timings = latency(calls, rounds=fitting, warmup=2, min_seconds=min_seconds)
            for name, t in timings.items():
                rows.append(TimingRow(name, batch, 1e3 * t.median, 1e3 * t.p20, 1e3 * t.p80))
    return rows


def environment(network: nn.Module) -> str:
    """What a network is measured on, in words: threads and processor, or GPU; dtype; torch."""
    first = next(network.parameters(), torch.zeros(()))
    dtype = str(first.dtype).removeprefix("torch.")
    if first.device.type == "cuda":
        on = torch.cuda.get_device_name(first.device)
    else:
        threads = torch.get_num_threads()
        on = f"{threads} thread{'s' * (threads > 1)} of {_processor()}"
    return f"{on}, {dtype}, torch {torch.__version__}"


def remarks(rows: Sequence[TimingRow], macs_before: int, macs_after: int) -> list[str]:
    """A sentence per batch size at which the last network does not use its fewer MACs.

    rows: as `compare` gives them. Says nothing where MACs fell by less than 5 %, or where the time
    fell by at least 5 %.
    """
    if not macs_before or macs_after > 0.95 * macs_before:
        return []
    by_batch: dict[int, list[TimingRow]] = {}
    for row in rows:
        by_batch.setdefault(row.batch, []).append(row)
    remain = f"{100 * macs_after / macs_before:.1f} % of the MACs remain"
    return [
        f"{remain}, but at batch {batch} the pruned network is only "
        f"{group[0].median_ms / group[-1].median_ms:.2f}x as fast: layers this small cost more than "
        "their arithmetic, and odd widths fill no vector register; align=8, larger batches or "
        "fold=True help"
        for batch, group in by_batch.items()
        if len(group) > 1 and group[-1].median_ms > 0.95 * group[0].median_ms
    ]


def _calls(networks: Mapping[str, nn.Module], x: Tensor) -> dict[str, Callable[[], object]]:
    parameters = (p for network in networks.values() for p in network.parameters())
    x = x.to(next(parameters, x).device)
    return {name: _call(network, x) for name, network in networks.items()}


def _call(network: nn.Module, x: Tensor) -> Callable[[], object]:
    return lambda: network(x)


def _noise(example: Tensor, batch: int) -> Tensor:
    shape = (batch, *example.shape[1:])
    if not example.is_floating_point():
        return torch.zeros(shape, dtype=example.dtype)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(example.dtype)


def _fitting(calls: Mapping[str, Callable[[], object]], rounds: int, seconds: float) -> int:
    """As many rounds as take about so many seconds."""
    if seconds == math.inf:
        return rounds
    for call in calls.values():
        call()
    one = sum(_seconds(call, 1) for call in calls.values())
    return max(3, min(rounds, int(seconds / max(one, 1e-9))))


def _processor() -> str:
    """The name of the CPU, or at least its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "an unknown CPU"


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
