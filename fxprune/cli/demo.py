"""`fxprune demo`: the whole way on a small network and real images, in numbered steps.

Promise: the digits' demo downloads nothing and takes under a minute; with the same seed and thread
count it trains the same network.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from fxprune.cli import options as o
from fxprune.cli import results
from fxprune.cli.console import percent, print_json, step, table, tell, tell_files, telling, timed
from fxprune.cli.console import title as ruled
from fxprune.cli.folder import RESULTS
from fxprune.cli.values import choice_of
from fxprune.cli.weights import load_weights
from fxprune.errors import FxPruneError
from fxprune.latency import compare, environment, remarks
from fxprune.views.words import as_fast

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor, nn

    from fxprune.report import Report

EXAMPLES = """
[bold]Examples[/]

  fxprune demo

  fxprune demo --data cifar10 --weights resnet20.safetensors
"""
_METHOD = "l1"
_BUDGET = 0.5  # of the MACs
_ALIGN = 8  # kept widths are multiples of what a vector register holds in float32
_NETWORK = "resnet20"


@dataclass(frozen=True)
class Set:
    """What the demo does on a data set: the stem's width, and epochs and rates of both trainings."""

    purpose: str  # what the network learns
    width: int
    epochs: int
    lr: float
    tune_epochs: int
    tune_lr: float
    batch_size: int


SETS = {
    "digits": Set("read digits (1,437 images of 8x8 pixels)", 32, 8, 0.1, 5, 0.02, 64),
    "cifar10": Set("sort photos (50,000 of 32x32 pixels)", 16, 2, 0.1, 1, 0.01, 128),
}


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the files; made when missing.")] = Path(
        "demo-out"
    ),
    data: Annotated[
        str,
        typer.Option(
            help="digits, or cifar10 (minutes).",
            autocompletion=lambda incomplete: [n for n in SETS if n.startswith(incomplete)],
        ),
    ] = "digits",
    data_dir: o.DataDir = None,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Epochs of training.", show_default="8; cifar10: 2"),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(help="Trained weights of the network instead.", show_default=False),
    ] = None,
    seed: o.Seed = 0,
    threads: Annotated[
        int,
        typer.Option(min=1, help="CPU threads of torch; one measures steadily on a busy machine."),
    ] = 1,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Train, prune, fine-tune, measure, save and export a small network, in about a minute."""
    del debug
    choice_of(data, "--data", SETS)
    with telling(as_json) as console:
        result = run_demo(console, out, data, data_dir, epochs, weights, seed, threads)
    if as_json:
        print_json(result)


def run_demo(
    console: Console,
    out: Path,
    data: str,
    data_dir: Path | None,
    epochs: int | None,
    weights: Path | None,
    seed: int,
    threads: int,
) -> dict[str, Any]:
    """The whole demo; what `--json` prints."""
    import fxprune
    from fxprune import data as data_sets
    from fxprune import fit, zoo

    api: Any = fxprune  # the commands below are the public ones
    how = SETS[data]
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    loaders = data_sets.load(data, root=data_dir, batch_size=how.batch_size, seed=seed)
    train, test = loaders
    example = next(iter(test))[0][:1]

    options = {"num_classes": 10, "in_channels": example.shape[1], "width": how.width}
    model = zoo.build(_NETWORK, **options)
    ruled(console, f"{_title(type(model).__name__, _METHOD)} - fxprune demo")
    recipe = fit.Recipe(epochs=epochs or how.epochs, lr=how.lr, warmup=1, seed=seed)
    if weights is not None:
        step(console, 1, f"Load a ResNet-20 that has learnt to {how.purpose}.")
        load_weights(model, weights)
        took = None
    else:
        step(console, 1, f"Train a ResNet-20 to {how.purpose}.")
        with timed() as took:
            fit.train(model, train, recipe)
    model.eval()
    stages = {"before": fit.accuracy(model, test, progress=True)}
    time_taken = f" ({took():.1f} s)" if took else ""
    tell(
        console,
        f"{percent(stages['before'])} of {_count(test)} unseen images are right{time_taken}",
    )

    step(
        console,
        2,
        f"Prune to {100 * _BUDGET:g} % of the MACs: filters of least L1 norm go, {_ALIGN} at a time.",
    )
    with timed() as took:
        pruned = api.compile(
            model,
            example,
            method=_METHOD,
            budget=_BUDGET,
            align=_ALIGN,
            data=loaders.plain,
            seed=seed,
            progress=False,
        )
    report: Report = pruned.report
    pruned.eval()
    stages["after the cut"] = fit.accuracy(pruned, test, progress=True)
    tell(
        console, f"{percent(stages['after the cut'])} are right just after the cut ({took():.1f} s)"
    )
    if report.verified:
        tell(console, f"verified: {report.verified}")

    step(console, 3, "Repair: measure the batch norms' statistics anew, then train a little more.")
    pruned = api.recalibrate(pruned, train, samples=1024)
    pruned.eval()
    stages["recalibrated"] = fit.accuracy(pruned, test, progress=True)
    tell(console, f"{percent(stages['recalibrated'])} with 1,024 images and no training")
    recipe = fit.Recipe(epochs=how.tune_epochs, lr=how.tune_lr, seed=seed + 1)
    with timed() as took:
        fit.train(pruned, train, recipe)
    stages["fine-tuned"] = fit.accuracy(pruned, test, progress=True)
    tuned = f"{recipe.epochs} epoch{'s' * (recipe.epochs > 1)}"
    tell(console, f"{percent(stages['fine-tuned'])} after {tuned} ({took():.1f} s)")

    step(console, 4, f"Measure both networks in turns, on {threads} thread{'s' * (threads > 1)}.")
    report = pruned.report
    report.stages.update(stages)
    report.timings[:] = compare({"original": model, "pruned": pruned}, example, batches=(1, 64))
    report.environment = environment(model)
    m = report.metrics
    report.notes += remarks(report.timings, m["macs_before"], m["macs_after"])
    results.tell_timings(console, report.timings)

    step(console, 5, "Save, and load it back in a fresh process.")
    net, page = out / "net.safetensors", out / "report.html"
    api.save(pruned, net)
    _check_reload(pruned, net, next(iter(test))[0], threads, options)
    tell(console, f"{net.name}: {net.stat().st_size / 1024:,.0f} KiB; same outputs, bit for bit")
    onnx = _export(api, console, pruned, out / "net.onnx")
    report.to_html(page)

    console.print()
    console.print(_title(report.model, report.how), style="bold", markup=False)
    console.print()
    console.print(_summary(report, data))
    console.print()
    files = {
        "weights": net,
        **({"onnx": out / "net.onnx"} if onnx["written"] else {}),
        "report": page,
    }
    tell_files(console, out, {path.name: RESULTS[path.name] for path in files.values()})
    console.print(f"\nDone in {time.perf_counter() - start:.0f} s.")
    return {
        "command": "demo",
        "data": data,
        "seed": seed,
        "threads": threads,
        "seconds": round(time.perf_counter() - start, 3),
        "report": report.to_dict(),
        "fresh_process": {"bit_equal": True},
        "onnx": onnx,
        "files": {name: str(path) for name, path in files.items()},
    }


def _count(loader: Any) -> str:
    data_set = getattr(loader, "dataset", None)
    return "the" if data_set is None else f"{len(data_set):,}"


def _check_reload(
    pruned: nn.Module, weights: Path, x: Tensor, threads: int, options: dict[str, int]
) -> None:
    """Load the file in a fresh process; FxPruneError unless its outputs on `x` are bit-equal."""
    from safetensors.torch import save_file

    with torch.inference_mode():
        y = pruned.eval()(x)
    call = "import sys; from fxprune.cli.demo import reload; sys.exit(reload(*sys.argv[1:]))"
    with tempfile.TemporaryDirectory(prefix="fxprune-demo-") as folder:
        probe = Path(folder) / "probe.safetensors"
        save_file({"input": x.contiguous(), "output": y.contiguous()}, probe)
        arguments = [str(weights), str(probe), str(threads), json.dumps(options)]
        child = subprocess.run(
            [sys.executable, "-c", call, *arguments], capture_output=True, text=True, check=False
        )
    if child.returncode:
        said = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
        raise FxPruneError(
            "the saved network does not come back in a fresh process",
            where=str(weights),
            why=said[-1],
            fix="this is a fault of fxprune; please report it with the output of --debug",
        )


def reload(weights: str, probe: str, threads: str, options: str) -> str | None:
    """In the fresh process: None when the loaded network gives the stored output, else why not."""
    from safetensors.torch import load_file

    import fxprune
    from fxprune import zoo

    torch.set_num_threads(int(threads))
    stored = load_file(probe)
    network = fxprune.load(weights, zoo.build(_NETWORK, **json.loads(options))).eval()
    with torch.inference_mode():
        y = network(stored["input"].clone())
    if torch.equal(y, stored["output"]):
        return None
    return f"outputs differ by up to {(y - stored['output']).abs().max().item():.2e}"


def _export(api: Any, console: Console, pruned: nn.Module, path: Path) -> dict[str, Any]:
    """Write the ONNX file where the packages for it are installed; says so where they are not."""
    missing = [m for m in ("onnx", "onnxscript", "onnxruntime") if not importlib.util.find_spec(m)]
    if missing:
        why = f"{', '.join(missing)} not installed; pip install 'fxprune[export]' adds the export"
        tell(console, f"no {path.name}: {why}")
        return {"written": False, "why": why}
    api.export(pruned, path)
    size = path.stat().st_size / 1024
    tell(console, f"{path.name}: {size:,.0f} KiB; ONNX Runtime gives the same outputs to rounding")
    return {"written": True, "why": ""}


def _summary(report: Report, data: str) -> Any:
    """Both networks side by side, as a rich table."""
    shown = table("", "original", "pruned", "")
    m, s = report.metrics, report.stages
    shown.add_row(
        f"{data} that are right",
        percent(s["before"]),
        f"[bold]{percent(s['fine-tuned'])}",
        f"{100 * (s['fine-tuned'] - s['before']):+.1f} points",
    )
    for key, label in (("macs", "MACs per image"), ("params", "parameters")):
        old, new = m[f"{key}_before"], m[f"{key}_after"]
        shown.add_row(label, f"{old:,}", f"[bold]{new:,}", f"{percent(new / old, 1)} remain")
    for before, after in zip(report.timings[::2], report.timings[1::2], strict=True):
        shown.add_row(
            f"latency, batch {before.batch}",
            f"{before.median_ms:.2f} ms",
            f"[bold]{after.median_ms:.2f} ms",
            as_fast(before.median_ms / after.median_ms),
        )
    return shown


def _title(model: str, method: str) -> str:
    return f"{model} pruned by {method}"
