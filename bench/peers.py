"""Who is exact: the same networks cut by Torch-Pruning and by fxprune, both against a masked original.

    python bench/peers.py                              all
    python bench/peers.py --only resnet50 timm:vit_tiny_patch16_224  these; their rows are made anew

Scores (the L1 norm of the filters that make a group's channels, summed over the group) and ratio
are the same. The judge knows neither tool's book-keeping: in float64, with all elements of each
parameter different, what is left of a parameter is found in the original *by value*. Reference: the
original with every other element set to zero, and statistics of layer, RMS and group norms over the
channels that are left; two samples, max|a - b| / max|a|. A parameter in another order, a shifted head,
another softmax temperature are differences; fewer channels are not.

Each network runs in eval mode with random weights, in a process of its own for each tool. The
rival is used as its examples do: the last linear ignored, heads of a joint projection named by
`num_heads` (with nn.MultiheadAttention a width that its heads divide), and the sizes that an attention or a
vision transformer keeps in attributes set anew after the cut. Seconds: graph, scores and cut; fxprune's
include its proof and its copy.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torchvision
from subjects import KeptNorms, Subject, alone, build, said, twice, without_paths
from table import PEERS, ROOT, Row
from torch import Tensor, nn
from where import here

import fxprune

sys.path.append(str(ROOT / "tests"))
from oracle import flops, relative_error

try:
    import torch_pruning
except ImportError:
    sys.exit('the rival is missing: `make bench`, or pip install -e ".[bench]"')

RESULTS = ROOT / "bench" / "results" / "peers.csv"
RIVAL, OURS = f"torch-pruning {version('torch-pruning')}", "fxprune"
CASES = (
    ("torchvision", "resnet50", 0.5),
    ("torchvision", "densenet121", 0.5),
    ("torchvision", "mobilenet_v2", 0.5),
    ("torchvision", "efficientnet_b0", 0.5),
    ("torchvision", "regnet_y_400mf", 0.5),
    ("torchvision", "googlenet", 0.5),
    ("torchvision", "vgg16_bn", 0.5),
    ("torchvision", "convnext_tiny", 0.6),
    ("torchvision", "vit_b_16", 0.5),
    ("torchvision", "swin_t", 0.5),
    ("timm", "vit_tiny_patch16_224", 0.75),
    ("timm", "mobilevit_xs", 0.5),
)


# --- the two tools --------------------------------------------------------------------------------


def by_fxprune(model: nn.Module, inputs: tuple[Tensor, ...], ratio: float) -> nn.Module:
    method = fxprune.methods.L1(ratio=ratio)
    return fxprune.compile(model, inputs, method=method, progress=False)


def magnitude(group: Any) -> Tensor | None:
    """What the rival calls with a group: sums of its filters' L1 norms, float64 [its channels].

    Only of filters that make channels: its own class also counts those that read them.
    """
    function = torch_pruning.pruner.function
    makes = (function.prune_conv_out_channels, function.prune_linear_out_channels)
    made = [i for i in group.items if i.dep.pruning_fn in makes and None not in i.root_idxs]
    if not made:
        return None
    scores = torch.zeros(len(group[0].idxs), dtype=torch.float64)
    for item in made:
        layer = item.dep.layer
        filters = layer.weight.detach()
        filters = filters.transpose(0, 1) if getattr(layer, "transposed", False) else filters
        own = filters.flatten(1).abs().sum(1)[item.idxs]
        scores.index_add_(0, torch.tensor(item.root_idxs), own)
    return scores


def by_rival(model: nn.Module, inputs: tuple[Tensor, ...], ratio: float) -> nn.Module:
    model = copy.deepcopy(model)
    attentions = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    heads = {
        m.qkv: m.num_heads
        for m in model.modules()
        if isinstance(getattr(m, "qkv", None), nn.Linear)
    }
    pruner = torch_pruning.pruner.MagnitudePruner(
        model,
        inputs,
        magnitude,
        pruning_ratio=ratio,
        num_heads=heads,
        round_to=attentions[0].num_heads if attentions else None,
        ignored_layers=[[m for m in model.modules() if isinstance(m, nn.Linear)][-1]],
    )
    pruner.step()
    if isinstance(model, torchvision.models.VisionTransformer):
        model.hidden_dim = model.conv_proj.out_channels
    for module in model.modules():
        if isinstance(getattr(module, "qkv", None), nn.Linear) and hasattr(module, "head_dim"):
            module.num_heads = pruner.num_heads[module.qkv]
            module.head_dim = module.qkv.out_features // (3 * module.num_heads)
            if hasattr(module, "attn_dim"):
                module.attn_dim = module.num_heads * module.head_dim
    return model


TOOLS = {RIVAL: by_rival, OURS: by_fxprune}


# --- the judge ------------------------------------------------------------------------------------


@torch.no_grad()
def in_float64(subject: Subject) -> nn.Module:
    """The network in float64, elements of each parameter different from each other."""
    random = torch.Generator().manual_seed(3)
    model = subject.model.double()
    for p in model.parameters():
        scale = 1e-6 * (float(p.abs().max()) or 1.0)
        p.add_(scale * torch.randn(p.shape, generator=random, dtype=p.dtype))
    return model


def survivors(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which elements of each original parameter are left, bool of its shape, found by their values.

    Raises ValueError where a parameter has equal elements, or a value that the original has not.
    """
    found = {}
    for name, new in after.items():
        if name not in before:
            raise ValueError(f"`{name}` is no parameter of the original")
        values, places = before[name].detach().flatten().sort()
        if bool((values[1:] == values[:-1]).any()):
            raise ValueError(f"`{name}` has equal elements")
        at = torch.searchsorted(values, new.detach().flatten()).clamp(max=len(values) - 1)
        left = torch.zeros(len(values), dtype=torch.bool)
        left[places[at]] = True
        if not torch.equal(values[at], new.detach().flatten()) or left.sum() != new.numel():
            raise ValueError(f"`{name}` holds values that are not in the original, or one twice")
        found[name] = left.view(before[name].shape)
    return found


@torch.no_grad()
def reference(model: nn.Module, left: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> Any:
    """What the original gives with every other element zero, and norms over what is left."""
    model = copy.deepcopy(model)
    kept = {}
    for name, p in model.named_parameters():
        if name in left:
            p.mul_(left[name])
            if p.dim() == 1 and not bool(left[name].all()):
                kept[id(p)] = left[name].nonzero().flatten()
    with KeptNorms(kept):
        return model(*inputs)


def measure(library: str, name: str, ratio: float, tool: str) -> Row:
    """Cut one network with one tool, and judge."""
    subject = build(library, name)
    model, inputs = in_float64(subject), tuple(x.double() for x in subject.inputs)
    row = dict.fromkeys(PEERS, "") | {
        "library": library, "model": name, "ratio": str(ratio), "provider": tool,
        "shape": subject.shape, "macs_before": f"{flops(model, inputs[0]):.0f}",
    }  # fmt: skip
    try:
        begin = time.perf_counter()
        pruned = TOOLS[tool](model, inputs, ratio)
        row["seconds"] = f"{time.perf_counter() - begin:.2f}"
        row["macs_after"] = f"{flops(pruned, inputs[0]):.0f}"
        left = survivors(dict(model.named_parameters()), dict(pruned.named_parameters()))
        others = twice(subject.inputs)
        with torch.no_grad():
            wrong = relative_error(reference(model, left, others), pruned.eval()(*others))
        return row | {"error": f"{wrong:.1e}"}
    except Exception as error:
        return row | {"failure": said(error)}


# --- command line ---------------------------------------------------------------------------------


def write(path: Path, row: Row) -> None:
    """Put a row in place of the one of the same case and tool, or behind the others."""
    rows = {}
    if path.exists():
        with path.open(newline="") as stream:
            rows = {identity(r): r for r in csv.DictReader(stream)}
    rows[identity(row)] = row
    order = [(library, name, str(ratio)) for library, name, ratio in CASES]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, PEERS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows.values(), key=lambda r: order.index(identity(r)[:3])))


def identity(row: Row) -> tuple[str, ...]:
    """What the rows of one case and tool agree in."""
    return row["library"], row["model"], row["ratio"], row["provider"]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write rows; exit 1 where fxprune is not exact."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = [word for library, name, _ in CASES for word in (name, f"{library}:{name}")]
    parser.add_argument("--only", nargs="+", choices=known, default=[])
    parser.add_argument(
        "--limit", type=float, default=180, help="seconds for one cut and its check"
    )
    parser.add_argument("--memory", type=float, default=8, help="GiB for one cut and its check")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.one:
        library, name, ratio, tool = options.one
        print(json.dumps(measure(library, name, float(ratio), tool)))
        return 0
    exact = True
    for library, name, ratio in CASES:
        if options.only and not {name, f"{library}:{name}"} & set(options.only):
            continue
        for tool in TOOLS:
            case = (library, name, str(ratio), tool)
            made, failure = alone([__file__, "--one", *case], options.limit, options.memory)
            row = dict.fromkeys(PEERS, "") | dict(zip(PEERS, case, strict=False))
            row |= made or {"failure": without_paths(failure)}
            row |= here(torch.device("cpu"), 1)
            write(options.out, row)
            if tool == OURS:
                exact &= bool(row["error"]) and float(row["error"]) <= 1e-9
            print(f"{library}:{name} {ratio} {tool}: {row['error'] or row['failure'][:120]}, {row['seconds']} s", flush=True)  # fmt: skip
    return 0 if exact else 1


if __name__ == "__main__":
    sys.exit(main())
