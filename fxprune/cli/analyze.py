"""`fxprune analyze`: what of a network can be cut, what not and why, in words and as a drawing; with
`--sensitivity`, how much each layer bears.

In Python: `fxprune.analyze`, `fxprune.sensitivity`.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from torch.utils.data import DataLoader

import fxprune
from fxprune.checkpoint import atomic_write
from fxprune.cli import options as o
from fxprune.cli import specs, values
from fxprune.cli.console import percent, print_json, table, tell_files, telling, title
from fxprune.cli.folder import Run, opened
from fxprune.cli.source import Opened, Source
from fxprune.config import REGISTRY
from fxprune.cost import Cost
from fxprune.coupling import rows_of
from fxprune.errors import OptionError
from fxprune.sensitivity import Sensitivity, sensitivity
from fxprune.views.coupling import draw_coupling
from fxprune.views.tables import sensitivity_terminal

if TYPE_CHECKING:
    import networkx as nx
    from rich.console import Console

    from fxprune.groups import Analysis

EXAMPLES = """
[bold]Examples[/]

Groups of channels that live or die together, and what is frozen:

  fxprune analyze torchvision:mobilenet_v2

The same as a drawing, which layer makes and which reads the channels of a group:

  fxprune analyze torchvision:mobilenet_v2 --out drawn

How the accuracy falls when each layer is cut alone, and ratios that it bears:

  fxprune analyze zoo:resnet56 --weights w.pth --data cifar10 --sensitivity

  fxprune compile zoo:resnet56 --weights w.pth --ratio @ratios.json
"""
_SCAN = "Sensitivity"
DRAWING = "coupling.svg"


def analyze(
    ctx: typer.Context,
    model: o.Model,
    set_: o.Set = None,
    weights: o.Weights = None,
    input_size: o.InputSize = None,
    data: o.Data = None,
    data_dir: o.DataDir = None,
    batch_size: o.BatchSize = 128,
    workers: o.Workers = 0,
    device: o.Device = "auto",
    scan: Annotated[
        bool,
        typer.Option(
            "--sensitivity",
            help="Score each group, cut alone, at 10 to 90 %.",
            rich_help_panel=_SCAN,
        ),
    ] = False,
    order: Annotated[
        str | None,
        typer.Option(
            help="Which go: smallest, largest, random; several with commas between.",
            show_default="smallest",
            rich_help_panel=_SCAN,
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="What ranks the channels.",
            autocompletion=values.method_names,
            rich_help_panel=_SCAN,
        ),
    ] = "l1",
    scope: Annotated[
        list[str] | None,
        typer.Option(
            metavar="all|free|NAMES",
            help="Which groups to score.",
            show_default="all",
            rich_help_panel=_SCAN,
        ),
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Test images per score.", rich_help_panel=_SCAN)
    ] = 1000,
    drop: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="The loss of accuracy that a layer may cost.", rich_help_panel=_SCAN
        ),
    ] = 0.01,
    out: o.Out = None,
    resume: o.Resume = None,
    seed: o.Seed = 0,
    threads: o.Threads = None,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Show what can be cut, what is frozen and why; --sensitivity scores every layer."""
    del debug
    source = Source(
        model=model,
        set_=set_,
        weights=weights,
        input_size=input_size,
        data=data,
        data_dir=data_dir,
        batch_size=batch_size,
        workers=workers,
        augment=False,
        device=device,
        seed=seed,
    )
    methods = _methods(method, order)
    if scan and data is None:
        raise OptionError(
            "--sensitivity needs data", where="--data", fix="name a set to score on: --data cifar10"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    with telling(as_json) as console:
        if not scan:
            document = _analysed(console, source, out)
        else:
            folder = out or Path("fxprune-out") / f"{specs.slug(model)}-sensitivity"
            settings = ctx.params
            with opened(
                folder, "analyze", ctx.obj, settings, resume=resume, inputs=source.inputs
            ) as run:
                title(console, f"{model}: what its layers bear - fxprune analyze")
                if not run.finished:
                    _scan(run, source, methods, values.scope_of(scope or ("all",)), samples)
                document = _scanned(console, run, drop, source)
    if as_json:
        print_json(document)


def _methods(name: str, order: str | None) -> list[object]:
    """The method, once per order."""
    orders = [None] if order is None else [part.strip() for part in order.split(",")]
    fixed = (
        {f.name for f in dataclasses.fields(REGISTRY[name].config)} if name in REGISTRY else set()
    )
    if order is None and "order" in fixed:
        orders = ["smallest"]
    return [values.method_of(name, {"order": o}) for o in dict.fromkeys(orders)]


def _analysed(console: Console, source: Source, out: Path | None) -> dict[str, Any]:
    """Print the groups, and draw them where a folder is named; the document."""
    opened_source = source.open()
    analysis = fxprune.analyze(opened_source.model, opened_source.example)
    cost, whole = Cost.of(analysis), analysis.everything()
    macs, params = cost.macs(whole), cost.params(whole)
    title(console, f"{source.model} - fxprune analyze")
    console.print(str(analysis), markup=False, soft_wrap=True)
    shape = "x".join(str(n) for n in analysis.traced.example_inputs[0].shape)
    console.print(f"\n{macs:,} MACs per sample of {shape}, {params:,} parameters")
    graph = analysis.coupling()
    files = {}
    if out is not None:
        drawn = draw_coupling(graph, type(opened_source.model).__name__)
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(out / DRAWING, drawn.encode("utf-8", "replace"))
        files[DRAWING] = str(out / DRAWING)
        console.print()
        tell_files(console, out, {DRAWING: "the groups; open it in a browser"})
    return {
        "command": "analyze",
        "model": source.model,
        "macs": int(macs),
        "params": int(params),
        "input": list(analysis.traced.example_inputs[0].shape),
        "groups": _rows(analysis),
        "frozen": analysis.frozen,
        "coupling": _graph(graph),
        "files": files,
    }


def _rows(analysis: Analysis) -> list[dict[str, Any]]:
    return [
        {
            "name": r.name,
            "kind": r.kind,
            "channels": r.channels,
            "cuttable": r.cuttable,
            "macs_share": r.macs,
            "residual": r.residual,
            "members": list(r.members),
        }
        for r in rows_of(analysis)
    ]


def _graph(graph: nx.DiGraph) -> dict[str, Any]:
    """A graph of groups as plain data."""
    return {
        "nodes": [{"name": name, **values} for name, values in graph.nodes(data=True)],
        "edges": [
            {"from": a, "to": b, "layers": list(layers)}
            for a, b, layers in graph.edges(data="layers")
        ],
    }


def _scan(
    run: Run, source: Source, methods: Sequence[object], scope: str | tuple[str, ...], samples: int
) -> None:
    """Score everything that is not scored yet, and write the files."""
    opened_source = source.open()
    found = sensitivity(
        opened_source.model,
        opened_source.example,
        evaluate=_images(opened_source, samples),
        method=methods,
        scope=scope,
        data=opened_source.loaders.plain,
        cache=run.folder / "sensitivity.jsonl",
        seed=source.seed,
    )
    run.put("sensitivity.json", found.to_json() + "\n")
    run.finish()


def _images(source: Opened, samples: int) -> Any:
    """So many test images, drawn once for all (a folder of images is sorted by class), as batches."""
    test = source.loaders.test
    seeded = torch.Generator().manual_seed(0)
    drawn = torch.randperm(len(test.dataset), generator=seeded)[:samples].sort().values
    chunks = [chunk.tolist() for chunk in drawn.split(test.batch_size or samples)]
    return list(DataLoader(test.dataset, batch_sampler=chunks, collate_fn=test.collate_fn))


def _scanned(console: Console, run: Run, drop: float, source: Source) -> dict[str, Any]:
    """Print the scan and what it proposes, for each of its methods; write page and ratios."""
    found = Sensitivity.from_json((run.folder / "sensitivity.json").read_bytes())
    found.to_html(run.folder / "sensitivity.html", drop)
    proposed = {label: found.propose(drop, label) for label in found.methods}
    first = next(iter(proposed.values()), {})
    run.put("ratios.json", json.dumps(first, indent=2) + "\n")
    console.print()
    shown = sensitivity_terminal(found, console.width, console.options.ascii_only, drop)
    for part in shown:
        console.print(part)
    if first:
        console.print(
            "A proposal ends before the first ratio that costs more, even where a larger one costs "
            "less.",
            style="dim",
        )
    console.print()
    if len(proposed) > 1:
        lost = percent(drop, 1)
        console.print(f"Ratios that cost at most {lost} each, by method", style="bold")
        console.print(_proposals(found, proposed))
        console.print()
    if first:
        console.print("All of them together (what they cost in sum is yet to be scored):")
        console.print(
            f"  {_next_command(source, run)}\n", style="bold", markup=False, soft_wrap=True
        )
    tell_files(console, run.folder, run.files())
    return {
        "command": "analyze",
        "model": source.model,
        "out": str(run.folder),
        "resumed": run.resumed,
        "drop": drop,
        "baseline": found.to_dict()["baseline"],
        "curves": found.to_dict()["curves"],
        "ratios": proposed,
        "arguments": [w for name, r in first.items() for w in ("--ratio", f"{name}={r:g}")],
        "files": {name: str(run.folder / name) for name in run.files()},
    }


def _next_command(source: Source, run: Run) -> str:
    """What compiles the same network with these ratios."""
    words = ["fxprune", "compile", source.model]
    for option in source.set_ or ():
        words += ["--set", option]
    if source.weights is not None:
        words += ["--weights", str(source.weights)]
    words += ["--data", str(source.data), "--ratio", f"@{run.folder / 'ratios.json'}"]
    return shlex.join(words)


def _proposals(found: Sensitivity, proposed: dict[str, dict[str, float]]) -> Any:
    """A row per layer, a column per method."""
    from rich.text import Text

    shown = table("group", *proposed)
    for name in dict.fromkeys(c.name for c in found.curves):
        cells = [f"{r[name]:g}" if name in r else "-" for r in proposed.values()]
        shown.add_row(Text(name), *cells)
    return shown
