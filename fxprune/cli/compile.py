"""`fxprune compile`: prune a network, repair it, train it on, measure it, and keep all of that.

In Python: `fxprune.compile(model, x, method=..., fit=...)`, `fxprune.recalibrate`, `fxprune.fit.train`
with a checkpoint, `fxprune.latency.compare`, `fxprune.save`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import typer
from torch import nn

import fxprune
from fxprune import fit
from fxprune.cli import options as o
from fxprune.cli import results, specs, values
from fxprune.cli.console import percent, print_json, telling, timed, title
from fxprune.cli.folder import Run, opened
from fxprune.cli.source import Opened, Source
from fxprune.errors import OptionError

if TYPE_CHECKING:
    from rich.console import Console

EXAMPLES = """
[bold]Examples[/]

A published network, cut to half of its MACs, repaired and trained for three epochs:

  fxprune compile zoo:resnet56 --weights resnet56.safetensors --data cifar10

As in a paper; a fixed share; shares by layer; your own model:

  fxprune compile zoo:resnet56 --preset ResNet-56-A --data cifar10 --epochs 20

  fxprune compile zoo:vgg16_bn --ratio 0.3 --ratio 'features.0=0.5'

  fxprune compile torchvision:resnet50 --budget macs=0.6 --align 8

  fxprune compile net.py:make_net --set width=32 --input-size 1x3x64x64

The same command goes on where Ctrl-C, SIGTERM or a crash stopped it.
"""


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is done with the model of a `Source`.

    cut: keyword arguments of `fxprune.compile`. asked: the same in words. repair: whether batch
    norms are measured anew, on so many `samples`. recipe: how to train after each of the `steps`.
    """

    cut: Mapping[str, Any]
    asked: str
    steps: int
    repair: bool
    samples: int
    recipe: fit.Recipe | None


def compile(
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
    method: o.Method = "l1",
    preset: o.Preset = None,
    ratio: o.Ratio = None,
    budget: o.Budget = None,
    order: o.Order = None,
    norm: o.Norm = None,
    scoring: o.Scoring = None,
    by: o.By = None,
    steps: o.Steps = None,
    scope: o.Scope = None,
    ignore: o.Ignore = None,
    align: o.Align = 1,
    repair: o.Repair = None,
    samples: o.Samples = 1024,
    epochs: o.Epochs = None,
    lr: o.LearningRate = 0.01,
    schedule: o.Schedule = "cosine",
    warmup: o.Warmup = 0.0,
    momentum: o.Momentum = 0.9,
    weight_decay: o.WeightDecay = 5e-4,
    label_smoothing: o.LabelSmoothing = 0.0,
    clip_norm: o.ClipNorm = None,
    augment: o.Augment = True,
    amp: o.Amp = None,
    channels_last: o.ChannelsLast = False,
    fold: o.Fold = False,
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
    """Prune a network; with --data, also repair, fine-tune and score it. Writes a folder."""
    del debug  # `main` reads it from the command line
    source = Source(
        model=model,
        set_=set_,
        weights=weights,
        input_size=input_size,
        data=data,
        data_dir=data_dir,
        batch_size=batch_size,
        workers=workers,
        augment=augment,
        device=device,
        seed=seed,
    )
    config = values.method_of(
        method,
        {
            "ratio": values.ratio_of(ratio or ()),
            "preset": preset,
            "order": order,
            "norm": norm,
            "scoring": scoring,
            "by": by,
            "steps": steps,
        },
    )
    allowed = values.budget_of(budget or ())
    has_data = data is not None
    mends = values.choice_of(
        repair or ("bn" if has_data else "none"), "--repair", {"none": False, "bn": True}
    )
    rounds = (3 if has_data else 0) if epochs is None else epochs
    for needed, option in ((mends, "--repair bn"), (rounds, "--epochs")):
        if needed and not has_data:
            raise OptionError(f"{option} needs data", where="--data", fix="--data cifar10")
    recipe = fit.Recipe(
        epochs=rounds,
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
    job = Job(
        cut={
            "method": config,
            "budget": allowed,
            "scope": values.scope_of(scope or ("all",)),
            "ignore": tuple(ignore or ()),
            "align": align,
            "fold": fold,
            "seed": seed,
        },
        asked=asked_for(method, preset, ratio, allowed),
        steps=steps or 1,
        repair=mends,
        samples=samples,
        recipe=recipe if rounds else None,
    )
    wanted = results.Wanted(latency=latency, batches=latency_batch, exports=export)
    folder = out or Path("fxprune-out") / f"{specs.slug(model)}-{method}"
    inputs, files = source.inputs, values.ratio_files(ratio or ())
    for file in files:  # guard: other ratios -> tests/cli/test_compile.py -k changed_file
        inputs[f"--ratio {file}"] = file
    with (
        telling(as_json) as console,
        opened(folder, "compile", ctx.obj, ctx.params, resume=resume, inputs=inputs) as run,
    ):
        if threads is not None:
            torch.set_num_threads(threads)
        title(console, f"{model} pruned by {method} - fxprune compile")
        if not run.finished:
            work(console, run, source, job, wanted)
        else:
            results.check_exports(run, wanted)
        document = results.show(console, run)
    if as_json:
        print_json(document)


def asked_for(
    method: str, preset: str | None, ratio: list[str] | None, budget: fxprune.Budget | None
) -> str:
    """What is to go, in words."""
    if preset is not None:
        return f"by {method}, as {preset} says"
    if ratio:
        return f"by {method}; of the channels go: {', '.join(ratio)}"
    limits = {"macs": 0.5} if budget is None else budget.to_dict()
    names = {"macs": "MACs", "params": "parameters"}
    shares = " and ".join(f"{100 * share:g} % of the {names[k]}" for k, share in limits.items())
    return f"by {method}, to at most {shares}"


def work(console: Console, run: Run, source: Source, job: Job, wanted: results.Wanted) -> None:
    """Everything but showing what came out."""
    steps = results.Steps(console)
    steps.head(f"Load {source.model}.")
    model = source.open()
    count = sum(p.numel() for p in model.model.parameters())
    steps.tell(f"{type(model.model).__name__}, {count:,} parameters{_origin(source)}")
    if model.loaders is not None:
        score(steps, run, "before", model.model, model.loaders)

    steps.head(f"Cut {job.asked}.")
    tune = None if model.loaders is None else _tuner(steps, run, model, job)
    with timed() as took:
        pruned: Any = fxprune.compile(
            model.model,
            model.example,
            data=None if model.loaders is None else model.loaders.plain,
            fit=tune,
            progress=False,
            **job.cut,
        )
    report = pruned.report
    report.stages = run.scores
    if tune is None:
        steps.tell(f"{_left(report)} ({took():.1f} s)")
    pruned.eval()

    if wanted.latency:
        steps.head("Measure both networks in turns.")
        results.measure(console, report, model.model, pruned, wanted.batches)
    results.write(run, pruned, wanted.exports)


def _origin(source: Source) -> str:
    """Where the weights come from, as far as it is known."""
    if source.weights is not None:
        return f", trained: {source.weights.name}"
    return ", fresh: without --weights, nothing is learnt yet" * source.model.startswith("zoo:")


def _tuner(steps: results.Steps, run: Run, model: Opened, job: Job) -> Any:
    """What `fxprune.compile` calls after each cut: score, repair, train, and score in between."""
    numbers = itertools.count(1)

    def tune(pruned: Any) -> None:
        number, loaders = next(numbers), model.loaders
        which = f", step {number} of {job.steps}" if job.steps > 1 else ""
        pruned.eval()
        steps.tell(_left(pruned.report))
        if pruned.report.verified:
            steps.tell(f"verified: {pruned.report.verified}")
        score(steps, run, f"after the cut{which}", pruned, loaders)
        if job.repair:
            steps.head(f"Repair: measure batch norms anew on {job.samples:,} images{which}.")
            mended = fxprune.recalibrate(pruned, loaders.train, samples=job.samples)
            pruned.load_state_dict(mended.state_dict())
            pruned.report.notes = mended.report.notes
            score(steps, run, f"recalibrated{which}", pruned, loaders)
        if job.recipe is not None:
            epochs = f"{job.recipe.epochs} epoch{'s' * (job.recipe.epochs > 1)}"
            steps.head(f"Fine-tune for {epochs}{which}.")
            train(steps, pruned, loaders.train, job.recipe, run.checkpoint(number))
            score(steps, run, f"fine-tuned{which}", pruned, loaders)

    return tune


def train(
    steps: results.Steps, network: nn.Module, loader: Any, recipe: fit.Recipe, checkpoint: Path
) -> None:
    """Train, or go on with it; the loss of the last epoch is told."""
    if checkpoint.exists():
        steps.tell("goes on from the checkpoint of an earlier run")
    with timed() as took:
        losses = fit.train(network, loader, recipe, checkpoint=checkpoint)
    steps.tell(f"loss {losses[-1]:.3f} in the last epoch ({took():.0f} s)")


def score(steps: results.Steps, run: Run, stage: str, network: nn.Module, loaders: Any) -> None:
    """Top-1 accuracy on the test images, kept in the run and told."""
    with timed() as took:
        value, known = run.score(stage, lambda: fit.accuracy(network, loaders.test, progress=True))
    when = "measured before" if known else f"{took():.1f} s"
    steps.tell(f"{stage}: {percent(value)} of the test images are right ({when})")


def _left(report: Any) -> str:
    m = report.metrics
    macs = percent(m["macs_after"] / max(m["macs_before"], 1), 1)
    params = percent(m["params_after"] / max(m["params_before"], 1), 1)
    return f"{macs} of the MACs and {params} of the parameters remain"
