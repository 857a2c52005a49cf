"""Trace + analysis, and the whole compile, against torch-pruning, in one interleaved run.

    python bench/analyze.py                        everything: some minutes, one thread
    python bench/analyze.py --only resnet50 chain  these cases; their rows replace the old ones
    python bench/analyze.py --rounds 3 --dry       fewer rounds, no rows written

analyze: `fxprune.analyze(model, x)`; theirs: `DependencyGraph().build_dependency` + all groups.
compile: `fxprune.compile(model, x, method="l1", budget=0.5)`, with and without its proof; theirs:
         a `MagnitudePruner` (which builds that graph and its groups) and one `step()`. It prunes in
         place, fxprune prunes a copy: what their users pay for a copy is a column of its own.
chain:   analyze on residual chains of 250, 1,000 and 4,000 fx nodes; the slope is in log-log.
memory:  under analyze, how far the resident memory of a fresh process rises during the call: its peak
         (VmHWM), reset before, less what was resident, after a call on a small network has loaded what
         a first call loads. Linux only.

swin_t and maxvit_t: the rival's groups take longer than 150 s and gigabytes; fxprune alone.
Providers take turns within each round, and who goes first changes from round to round. torchvision
networks at their usual input sizes, eval mode, random weights, one thread.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import torchvision
from subjects import alone
from table import ROOT, number, ratio, slope, write
from torch import Tensor, nn
from where import here

import fxprune

try:
    import torch_pruning
except ImportError:
    sys.exit('the rival is missing: `make bench`, or pip install -e ".[bench]"')

OURS, PROVED = "fxprune verify=False", "fxprune verify=True"
RIVAL, COPY = f"torch-pruning {version('torch-pruning')}", "its deepcopy"
MEMORY = "fxprune: peak extra memory, MB"
SIZES = {
    "resnet50": 224, "resnet152": 224, "densenet201": 224, "inception_v3": 299,
    "mobilenet_v2": 224, "efficientnet_v2_l": 480, "vit_b_16": 224, "convnext_tiny": 224,
    "swin_t": 224, "maxvit_t": 224,
}  # fmt: skip
UNFINISHED = ("swin_t", "maxvit_t")  # by the rival: more than 150 s, and gigabytes
MEGABYTES = 50  # what analyze may need
CHAINS = (250, 1000, 4000)
FEW = {("compile", "densenet201"): 2, ("analyze", "densenet201"): 3}  # theirs: 40 s and 6 s a call
# What a channel ratio of 0.3 leaves in both dimensions of a weight, 0.7 * 0.7, is half of the MACs.
RIVAL_RATIO = 0.3
SECONDS = Callable[[], float]  # prepares, then measures one call


# --- what is measured -----------------------------------------------------------------------------


def timed(call: Callable[[], object]) -> float:
    """Seconds of one call; its garbage, and that of the call before, is collected outside."""
    gc.collect()
    begin = time.perf_counter()
    result = call()
    seconds = time.perf_counter() - begin
    del result
    return seconds


def our_analyze(model: nn.Module, x: Tensor) -> SECONDS:
    return lambda: timed(lambda: fxprune.analyze(model, x))


def our_compile(model: nn.Module, x: Tensor, verify: bool) -> SECONDS:
    options = {"method": "l1", "budget": 0.5, "progress": False, "verify": verify}
    return lambda: timed(lambda: fxprune.compile(model, x, **options))


def rival_analyze(model: nn.Module, x: Tensor) -> SECONDS:
    def call() -> object:
        graph = torch_pruning.DependencyGraph().build_dependency(model, example_inputs=x)
        return graph, list(graph.get_all_groups())

    return lambda: timed(call)


def rival_prune(model: nn.Module, x: Tensor) -> SECONDS:
    def once() -> float:
        mine = copy.deepcopy(model)
        last = [m for m in mine.modules() if isinstance(m, nn.Linear)][-1]
        attentions = [m for m in mine.modules() if isinstance(m, nn.MultiheadAttention)]

        def call() -> object:
            pruner = torch_pruning.pruner.MagnitudePruner(
                mine,
                x,
                torch_pruning.importance.MagnitudeImportance(p=1),
                pruning_ratio=RIVAL_RATIO,
                ignored_layers=[last],
                round_to=attentions[0].num_heads if attentions else None,
            )
            pruner.step()
            return pruner

        return timed(call)

    return once


def rival_copy(model: nn.Module) -> SECONDS:
    return lambda: timed(lambda: copy.deepcopy(model))


def network(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    options = {"init_weights": False} if name == "inception_v3" else {}  # its own takes a minute
    model = getattr(torchvision.models, name)(weights=None, **options).eval()
    return model, torch.randn(1, 3, SIZES[name], SIZES[name])


def resident(line: str) -> float:
    """MB that the system counts for this process: "VmRSS" now, "VmHWM" at most."""
    (found,) = [t for t in Path("/proc/self/status").read_text().splitlines() if t.startswith(line)]
    return int(found.split()[1]) * 1024 / 1e6


def extra_memory(case: str) -> float:
    """MB that `analyze` needs at most beside what was there; for a process of its own."""
    model, x = network(case)
    fxprune.analyze(*chain(50))  # loads and fills what every first call does
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    analysis = fxprune.analyze(model, x)
    peak = resident("VmHWM")
    del analysis
    return max(peak - before, 0.0)


class Block(nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x)))))): seven fx nodes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.relu1, self.relu2 = nn.ReLU(), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """The usual residual block."""
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        return self.relu2(x + y)


def blocks_of(nodes: int) -> int:
    """How many blocks a chain of so many nodes has: input, stem, head and output are eight."""
    return round((nodes - 8) / 7)


def chain(nodes: int, width: int = 8) -> tuple[nn.Module, Tensor]:
    """A residual network of about so many fx nodes (within three)."""
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    blocks = [Block(width) for _ in range(blocks_of(nodes))]
    return nn.Sequential(*stem, *blocks, *head).eval(), torch.randn(1, 3, 8, 8)


# --- measuring --------------------------------------------------------------------------------------


@dataclass
class Column:
    """One provider on one case: how to measure it, how often, and what was measured."""

    provider: str
    once: SECONDS
    rounds: int
    seconds: list[float]


def plan_case(bench: str, case: str, rounds: int) -> tuple[list[Column], str]:
    """The columns of one case, and the shape of its input."""
    model, x = chain(int(case.removeprefix("chain-"))) if bench == "chain" else network(case)
    theirs = min(rounds, FEW.get((bench, case), rounds))
    alone_in_it = case in (*UNFINISHED, "chain-4000")  # the rival recurses along the chain
    if bench == "compile":
        columns = [
            Column(OURS, our_compile(model, x, verify=False), rounds, []),
            Column(RIVAL, rival_prune(model, x), theirs, []),
            Column(PROVED, our_compile(model, x, verify=True), theirs, []),
            Column(COPY, rival_copy(model), theirs, []),
        ]
        if alone_in_it:
            columns = [column for column in columns if column.provider in (OURS, PROVED)]
    else:
        columns = [Column("fxprune", our_analyze(model, x), rounds, [])]
        if not alone_in_it:
            columns.append(Column(RIVAL, rival_analyze(model, x), theirs, []))
    return columns, "x".join(str(size) for size in x.shape)


def measure(columns: list[Column], slow: bool) -> None:
    """Rounds in which the providers take turns; the first call of each is not counted."""
    for column in columns:
        if not slow or column.provider.startswith("fxprune"):
            column.once()
    for turn in range(max(column.rounds for column in columns)):
        for column in columns if turn % 2 == 0 else reversed(columns):
            if turn < column.rounds:
                column.seconds.append(column.once())


def quantile(values: Sequence[float], share: float) -> float:
    """Linear between the sorted values; the value itself if there is one."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def verdict(bench: str, case: str, ours: float, rival: float | None) -> tuple[bool, str]:
    """Whether the bar is met, and the sentence that says so; milliseconds."""
    if rival is None:
        met = ours <= 500 or bench != "analyze"
        bar = "500 ms; theirs does not finish" if bench == "analyze" else "none"
        return met, f"{'met   ' if met else 'MISSED'}  {bench:8} {case:18} {number(ours)} ms (bar: {bar})"  # fmt: skip
    if case == "densenet201":
        met, bar = ours <= 0.05 * rival, "0.05x"
    elif rival >= 100:
        met, bar = ours <= 0.8 * rival, "0.8x"
    else:
        met, bar = ours <= 100, "100 ms"
    said = f"{number(ours)} ms, theirs {number(rival)} ms, {ratio(ours, rival)} (bar: {bar})"
    return met, f"{'met   ' if met else 'MISSED'}  {bench:8} {case:18} {said}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write; exit 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = ["analyze", "compile", "chain", *SIZES]
    parser.add_argument("--only", nargs="+", choices=known, default=[], help="benches and cases")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dry", action="store_true", help="write no rows")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "analyze.csv")
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # both libraries warn of training-only branches
    if options.memory:
        print(json.dumps({"MB": extra_memory(options.memory)}))
        return 0

    jobs = [(bench, case) for bench in ("analyze", "compile") for case in SIZES]
    jobs += [("chain", f"chain-{nodes}") for nodes in CHAINS]
    if options.only:
        benches = set(options.only) - set(SIZES) or {"analyze", "compile"}
        cases = set(options.only) & set(SIZES) or set(SIZES)
        jobs = [(b, c) for b, c in jobs if b in benches and (b == "chain" or c in cases)]

    where = {
        "unit": "ms", "dtype": "float32", **here(torch.device("cpu"), 1),
    }  # fmt: skip
    lines, all_met = [], True
    points: dict[str, list[tuple[float, float]]] = {}
    for bench, case in jobs:
        columns, shape = plan_case(bench, case, options.rounds)
        measure(columns, slow=(bench, case) in FEW)
        rows, medians = [], {}
        for column in columns:
            p20, p50, p80 = (1e3 * quantile(column.seconds, share) for share in (0.2, 0.5, 0.8))
            medians[column.provider] = p50
            print(f"{bench:8} {case:18} {column.provider:22} {number(p50):>8} ms  ({number(p20)}-{number(p80)}, {column.rounds} rounds)", flush=True)  # fmt: skip
            rows.append({
                "bench": bench, "case": case, "provider": column.provider, "p20": f"{p20:.3f}",
                "p50": f"{p50:.3f}", "p80": f"{p80:.3f}", "rounds": str(column.rounds),
                "shape": shape, **where,
            })  # fmt: skip
        if bench == "analyze":
            needed, failure = alone([__file__, "--memory", case], limit=120, gigabytes=16)
            if needed is None:
                raise RuntimeError(f"memory of {case}: {failure}")
            high = float(needed["MB"])
            all_met &= high <= MEGABYTES
            lines.append(f"{'met   ' if high <= MEGABYTES else 'MISSED'}  memory   {case:18} {number(high)} MB (bar: {MEGABYTES} MB)")  # fmt: skip
            said = dict.fromkeys(("p20", "p50", "p80"), f"{high:.3f}")
            rows.append({"bench": bench, "case": case, "provider": MEMORY, **said, "rounds": "1", "shape": shape, **where, "unit": "MB"})  # fmt: skip
        if not options.dry:
            write(options.out, rows)
        if bench == "chain":
            for provider, p50 in medians.items():
                nodes = 7 * blocks_of(int(case.removeprefix("chain-"))) + 8
                points.setdefault(provider, []).append((float(nodes), p50))
        else:
            ours = medians["fxprune" if bench == "analyze" else OURS]
            met, said = verdict(bench, case, ours, medians.get(RIVAL))
            all_met &= met
            lines.append(said)
            if bench == "compile":
                proved = medians[PROVED]
                beside = f", {ratio(proved, medians[RIVAL])}" if RIVAL in medians else ""
                said = f"{number(proved)} ms{beside} (no bar: theirs has none)"
                lines.append(f"        {'':8} {'  with its proof':18} {said}")
    for provider, pairs in points.items():
        value = slope(pairs)
        sizes = ", ".join(f"{x:,.0f}" for x, _ in pairs)
        said = f"chain    {provider:22} log-log slope {value:.2f} over {sizes} nodes"
        if provider == "fxprune":
            all_met &= value <= 1.2
            said = f"{'met   ' if value <= 1.2 else 'MISSED'}  {said} (bar: 1.2)"
        lines.append(said if provider == "fxprune" else f"        {said}")
    print("\n" + "\n".join(lines))
    return 0 if all_met else 1


if __name__ == "__main__":
    sys.exit(main())
