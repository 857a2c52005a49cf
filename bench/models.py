"""What can be pruned: every network of torchvision and 143 of timm, cut to half of their MACs.

    python bench/models.py                              all; hours. What has its row is not run again
    python bench/models.py --library timm               one library
    python bench/models.py --only vit_b_16 resnet50     these; their rows are made anew
    python bench/models.py --only vit_b_16 --ratio 0.3  with L1(ratio=0.3) in place of budget=0.5
    python bench/models.py --table                      rows -> docs/models.md

Each network runs in a process of its own, with limits on time and memory, with random weights whose
elements differ everywhere (`subjects.py`). Transformers and ConvNeXts are also cut with L1 at four
ratios. A row is "ok" if all of this holds:

* `compile(..., verify=True)` returns, and the cut is felt at the output (relative change > 1e-6);
* at batch 2, float64, other numbers: within 1e-9 of the original masked by `tests/oracle.py`, with
  statistics of layer, RMS and group norms over kept channels. Where a network has statistics over
  channels that are no such call, `fxprune.mask` is the reference and `reference` says so;
* backward in train mode gives every parameter a finite gradient; `torch.export` takes the result
  and its program computes the same; a detector runs with the pruned backbone in its place.

Else it is "refused" (an FxPruneError but VerifyError), "wrong" (the law is violated, or nothing was
cut), "incomplete" (a later step fails), "crash" (any other exception) or "no result" (a limit).
"""

from __future__ import annotations

import argparse
import copy
import csv
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from subjects import (
    LIBRARIES,
    KeptNorms,
    Subject,
    build,
    forked,
    names,
    said,
    total,
    twice,
    version,
    without_paths,
)
from table import ROOT, Row
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from where import here

import fxprune

sys.path.append(str(ROOT / "tests"))
from oracle import masked, relative_error

RESULTS = ROOT / "bench" / "results" / "models.csv"
DOCUMENT = ROOT / "docs" / "models.md"
COLUMNS = (
    "library", "model", "asked", "status", "shape", "front_end", "groups", "layers", "cut_layers",
    "rows", "frozen_rows", "reasons", "macs_before", "macs_after", "inexact", "inexact_reasons",
    "verified", "checked", "reference", "change", "error", "seconds",
    "version", "threads", "device", "torch", "commit", "date",
)  # fmt: skip
RATIOS = ("0.3", "0.6", "0.75", "0.9")
AT_RATIOS = re.compile(r"(vit_|swin|maxvit|mvit|convnext)")  # of torchvision
BOUND = 1e-9
# Their statistics over channels are no call that KeptNorms sees.
OWN_STATISTICS = ("GlobalResponseNorm", "SimpleNorm", "SimpleNorm2d", "ChannelAttention")
SEPARATOR = " | "
OUTPUT = "outputs of the model keep their channels"  # why those are no news
RIVAL = {"torchvision": (101, 121), "timm": (73, 143)}  # Torch-Pruning 1.6.1: runs after a prune


# --- one network ----------------------------------------------------------------------------------


def measure(library: str, name: str, asked: str) -> Row:
    """Build, cut, check; every column of its row but those of the machine."""
    row = dict.fromkeys(COLUMNS, "") | {"library": library, "model": name, "asked": asked}
    subject = build(library, name)
    row["shape"] = subject.shape
    kind, _, value = asked.partition("=")
    if kind == "macs":
        options: dict[str, Any] = {"budget": float(value)}
    else:
        options = {"method": fxprune.methods.L1(ratio=float(value))}
    begin = time.perf_counter()
    try:
        pruned = fxprune.compile(subject.pruned_part, subject.inputs, progress=False, **options)
        row["seconds"] = f"{time.perf_counter() - begin:.2f}"
        row |= facts(subject, pruned)
        row |= law(subject, pruned)
    except fxprune.VerifyError as error:
        return row | {"status": "wrong", "error": said(error)}
    except fxprune.FxPruneError as error:
        return row | {"status": "refused", "error": said(error)}
    except Exception as error:
        return row | {"status": "crash", "error": said(error)}
    if not float(row["checked"]) <= (1e-4 if row["reference"].endswith(SINGLE) else BOUND):
        return row | {"status": "wrong", "error": "differs from the masked original at batch 2"}
    if not float(row["change"]) > 1e-6:
        return row | {"status": "wrong", "error": "the cut is not felt at the output"}
    for step in (put_back, exports, trains) if kind == "macs" else (put_back,):
        try:
            step(subject, pruned)
        except Exception as error:
            return row | {"status": "incomplete", "error": f"{step.__name__}: {said(error)}"}
    return row | {"status": "ok"}


def facts(subject: Subject, pruned: fxprune.PrunedModule) -> Row:
    """What was cut, and what was not and why."""
    plan, part = pruned.plan, subject.pruned_part
    layers, cut = layers_cut(part, plan, pruned)
    rows, frozen = frozen_rows(fxprune.analyze(part, subject.inputs))
    verified = re.search(r"difference (\S+) in", pruned.report.verified)
    stays = [note for note in plan.frozen if not note.why.startswith(OUTPUT)]
    return {
        "front_end": pruned.report.front_end,
        "groups": str(len(pruned.report.groups)),
        "layers": str(layers),
        "cut_layers": str(cut),
        "rows": str(rows),
        "frozen_rows": str(frozen),
        "reasons": reasons(stays),
        "macs_before": str(plan.metrics["macs_before"]),
        "macs_after": str(plan.metrics["macs_after"]),
        "inexact": str(len(plan.inexact)),
        "inexact_reasons": reasons(plan.inexact),
        "verified": verified[1] if verified else "",
    }


def layers_cut(
    part: nn.Module, plan: fxprune.Plan, pruned: fxprune.PrunedModule
) -> tuple[int, int]:
    """Convolutions and linears that eval mode uses, and how many of them the plan cuts.

    The input projections of an nn.MultiheadAttention count as one linear, its output as another.
    """
    tensors = dict(part.named_parameters(remove_duplicate=False))
    left = pruned.state_dict().keys()
    used = {id(t) for name, t in tensors.items() if name in left}
    touched = {id(tensors[s.tensor]) for s in plan.slices if s.tensor in tensors}
    layers = []
    for module in part.modules():
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear):
            layers.append({id(p) for p in module.parameters()})
        elif isinstance(module, nn.MultiheadAttention):
            layers.append({id(p) for p in module.parameters(recurse=False)})
    layers = [layer for layer in layers if layer & used]
    return len(layers), sum(bool(layer & touched) for layer in layers)


def frozen_rows(analysis: fxprune.Analysis) -> tuple[int, int]:
    """Rows of the producers, and those that stay for another reason than being an output."""
    stays = {0}
    for freeze in analysis.flow.ledger.frozen:
        if freeze.node.op != "output":
            stays |= set(analysis.class_of[freeze.ids.numpy()].ravel().tolist())
    rows = [analysis.classes(s.ids) for s in analysis.slots if s.producer]
    return sum(r.size for r in rows), sum(int(c) in stays for r in rows for c in r.ravel())


def reasons(notes: Iterable[Any], most: int = 3) -> str:
    """The first few different reasons, each with how many nodes share it."""
    count = Counter(without_paths(note.why) for note in notes)
    more = [f"{len(count) - most} more"] if len(count) > most else []
    return SEPARATOR.join([f"{why} ({n})" for why, n in [*count.items()][:most]] + more)


def law(subject: Subject, pruned: fxprune.PrunedModule) -> Row:
    """The pruned part against the masked original: batch 2, float64, by another oracle.

    In float32 where the original does not run in float64 (it makes float32 tensors itself).
    """
    part = subject.pruned_part
    own = any(type(m).__name__ in OWN_STATISTICS for m in part.modules())
    with torch.no_grad():
        change = gap(part(*subject.inputs), pruned(*subject.inputs))
        try:
            dtype = torch.float64
            copy.deepcopy(part).to(dtype)(*twice(subject.inputs))
        except RuntimeError:
            dtype = torch.float32
        inputs = tuple(x.to(dtype) for x in twice(subject.inputs))
        mine = copy.deepcopy(pruned).to(dtype)(*inputs)
        if own:
            reference = fxprune.mask(part, pruned.plan).to(dtype)(*inputs)
        else:
            reference = reference_of(part, pruned.plan, inputs)
    return {
        "checked": f"{gap(reference, mine):.1e}",
        "reference": ("fxprune.mask" if own else "oracle")
        + (SINGLE if dtype == torch.float32 else ""),
        "change": f"{change:.1e}",
    }


SINGLE = ", float32"


def reference_of(part: nn.Module, plan: fxprune.Plan, inputs: tuple[Tensor, ...]) -> Any:
    """What the masked original gives in float64, statistics of norms over the kept channels."""
    model = masked(part, plan.to_dict()).to(inputs[0].dtype)
    tensors = dict(model.named_parameters(remove_duplicate=False))
    kept = {
        id(tensors[s.tensor]): torch.tensor(s.keep)
        for s in plan.slices
        if s.role == "out" and s.dim == 0 and s.tensor in tensors and tensors[s.tensor].dim() == 1
    }
    with KeptNorms(kept):
        return model(*inputs)


def gap(a: Any, b: Any) -> float:
    """The relative error, whichever kind of dict the outputs come in."""
    return relative_error(*(dict(out) if isinstance(out, dict) else out for out in (a, b)))


def put_back(subject: Subject, pruned: fxprune.PrunedModule) -> None:
    """A detector runs on two images with the pruned backbone; others need nothing."""
    if not subject.part:
        return
    detector = fxprune.splice(subject.model, subject.part, pruned)
    with torch.no_grad():
        found = detector.eval()([torch.rand(3, 96, 128), torch.rand(3, 128, 112)])
    assert [set(f) >= {"boxes", "scores", "labels"} for f in found] == [True, True]


def exports(subject: Subject, pruned: fxprune.PrunedModule) -> None:
    """`torch.export` takes it, and the program computes what it computes."""
    with torch.no_grad():
        program = torch.export.export(pruned.eval(), subject.inputs).module()
        wrong = gap(*(pytree.tree_leaves(f(*subject.inputs)) for f in (pruned, program)))
    assert wrong <= 1e-4, f"the exported program differs by {wrong:.1e}"


def trains(subject: Subject, pruned: fxprune.PrunedModule) -> None:
    """Backward in train mode: every parameter gets a finite gradient."""
    pruned.train()
    total(pruned(*(x.float() for x in twice(subject.inputs)))).backward()
    bad = [k for k, p in pruned.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not bad, f"no finite gradient: {', '.join(bad[:4])}"


# --- all of them ----------------------------------------------------------------------------------


def jobs(library: str) -> list[tuple[str, str, str]]:
    """(library, model, what is asked) of the whole table."""
    found = []
    for name in names(library):
        found.append((library, name, "macs=0.5"))
    if library == "torchvision":
        ratios = [name for name in names(library) if AT_RATIOS.match(name)]
        found += [(library, name, f"ratio={ratio}") for name in ratios for ratio in RATIOS]
    return found


def apart(job: tuple[str, str, str], limit: float, gigabytes: float) -> Row:
    """The row of one job, measured in a process of its own."""
    row = dict.fromkeys(COLUMNS, "") | dict(zip(COLUMNS, job, strict=False))
    made, failure = forked(lambda: measure(*job), limit, gigabytes)
    return row | (made or {"status": "no result", "error": without_paths(failure)})


def read(path: Path) -> list[Row]:
    """The last row of each job, in the order of libraries and names."""
    if not path.exists():
        return []
    with path.open(newline="") as stream:
        reader = csv.DictReader(stream)
        rows = {identity(row): row for row in reader}
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise ValueError(f"{path.name}: the columns are {reader.fieldnames}, not {list(COLUMNS)}")
    return [rows[key] for key in sorted(rows)]


def identity(row: Row) -> tuple[str, ...]:
    """What the rows of one job agree in."""
    return row["library"], row["model"], row["asked"]


def append(path: Path, row: Row) -> None:
    """Add one row in one write, so that two sweeps may share the file."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(",".join(COLUMNS) + "\n")
    with path.open("a", newline="") as stream:
        csv.DictWriter(stream, COLUMNS, lineterminator="\n").writerow(row)


# --- the document ---------------------------------------------------------------------------------

INTRO = """\
# What can be pruned

Every network that torchvision lists and {timm} of timm, each with random weights and without a
change to its code: `fxprune.compile(model, x, budget=0.5)`, detectors by
`fxprune.compile(model.backbone, x)` and `fxprune.splice`. Made by `bench/models.py`, whose first
lines say what a network must do to count as pruned: the law in float64 by two oracles, another batch
size, gradients, `torch.export`.
"""
LEGEND = """\
*groups*: sets of channels among which a choice is made. *layers cut*: convolutions and linears of
which rows or columns went. *frozen channels*: rows of layers that have to stay, but for the outputs.
*error*: the larger of the two relative errors against the masked original. *seconds*: compile with
its proof, one thread."""


def document(rows: Sequence[Row]) -> str:
    """docs/models.md, whole."""
    wanted = {library: names(library) for library in LIBRARIES}
    parts = [INTRO.format(timm=len(wanted["timm"])), summary(rows, wanted), LEGEND]
    for library in LIBRARIES:
        own = [row for row in rows if row["library"] == library]
        if not own:
            continue
        half = [row for row in own if row["asked"] == "macs=0.5"]
        parts += [f"## {library} {', '.join(unique(own, 'version'))}", budget_table(half)]
        if at_ratios := [row for row in own if row["asked"] != "macs=0.5"]:
            parts += [f"### {library}, `L1(ratio=...)`", RATIO_LEGEND, ratio_table(at_ratios)]
    parts += [why_table(rows, "reasons", "Why channels stay")]
    parts += [why_table(rows, "inexact_reasons", "What is not exact")]
    parts += [failures(rows), caption(rows)]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


RATIO_LEGEND = "MACs left, and the error against the masked original."


def summary(rows: Sequence[Row], wanted: dict[str, list[str]]) -> str:
    """How many of each library pass, and how many of their layers are cut; the rival beside it."""
    lines = []
    for library, models in wanted.items():
        half = [r for r in rows if r["library"] == library and r["asked"] == "macs=0.5"]
        passed = [r for r in half if r["status"] == "ok"]
        most = sum(share(r) >= 0.6 for r in passed)
        states = Counter(r["status"] for r in half if r["status"] != "ok")
        others = ", ".join(f"{n} {status}" for status, n in states.items()) or "-"
        runs, of = RIVAL[library]
        lines.append([
            library, f"**{len(passed)}** of {len(models)}", str(len(models) - len(half)), str(most),
            others, f"{runs} of {of}",
        ])  # fmt: skip
    head = ["library", "pruned and proved", "not measured", "of them 60 % of the layers cut", "others", "Torch-Pruning 1.6.1: a forward pass runs"]  # fmt: skip
    return markdown(head, lines, left=1)


def budget_table(rows: Sequence[Row]) -> str:
    """A line per network that was pruned."""
    lines = []
    for row in rows:
        if not row["macs_after"]:
            continue
        worst = max(float(row["verified"] or 0), float(row["checked"] or 0))
        mark = "" if row["status"] == "ok" else f" ({row['status']})"
        lines.append([
            row["model"] + mark, row["shape"], row["front_end"], row["groups"],
            f"{row['cut_layers']}/{row['layers']}", f"{row['frozen_rows']}/{row['rows']}",
            f"{millions(row['macs_before'])} → {millions(row['macs_after'])} ({remains(row)})",
            row["inexact"], f"{worst:.0e}", row["seconds"],
        ])  # fmt: skip
    head = ["model", "input", "front end", "groups", "layers cut", "frozen channels", "MACs (millions)", "inexact", "error", "seconds"]  # fmt: skip
    return markdown(head, lines, left=3)


def ratio_table(rows: Sequence[Row]) -> str:
    """A line per network, a column per ratio."""
    asked = sorted(dict.fromkeys(row["asked"] for row in rows))
    by = {(row["model"], row["asked"]): row for row in rows}
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = []
        for one in asked:
            row = by.get((model, one))
            if row is None:
                cells.append("-")
            elif row["status"] != "ok":
                cells.append(row["status"])
            else:
                cells.append(f"{remains(row)}, {max(float(row['verified'] or 0), float(row['checked'])):.0e}")  # fmt: skip
        lines.append([model, *cells])
    return markdown(["model", *(one.partition("=")[2] for one in asked)], lines, left=1)


def why_table(rows: Sequence[Row], column: str, title: str) -> str:
    """Every reason without its place: how many networks have it, and the first of them."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["asked"] != "macs=0.5":
            continue
        for text in row[column].split(SEPARATOR) if row[column] else []:
            why = re.sub(r" \(\S*:\d+\)", "", re.sub(r" \(\d+\)$", "", text))
            if not re.fullmatch(r"\d+ more", why) and row["model"] not in found.get(why, []):
                found.setdefault(why, []).append(row["model"])
    if not found:
        return ""
    ordered = sorted(found.items(), key=lambda pair: -len(pair[1]))
    lines = [[cell(why), str(len(models)), models[0]] for why, models in ordered]
    return f"## {title}\n\n" + markdown(["reason", "networks", "such as"], lines, left=1)


def failures(rows: Sequence[Row]) -> str:
    """What did not pass, and what was said."""
    lines = [
        [row["library"], row["model"], row["asked"], row["status"], cell(row["error"])]
        for row in rows
        if row["status"] != "ok"
    ]
    if not lines:
        return ""
    head = ["library", "model", "asked", "outcome", "error"]
    return "## What did not pass\n\n" + markdown(head, lines, left=5)


def caption(rows: Sequence[Row]) -> str:
    """Where the rows were made."""
    every = {c: ", ".join(unique(rows, c)) for c in ("device", "threads", "torch", "commit", "date")}  # fmt: skip
    return (
        f"{every['device']}, {every['threads']} thread(s), float32 with proofs in float64, "
        f"torch {every['torch']}; commit {every['commit']}, {every['date']}"
    )


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]], left: int) -> str:
    """A table whose first columns, so many, stand to the left."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *lines])


def cell(text: str) -> str:
    """A text that ends no cell."""
    return text.replace("|", "\\|")


def unique(rows: Iterable[Row], column: str) -> list[str]:
    """The different values, in order."""
    return [value for value in dict.fromkeys(row[column] for row in rows) if value]


def share(row: Row) -> float:
    """Of the layers, those that are cut."""
    return int(row["cut_layers"]) / max(int(row["layers"]), 1)


def remains(row: Row) -> str:
    """MACs after of MACs before."""
    return f"{int(row['macs_after']) / max(int(row['macs_before']), 1):.0%}"


def millions(count: str) -> str:
    return f"{int(count) / 1e6:,.0f}"


# --- command line ---------------------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Measure what is asked for, or write the document; exit 1 if a measured row is not "ok"."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", choices=LIBRARIES)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="made anew")
    parser.add_argument("--ratio", nargs="+", default=[], help="L1 at these instead of budget=0.5")
    parser.add_argument("--table", action="store_true", help="write docs/models.md and stop")
    parser.add_argument("--limit", type=float, default=900, help="seconds for one network")
    parser.add_argument("--memory", type=float, default=16, help="GiB for one network")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if options.table:
        DOCUMENT.parent.mkdir(exist_ok=True)
        DOCUMENT.write_text(document(read(options.out)))
        return 0
    wanted = [job for library in LIBRARIES if options.library in (None, library) for job in jobs(library)]  # fmt: skip
    if options.only:
        wanted = chosen(wanted, options.only, options.ratio, parser.error)
    else:
        done = {identity(row) for row in read(options.out)}
        wanted = [job for job in wanted if job not in done]
    failed = 0
    for job in wanted:
        row = apart(job, options.limit, options.memory)
        row |= here(torch.device("cpu"), 1) | {"version": version(job[0])}
        append(options.out, row)
        failed += row["status"] != "ok"
        words = [*job, row["status"], f"{row['cut_layers']}/{row['layers']}", row["seconds"], row["error"]]  # fmt: skip
        print("  ".join(words)[:240], flush=True)
    return int(failed > 0)


def chosen(
    known: Sequence[tuple[str, str, str]],
    only: Sequence[str],
    ratios: Sequence[str],
    refuse: Callable[[str], Any],
) -> list[tuple[str, str, str]]:
    """The jobs of some names, which may say their library ("timm:resnet18")."""
    found = []
    for word in only:
        hits = {j[:2] for j in known if word in (j[1], f"{j[0]}:{j[1]}")}
        if not hits:
            refuse(f"no network is called {word}")
        asked = [f"ratio={ratio}" for ratio in ratios] or ["macs=0.5"]
        found += [(*hit, one) for hit in sorted(hits) for one in asked]
    return found


if __name__ == "__main__":
    sys.exit(main())
