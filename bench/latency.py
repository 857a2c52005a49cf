"""What pruning is worth in milliseconds: three graphs, in the forms in which networks are run.

    python bench/latency.py                           every network and form: minutes, one thread
    python bench/latency.py --only resnet50           this network; its rows replace the old ones
    python bench/latency.py --rounds 3 --dry          fewer rounds, no rows written
    python bench/latency.py --device cuda             on a GPU; the rows of other devices stay

graphs: the original; pruned, `fxprune.compile(model, x, method="l1", budget=0.5, align=8)`; and
        that with `fold=True`. Random weights: latency does not depend on them.
forms:  eager (contiguous), channels_last (turning the input included), inductor
        (`torch.compile`), onnxruntime (the file that `fxprune.export` writes; on the CPU only).

All graphs in all forms take turns in one process, network by network and batch by batch, float32,
inference mode; a form whose outputs are not those of the eager graph is not measured. Rows are
written as they come, so that an interrupted run keeps what it has. Beside the times stand the
multiply-adds of each graph: half of them remain, and what takes more than half of the time is
overhead or memory traffic.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torchvision
from table import ROOT, number, ratio, write
from torch import Tensor, nn
from where import here

import fxprune
from fxprune import zoo
from fxprune.latency import Timing, latency

NETWORKS = {"resnet18": 224, "resnet50": 224, "mobilenet_v2": 224, "resnet56": 32}  # pixels
GRAPHS = ("original", "pruned", "pruned+folded")
FORMS = ("eager", "channels_last", "inductor", "onnxruntime")
BOUND = {"cpu": 1e-3, "cuda": 1e-2}  # relative: other kernels; convolutions on a GPU round to TF32
Call = Callable[[Tensor], Tensor]


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A network in eval mode with random weights, and its input [1, 3, H, W]."""
    torch.manual_seed(0)
    source = zoo.build(name) if name in zoo.names() else torchvision.models.get_model(name)
    return source.eval(), torch.randn(1, 3, NETWORKS[name], NETWORKS[name])


def graphs(model: nn.Module, x: Tensor) -> tuple[dict[str, nn.Module], dict[str, int]]:
    """The three graphs in eval mode, and their multiply-adds per image."""
    options = {"method": "l1", "budget": 0.5, "align": 8, "progress": False, "verify": False}
    pruned = fxprune.compile(model, x, **options).eval()
    folded = fxprune.compile(model, x, **options, fold=True).eval()
    before, after = (pruned.report.metrics[key] for key in ("macs_before", "macs_after"))
    made = dict(zip(GRAPHS, (model, pruned, folded), strict=True))
    return made, dict(zip(GRAPHS, (before, after, after), strict=True))


# --- forms ------------------------------------------------------------------------------------------


def eager(graph: nn.Module, file: Path, x: Tensor, threads: int) -> Call:
    return graph


def channels_last(graph: nn.Module, file: Path, x: Tensor, threads: int) -> Call:
    mine = copy.deepcopy(graph).to(memory_format=torch.channels_last)
    return lambda x: mine(x.contiguous(memory_format=torch.channels_last))


def inductor(graph: nn.Module, file: Path, x: Tensor, threads: int) -> Call:
    return torch.compile(graph, dynamic=False)


def onnxruntime(graph: nn.Module, file: Path, x: Tensor, threads: int) -> Call:
    import onnxruntime as ort

    if not file.exists():  # its batch size is free
        fxprune.export(graph, file, x)
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    session = ort.InferenceSession(file.read_bytes(), options, ["CPUExecutionProvider"])
    (name,) = (i.name for i in session.get_inputs())
    return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])


MAKE = {"eager": eager, "channels_last": channels_last, "inductor": inductor, "onnxruntime": onnxruntime}  # fmt: skip


def why_not(form: str, device: torch.device) -> str | None:
    """Why a form cannot be measured here; None if it can."""
    if form == "onnxruntime" and device.type != "cpu":
        return "it is measured on the CPU only"
    if form == "onnxruntime":
        missing = [m for m in ("onnx", "onnxscript", "onnxruntime") if not importlib.util.find_spec(m)]  # fmt: skip
        return f"{', '.join(missing)} not installed" if missing else None
    if form == "inductor" and device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):  # fmt: skip
        return "torch.compile needs a C++ compiler"
    return None


def gap(a: Tensor, b: Tensor) -> float:
    """The largest difference, relative to the largest value of `b`."""
    return float((a - b).abs().max() / b.abs().max())


# --- measuring --------------------------------------------------------------------------------------


def prepare(
    made: dict[str, nn.Module], x: Tensor, forms: Sequence[str], threads: int, folder: Path
) -> dict[tuple[str, str], Call]:
    """(form, graph) -> what to call with `x`; those that compute something else are left out."""
    torch._dynamo.reset()
    calls = {}
    for form in forms:
        begin = time.perf_counter()
        for graph, module in made.items():
            call = MAKE[form](module, folder / f"{graph}.onnx", x, threads)
            if (off := gap(call(x), module(x))) > BOUND[x.device.type]:
                print(f"  {form}, {graph}: not measured, its output is {off:.2g} off")
            else:
                calls[form, graph] = call
        if (took := time.perf_counter() - begin) > 1:
            print(f"  {form} made in {took:.0f} s", flush=True)
    return calls


def measure(
    calls: dict[tuple[str, str], Call], x: Tensor, rounds: int, seconds: float
) -> dict[tuple[str, str], Timing]:
    """Timings of all calls, in turns: so many rounds, or as many as fit into `seconds`, but five."""
    bound = {f"{form}, {graph}": partial(call, x) for (form, graph), call in calls.items()}
    turn = sum(t.median for t in latency(bound, rounds=1, warmup=2).values())
    rounds = min(rounds, max(5, int(seconds / max(turn, 0.02 * len(bound)))))
    timings = latency(bound, rounds=rounds, warmup=1)
    return dict(zip(calls, timings.values(), strict=True))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="networks")
    add("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    add("--batches", nargs="+", type=int, default=[1, 8])
    add("--threads", type=int, default=1, help="CPU threads")
    add("--rounds", type=int, default=25)
    add("--seconds", type=float, default=60.0, help="of rounds per network and batch, about")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    add("--dry", action="store_true", help="write no rows")
    add("--out", type=Path, default=ROOT / "bench" / "results" / "latency.csv")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # the exporter's, and mobilenet's
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use")
    forms = [form for form in options.forms if why_not(form, device) is None]
    for form in set(options.forms) - set(forms):
        print(f"{form} is left out: {why_not(form, device)}")

    where = {"dtype": "float32", **here(device, options.threads)}
    begin = time.perf_counter()
    for case in options.only:
        model, x = network(case)
        made, macs = graphs(model, x)
        made = {name: graph.to(device) for name, graph in made.items()}
        share = macs[GRAPHS[1]] / macs[GRAPHS[0]]
        print(f"{case}: {macs[GRAPHS[0]] / 1e6:,.1f} million MACs, {share:.1%} remain", flush=True)
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            for batch in options.batches:
                many = torch.randn(batch, *x.shape[1:]).to(device)
                about = {"case": case, "shape": "x".join(map(str, many.shape)), **where}
                rows = [
                    {"bench": "macs", "provider": graph, "unit": "million", "rounds": "1", **about}
                    | dict.fromkeys(("p20", "p50", "p80"), f"{count / 1e6:.3f}")
                    for graph, count in macs.items()
                ]
                calls = prepare(made, many, forms, options.threads, Path(folder))
                timings = measure(calls, many, options.rounds, options.seconds)
                for (form, graph), t in timings.items():
                    p20, p50, p80 = (1e3 * value for value in (t.p20, t.median, t.p80))
                    rows.append(
                        {"bench": form, "provider": graph, "unit": "ms", "rounds": str(t.rounds)}
                        | {"p20": f"{p20:.4f}", "p50": f"{p50:.4f}", "p80": f"{p80:.4f}", **about}
                    )
                    said = f"{number(p50):>8} ms  ({number(p20)}-{number(p80)})"
                    if base := timings.get((form, GRAPHS[0])):
                        said += f"  {ratio(t.median, base.median)}"
                    print(f"  {case:12} batch {batch:<4} {form:14} {graph:15} {said}", flush=True)
                if not options.dry:
                    write(options.out, rows)
    print(f"done in {time.perf_counter() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):  # what was measured is written
        sys.exit(main())
    sys.exit(130)
