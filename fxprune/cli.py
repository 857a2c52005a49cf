"""The command line, `fxprune`. Thin: what a command does, a user can do with the same few calls.

Exit codes: 0 done, 2 bad usage, 130 after Ctrl-C, 143 after SIGTERM, 1 anything else, then with
one clear line on stderr (`--debug`: the traceback). With `--json` stdout holds one JSON document
and nothing else; what is told along the way goes to stderr.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import platform
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fxprune._version import __version__
from fxprune.errors import FxPruneError

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor, nn

    from fxprune.report import Report

app = typer.Typer(
    name="fxprune",
    help="Structured pruning of PyTorch models: a smaller network that computes what the masked "
    "original computes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]
_Threads = Annotated[
    int, typer.Option(min=1, help="CPU threads of torch; one measures steadily on a busy machine.")
]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    arguments: the words after `fxprune`; None takes them from `sys.argv`.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    with _signals() as received:
        try:
            app(words, prog_name="fxprune")
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
        except KeyboardInterrupt:
            code = 128 + signal.SIGINT
        except Exception as error:
            code = 1
            if "--debug" in words:
                traceback.print_exception(error)
            else:
                _say(f"error: {_one_line(error)}")
    if received:
        _say(f"stopped by {received[-1].name}")
        code = 128 + received[-1]
    return code


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fxprune {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    debug: _Debug = False,
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    # The callback keeps `demo` a word of its own even while it is the only command.
    del debug, version  # `main` reads the one, `_print_version` the other


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the files; made when missing.")] = Path(
        "demo-out"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the batches.")] = 0,
    threads: _Threads = 1,
    as_json: _Json = False,
    debug: _Debug = False,
) -> None:
    """Train, prune, fine-tune, measure, save and export a small network, in about a minute."""
    del debug
    from rich.console import Console

    console = Console(stderr=as_json, highlight=False)
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        result = _demo(console, out, seed, threads)
    if as_json:
        print(json.dumps(result, indent=2, allow_nan=False))


# ---- demo ---------------------------------------------------------------------------------------

_METHOD = "l1"
_BUDGET = 0.5  # of the MACs
_ALIGN = 8  # kept widths are multiples of what a vector register holds in float32
_WIDTH = 32
_BATCHES = (1, 64)  # batch sizes of the latency measurement


def _demo(console: Console, out: Path, seed: int, threads: int) -> dict[str, Any]:
    """The whole demo; what `--json` prints."""
    import torch

    import fxprune
    from fxprune import data, fit, zoo
    from fxprune.report import as_fast

    api: Any = fxprune  # the commands below are the public ones
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    train, test = data.digits(batch_size=64, seed=seed)
    example = next(iter(test))[0][:1]

    model = zoo.resnet20(in_channels=1, width=_WIDTH)
    console.rule(f"[bold]{_title(type(model).__name__, _METHOD)} - fxprune demo", align="left")
    _step(console, 1, "Train a ResNet-20 to read digits (1,437 images of 8x8 pixels).")
    recipe = fit.Recipe(epochs=8, lr=0.1, warmup=1, seed=seed)
    with _timed() as took:
        fit.train(model, train, recipe)
    model.eval()
    stages = {"before": fit.accuracy(model, test)}
    _told(console, f"{_percent(stages['before'])} of 360 unseen digits are right ({took():.1f} s)")

    _step(
        console,
        2,
        f"Prune to {_BUDGET:.0%} of the MACs: filters of least L1 norm go, {_ALIGN} at a time.",
    )
    with _timed() as took:
        pruned = api.compile(
            model,
            example,
            method=_METHOD,
            budget=_BUDGET,
            align=_ALIGN,
            data=train,
            seed=seed,
            progress=False,
        )
    report: Report = pruned.report
    pruned.eval()
    stages["after the cut"] = fit.accuracy(pruned, test)
    _told(
        console,
        f"{_percent(stages['after the cut'])} are right just after the cut ({took():.1f} s)",
    )
    if report.verified:
        _told(console, f"verified: {report.verified}")

    _step(console, 3, "Repair: measure the batch norms' statistics anew, then train a little more.")
    pruned = api.recalibrate(pruned, train, samples=1024)
    pruned.eval()
    stages["recalibrated"] = fit.accuracy(pruned, test)
    _told(console, f"{_percent(stages['recalibrated'])} with 1,024 images and no training")
    recipe = fit.Recipe(epochs=5, lr=0.02, seed=seed + 1)
    with _timed() as took:
        fit.train(pruned, train, recipe)
    stages["fine-tuned"] = fit.accuracy(pruned, test)
    _told(
        console, f"{_percent(stages['fine-tuned'])} after {recipe.epochs} epochs ({took():.1f} s)"
    )

    _step(console, 4, f"Measure both networks in turns, on {threads} thread{'s' * (threads > 1)}.")
    report = pruned.report
    report.stages.update(stages)
    report.timings[:] = _measure(model, pruned)
    report.environment = _environment(model, threads)
    for before, after in zip(report.timings[::2], report.timings[1::2], strict=True):
        _told(
            console,
            f"batch {before.batch}: {before.median_ms:.2f} ms -> {after.median_ms:.2f} ms, "
            + as_fast(before.median_ms / after.median_ms),
        )

    _step(console, 5, "Save, and load it back in a fresh process.")
    weights, page = out / "net.safetensors", out / "report.html"
    api.save(pruned, weights)
    _check_reload(pruned, weights, next(iter(test))[0], threads)
    _told(
        console,
        f"{weights.name}: {weights.stat().st_size / 1024:,.0f} KiB; same outputs, bit for bit",
    )
    onnx = _export(api, console, pruned, out / "net.onnx")
    report.to_html(page)

    console.print()
    console.print(_title(report.model, report.method), style="bold", markup=False)
    console.print()
    console.print(_summary(report))
    console.print()
    files = {
        "weights": weights,
        **({"onnx": out / "net.onnx"} if onnx["written"] else {}),
        "report": page,
    }
    hints = {
        "weights": "weights and plan; fxprune.load reads it",
        "onnx": "for ONNX Runtime",
        "report": "open it in a browser",
    }
    for name, path in files.items():
        console.print(f"  {path}", style="bold", markup=False, end="", soft_wrap=True)
        console.print(f"  {hints[name]}", style="dim", soft_wrap=True)
    console.print(f"\nDone in {time.perf_counter() - start:.0f} s.")
    return {
        "command": "demo",
        "seed": seed,
        "threads": threads,
        "seconds": round(time.perf_counter() - start, 3),
        "report": report.to_dict(),
        "fresh_process": {"bit_equal": True},
        "onnx": onnx,
        "files": {name: str(path) for name, path in files.items()},
    }


def _measure(model: nn.Module, pruned: nn.Module) -> list[Any]:
    """Timing rows of both networks in eval mode, batch size by batch size."""
    import torch

    from fxprune.latency import latency
    from fxprune.report import TimingRow

    networks = {"original": model.eval(), "pruned": pruned.eval()}
    rows = []
    with torch.inference_mode():
        for batch in _BATCHES:
            x = torch.randn(batch, 1, 8, 8, generator=torch.Generator().manual_seed(0))
            calls = {name: _call(network, x) for name, network in networks.items()}
            for name, t in latency(calls, rounds=25).items():
                rows.append(TimingRow(name, batch, 1e3 * t.median, 1e3 * t.p20, 1e3 * t.p80))
    return rows


def _environment(model: nn.Module, threads: int) -> str:
    """What the networks were measured on, in words."""
    import torch

    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    on = f"{threads} thread{'s' * (threads > 1)} of {_processor()}"
    return f"{on}, {dtype}, torch {torch.__version__}"


def _processor() -> str:
    """The name of the CPU, or at least its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "an unknown CPU"


def _call(network: nn.Module, x: Tensor) -> Any:
    return lambda: network(x)


def _check_reload(pruned: nn.Module, weights: Path, x: Tensor, threads: int) -> None:
    """Load the file in a fresh process; FxPruneError unless its outputs on `x` are bit-equal."""
    import torch
    from safetensors.torch import save_file

    with torch.inference_mode():
        y = pruned.eval()(x)
    with tempfile.TemporaryDirectory(prefix="fxprune-demo-") as folder:
        probe = Path(folder) / "probe.safetensors"
        save_file({"input": x.contiguous(), "output": y.contiguous()}, probe)
        child = subprocess.run(
            [
                sys.executable,
                "-c",
                "import sys; from fxprune.cli import _reload; sys.exit(_reload(*sys.argv[1:]))",
                str(weights),
                str(probe),
                str(threads),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    if child.returncode:
        said = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
        raise FxPruneError(
            "the saved network does not come back in a fresh process",
            where=str(weights),
            why=said[-1],
            fix="this is a fault of fxprune; please report it with the output of --debug",
        )


def _reload(weights: str, probe: str, threads: str) -> str | None:
    """In the fresh process: None when the loaded network gives the stored output, else why not."""
    import torch
    from safetensors.torch import load_file

    import fxprune
    from fxprune import zoo

    torch.set_num_threads(int(threads))
    stored = load_file(probe)
    api: Any = fxprune
    network = api.load(weights, zoo.resnet20(in_channels=1, width=_WIDTH)).eval()
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
        _told(console, f"no {path.name}: {why}")
        return {"written": False, "why": why}
    api.export(pruned, path)
    _told(
        console,
        f"{path.name}: {path.stat().st_size / 1024:,.0f} KiB; ONNX Runtime gives the same outputs to rounding",
    )
    return {"written": True, "why": ""}


def _summary(report: Report) -> Any:
    """Both networks side by side, as a rich table."""
    from rich import box
    from rich.table import Table

    from fxprune.report import as_fast

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, header_style="dim")
    table.add_column("")
    for name in ("original", "pruned", ""):
        table.add_column(name, justify="right")
    m, s = report.metrics, report.stages
    table.add_row(
        "digits read right",
        _percent(s["before"]),
        f"[bold]{_percent(s['fine-tuned'])}",
        f"{100 * (s['fine-tuned'] - s['before']):+.1f} points",
    )
    for key, label in (("macs", "MACs per image"), ("params", "parameters")):
        old, new = m[f"{key}_before"], m[f"{key}_after"]
        table.add_row(label, f"{old:,}", f"[bold]{new:,}", f"{new / old:.1%} remain")
    for before, after in zip(report.timings[::2], report.timings[1::2], strict=True):
        table.add_row(
            f"latency, batch {before.batch}",
            f"{before.median_ms:.2f} ms",
            f"[bold]{after.median_ms:.2f} ms",
            as_fast(before.median_ms / after.median_ms),
        )
    return table


# ---- words --------------------------------------------------------------------------------------


def _step(console: Console, number: int, text: str) -> None:
    console.print(f"\n[bold cyan]{number}[/]  {text}")


def _told(console: Console, text: str) -> None:
    console.print(f"   {text}", markup=False, style="dim", soft_wrap=True)


def _title(model: str, method: str) -> str:
    return f"{model} pruned by {method}"


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _say(text: str) -> None:
    with contextlib.suppress(OSError):  # nobody reads stderr any more
        print(f"fxprune: {text}", file=sys.stderr)


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
def _timed() -> Iterator[Any]:
    """Yields a function that says how many seconds the block took, or has taken so far."""
    start = time.perf_counter()
    end: list[float] = []
    try:
        yield lambda: (end[0] if end else time.perf_counter()) - start
    finally:
        end.append(time.perf_counter())


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


if __name__ == "__main__":
    sys.exit(main())
