"""The options that several commands share: how each is written, and what `--help` says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fxprune.cli import specs, values

_CUT, _DATA, _TRAIN, _OUT = "What to cut", "Model and data", "Training", "Output"


def _data_names(incomplete: str) -> list[str]:
    from fxprune import data

    return [name for name in data.names() if name.startswith(incomplete)]


def _one_of(*choices: str) -> object:
    """A completion over a few words."""
    return lambda incomplete: [c for c in choices if c.startswith(incomplete)]


Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document to stdout.")]
Seed = Annotated[
    int,
    typer.Option(
        metavar="N", min=0, max=2**63 - 1, help="Seed of weights, batches and random choices."
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(metavar="N", min=1, help="CPU threads of torch.", show_default="as torch chooses"),
]
Out = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="Folder for the files; made when missing.",
        show_default="fxprune-out/MODEL-...",
        rich_help_panel=_OUT,
    ),
]
Resume = Annotated[
    bool | None,
    typer.Option(
        "--resume/--restart",
        help="When the folder holds the same run: go on with it, and show it again if it is "
        "finished; or remove it and begin anew.",
        show_default="go on; refuse a finished one",
        rich_help_panel=_OUT,
    ),
]
Latency = Annotated[
    bool,
    typer.Option(
        "--latency/--no-latency", help="Measure both networks in turns.", rich_help_panel=_OUT
    ),
]
LatencyBatch = Annotated[
    list[int] | None,
    typer.Option(
        metavar="N",
        min=1,
        help="A batch size to measure; repeatable.",
        show_default="1, and 64 (images above 64x64: 8)",
        rich_help_panel=_OUT,
    ),
]
Export = Annotated[
    list[str] | None,
    typer.Option(
        metavar="WORD",
        help="Also write net.onnx or net.pt2: onnx, pt2; repeatable.",
        autocompletion=_one_of("onnx", "pt2"),
        rich_help_panel=_OUT,
    ),
]

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="zoo:resnet56, torchvision:resnet50, timm:convnext_tiny, or path/to/file.py:factory.",
        autocompletion=specs.known,
        show_default=False,
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="An option of the model's factory, such as width=32; repeatable.",
        show_default=False,
        rich_help_panel=_DATA,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="Trained weights: .safetensors, or .pth / .pt that holds tensors only.",
        show_default="as the factory makes them",
        rich_help_panel=_DATA,
    ),
]
InputSize = Annotated[
    str | None,
    typer.Option(
        metavar="NxCxHxW",
        help="Size of an example input.",
        show_default="from the data, or guessed",
        rich_help_panel=_DATA,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="digits, cifar10, cifar100, fashion-mnist, tiny-imagenet[:PATH] or imagefolder:PATH.",
        autocompletion=_data_names,
        show_default="none: nothing is scored or trained",
        rich_help_panel=_DATA,
    ),
]
NeededData = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="NAME",
        help="digits, cifar10, cifar100, fashion-mnist, tiny-imagenet[:PATH] or imagefolder:PATH.",
        autocompletion=_data_names,
        show_default=False,
        rich_help_panel=_DATA,
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        metavar="PATH",
        help="Where data sets lie.",
        show_default="$FXPRUNE_DATA, or ~/.cache/fxprune",
        rich_help_panel=_DATA,
    ),
]
BatchSize = Annotated[
    int, typer.Option(metavar="N", min=1, rich_help_panel=_DATA, help="Images per batch.")
]
Workers = Annotated[
    int, typer.Option(metavar="N", min=0, rich_help_panel=_DATA, help="Processes that load data.")
]
Device = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one.",
        rich_help_panel=_DATA,
    ),
]

Method = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="What ranks the channels.",
        autocompletion=values.method_names,
        rich_help_panel=_CUT,
    ),
]
Preset = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="The ratios of a paper's network, such as ResNet-56-A.",
        autocompletion=values.preset_names,
        show_default=False,
        rich_help_panel=_CUT,
    ),
]
Ratio = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[NAMES=]SHARE",
        help="The share that goes: 0.3 of every group; 'layer1.*=0.1' of some, repeatable; or "
        "@FILE with a JSON object of them.",
        show_default=False,
        rich_help_panel=_CUT,
    ),
]
Budget = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[macs=|params=]SHARE",
        help="The share that may remain: macs=0.5, params=0.4; repeatable.",
        show_default="macs=0.5 without ratio and preset",
        rich_help_panel=_CUT,
    ),
]
Order = Annotated[
    str | None,
    typer.Option(
        metavar="WORD",
        help="Which go: smallest, largest or random.",
        autocompletion=_one_of("smallest", "largest", "random"),
        show_default="smallest",
        rich_help_panel=_CUT,
    ),
]
Norm = Annotated[
    str | None,
    typer.Option(
        metavar="WORD",
        help="Of a filter's weights: l1 or l2.",
        autocompletion=_one_of("l1", "l2"),
        show_default="l1",
        rich_help_panel=_CUT,
    ),
]
Scoring = Annotated[
    str | None,
    typer.Option(
        metavar="WORD",
        help="Whether inputs that are gone count: independent (they do) or greedy.",
        autocompletion=_one_of("independent", "greedy"),
        show_default="independent",
        rich_help_panel=_CUT,
    ),
]
By = Annotated[
    str | None,
    typer.Option(
        metavar="WORD",
        help="Rank by weights, or by feature maps: mean-mean, mean-std, mean-l1, mean-l2, var-l2.",
        autocompletion=_one_of("weights", "mean-mean", "mean-std", "mean-l1", "mean-l2", "var-l2"),
        show_default="weights",
        rich_help_panel=_CUT,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        help="Cut in so many steps, each followed by repair and training.",
        show_default="1",
        rich_help_panel=_CUT,
    ),
]
Scope = Annotated[
    list[str] | None,
    typer.Option(
        metavar="all|free|NAMES",
        help="What may be cut: all, free (nothing that an addition couples), kinds (heads, head-dims, mlp, "
        "embedding, stage, experts, channels), or patterns of names, "
        "repeatable.",
        show_default="all",
        rich_help_panel=_CUT,
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAMES",
        help="Layers whose outputs stay, such as 'layer1.*'; repeatable.",
        show_default=False,
        rich_help_panel=_CUT,
    ),
]
Align = Annotated[
    int,
    typer.Option(metavar="N", min=1, help="Kept widths are multiples of it.", rich_help_panel=_CUT),
]

Repair = Annotated[
    str | None,
    typer.Option(
        metavar="WORD",
        help="After a cut: none, or bn (measure the batch norms' statistics anew).",
        autocompletion=_one_of("none", "bn"),
        show_default="bn when there is data",
        rich_help_panel=_TRAIN,
    ),
]
Samples = Annotated[
    int, typer.Option(metavar="N", min=1, help="Images for the repair.", rich_help_panel=_TRAIN)
]
LearningRate = Annotated[
    float,
    typer.Option("--lr", metavar="X", help="The highest learning rate.", rich_help_panel=_TRAIN),
]
Schedule = Annotated[
    str,
    typer.Option(
        metavar="WORD",
        help="cosine, step or constant.",
        autocompletion=_one_of("cosine", "step", "constant"),
        rich_help_panel=_TRAIN,
    ),
]
Warmup = Annotated[
    float, typer.Option(metavar="X", help="Epochs of linear rise.", min=0, rich_help_panel=_TRAIN)
]
Momentum = Annotated[float, typer.Option(metavar="X", help="Of SGD.", rich_help_panel=_TRAIN)]
WeightDecay = Annotated[
    float, typer.Option(metavar="X", help="On every parameter.", rich_help_panel=_TRAIN)
]
LabelSmoothing = Annotated[
    float, typer.Option(metavar="X", help="Of the cross-entropy.", rich_help_panel=_TRAIN)
]
ClipNorm = Annotated[
    float | None,
    typer.Option(
        metavar="X",
        help="Largest 2-norm of the gradient.",
        show_default="none",
        rich_help_panel=_TRAIN,
    ),
]
Augment = Annotated[
    bool,
    typer.Option(
        "--augment/--no-augment",
        help="Shift and mirror training images, as is usual for the data set.",
        rich_help_panel=_TRAIN,
    ),
]
Amp = Annotated[
    str | None,
    typer.Option(
        metavar="WORD",
        help="Compute in bf16, or on CUDA in fp16.",
        autocompletion=_one_of("bf16", "fp16"),
        show_default="float32",
        rich_help_panel=_TRAIN,
    ),
]
ChannelsLast = Annotated[
    bool,
    typer.Option("--channels-last", help="Train in that memory format.", rich_help_panel=_TRAIN),
]
Epochs = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=0,
        help="Epochs of fine-tuning after a cut; 0: none.",
        show_default="3 when there is data",
        rich_help_panel=_TRAIN,
    ),
]
Fold = Annotated[
    bool,
    typer.Option(
        "--fold",
        help="Fold batch norms into convolutions at the end (inference form).",
        rich_help_panel=_OUT,
    ),
]
