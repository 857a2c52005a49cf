"""`fxprune scratch`: the pruned architecture trained from fresh weights, the comparison that a
pruned network has to stand. Source: Li et al. 2017 (arXiv:1608.08710), section 4 ("scratch-train").

In Python: `fxprune.apply(fresh_model, plan)`, then `fxprune.fit.train`.
Departs: fresh weights are those of the whole network, cut; a batch norm follows nearly every layer,
and takes away the difference in scale.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

import fxprune
from fxprune import fit
from fxprune.cli import options as o
from fxprune.cli import results, specs
from fxprune.cli.compile import score, train
from fxprune.cli.console import print_json, telling, title
from fxprune.cli.folder import RECORD, Run, opened
from fxprune.cli.report import plan_in
from fxprune.cli.source import Source
from fxprune.errors import OptionError

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLES = """
[bold]Examples[/]

Train what `fxprune compile` left of a network, from fresh weights:

  fxprune scratch plan.json zoo:resnet56 --data cifar10 --epochs 164
"""


def scratch(
    ctx: typer.Context,
    file: Annotated[
        Path, typer.Argument(help="plan.json, net.safetensors, or the folder of a run.")
    ],
    model: o.Model,
    data: o.NeededData,
    set_: o.Set = None,
    data_dir: o.DataDir = None,
    batch_size: o.BatchSize = 128,
    workers: o.Workers = 0,
    device: o.Device = "auto",
    epochs: Annotated[int, typer.Option(min=1, help="Epochs.", rich_help_panel="Training")] = 10,
    lr: o.LearningRate = 0.1,
    schedule: o.Schedule = "cosine",
    warmup: o.Warmup = 0.0,
    momentum: o.Momentum = 0.9,
    weight_decay: o.WeightDecay = 5e-4,
    label_smoothing: o.LabelSmoothing = 0.0,
    clip_norm: o.ClipNorm = None,
    augment: o.Augment = True,
    amp: o.Amp = None,
    channels_last: o.ChannelsLast = False,
    out: o.Out = None,
    resume: o.Resume = None,
    latency: o.Latency = True,
    latency_batch: o.LatencyBatch = None,
    export: o.Export = None,
    seed: o.Seed = 0,
    threads: o.Threads = None,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Train a pruned architecture from fresh weights. Writes a folder like that of compile."""
    del debug
    source = Source(
        model=model,
        set_=set_,
        data=data,
        data_dir=data_dir,
        batch_size=batch_size,
        workers=workers,
        augment=augment,
        device=device,
        seed=seed,
    )
    recipe = fit.Recipe(
        epochs=epochs,
        lr=lr,
        schedule=schedule,  # type: ignore[arg-type]  # the recipe checks its words
        warmup=warmup,
        momentum=momentum,
        weight_decay=weight_decay,
        label_smoothing=label_smoothing,
        clip_norm=clip_norm,
        seed=seed,
        amp=amp,  # type: ignore[arg-type]
        channels_last=channels_last,
    )
    wanted = results.Wanted(latency=latency, batches=latency_batch, exports=export)
    if not file.exists():
        raise OptionError(f"there is no file `{file}`", where="FILE")
    places = (file / "plan.json", file / "net.safetensors", file)
    plan_file = next((p for p in places if p.is_file()), None)
    if plan_file is None:
        raise OptionError(
            f"the folder {file} holds no plan",
            where="FILE",
            why="looked for plan.json, net.safetensors",
            fix="a run that was stopped has none: give its command again to go on",
        )
    folder = out or Path("fxprune-out") / f"{specs.slug(model)}-scratch"
    inputs = {**source.inputs, "FILE": plan_file}
    with (
        telling(as_json) as console,
        opened(folder, "scratch", ctx.obj, ctx.params, resume=resume, inputs=inputs) as run,
    ):
        if threads is not None:
            torch.set_num_threads(threads)
        title(console, f"{model} as in {file}, from fresh weights - fxprune scratch")
        if not run.finished:
            _work(console, run, source, plan_file, recipe, wanted)
        else:
            results.check_exports(run, wanted)
        document = results.show(console, run)
    if as_json:
        print_json(document)


def _work(
    console: Console,
    run: Run,
    source: Source,
    plan_file: Path,
    recipe: fit.Recipe,
    wanted: results.Wanted,
) -> None:
    steps = results.Steps(console)
    steps.head(f"Build {source.model} as the plan says.")
    opened_source = source.open()
    plan = plan_in(plan_file)
    # Folded batch norms would be missing in training; what a plan says of weights does not matter.
    bare = replace(plan, folds=(), weights="cut")
    network: Any = fxprune.apply(opened_source.model, bare, opened_source.example)
    m = network.report.metrics
    steps.tell(f"{m['params_after']:,} of {m['params_before']:,} parameters, fresh ones")
    if plan.folds:
        network.report.notes.append("the plan's folded batch norms are kept apart, for training")

    epochs = f"{recipe.epochs} epoch{'s' * (recipe.epochs > 1)}"
    steps.head(f"Train for {epochs}.")
    train(steps, network, opened_source.loaders.train, recipe, run.checkpoint(1))
    score(steps, run, "from scratch", network, opened_source.loaders)
    network.report.stages = {**_earlier(plan_file), **run.scores}
    network.eval()

    if wanted.latency:
        steps.head("Measure both networks in turns.")
        results.measure(console, network.report, opened_source.model, network, wanted.batches)
    results.write(run, network, wanted.exports)


def _earlier(plan_file: Path) -> dict[str, float]:
    """The scores of the run that the plan comes from, when its folder is there: to compare with."""
    try:
        record = json.loads((plan_file.parent / RECORD).read_text(encoding="utf-8"))
        scores = record["scores"] if record["command"] == "compile" else {}
        last = list(scores)[-1:]
        return {
            f"pruned: {k}": float(scores[k])
            for k in dict.fromkeys(["before", *last])
            if scores.get(k) is not None
        }
    except (OSError, ValueError, KeyError, TypeError):
        return {}
