"""Published networks, cut again: the accuracy at every stage, beside what the paper printed.

    python bench/papers.py --weights resnet56=FILE                 cut, repair, train three epochs, score
    python bench/papers.py --weights resnet56=FILE --sensitivity   each layer alone, three orders

Runs the command line as a user would (`fxprune compile`, `fxprune analyze --sensitivity`) on CIFAR-10
in $FXPRUNE_DATA, in folders under --out, so that a run that was stopped goes on. The table's rows go
to results/papers.csv; the command with its settings and versions, and the scores of the scan, go to
results/papers/. Weights: trained on CIFAR-10, in the zoo's layout.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from table import ROOT, write
from where import here

RESULTS = ROOT / "bench" / "results"


@dataclass(frozen=True)
class Paper:
    """A row of a paper's table: the options that make it, and the top-1 accuracies printed there."""

    network: str
    options: tuple[str, ...]
    printed: dict[str, float] = field(default_factory=dict)


PAPERS = {
    "ResNet-56-A": Paper(
        "resnet56",
        ("--method", "l1", "--preset", "ResNet-56-A"),
        {"paper: before": 93.04, "paper: fine-tuned": 93.10},
    ),
    "ResNet-56-B": Paper(
        "resnet56",
        ("--method", "l1", "--preset", "ResNet-56-B"),
        {"paper: before": 93.04, "paper: fine-tuned": 93.06},
    ),
}


def run(words: Sequence[str]) -> dict[str, Any]:
    """One command, its progress on the terminal; the JSON document that it prints."""
    print(f"$ fxprune {shlex.join(words)}", flush=True)
    command = [sys.executable, "-m", "fxprune.cli", *words, "--resume", "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def kept(folder: Path, weights: Path) -> dict[str, Any]:
    """What the folder's run.json says of the run, without the paths of this machine."""
    record = json.loads((folder / "run.json").read_text())
    line = record["line"].removesuffix(" --resume --json")  # what `run` adds
    line = line.replace(str(weights), weights.name).replace(str(folder), folder.name)
    names = ("seed", "versions", "started", "seconds", "scores")
    return {"command": line, **{name: record[name] for name in names}}


def paper(name: str, weights: Path, out: Path, more: Sequence[str]) -> None:
    """Cut, repair, train, score; a row per stage."""
    case, folder = PAPERS[name], out / name.lower()
    words = ["compile", f"zoo:{case.network}", "--weights", str(weights), *case.options]
    run([*words, "--data", "cifar10", "--no-latency", "--out", str(folder), *more])
    report = json.loads((folder / "report.json").read_text())
    metrics = report["metrics"]
    figures = {
        "MACs left": 100 * metrics["macs_after"] / metrics["macs_before"],
        **{stage: 100 * score for stage, score in report["stages"].items()},
        **case.printed,
    }
    threads = json.loads((folder / "run.json").read_text())["settings"]["threads"]
    where = here(torch.device("cpu"), threads or torch.get_num_threads())
    common = {
        "bench": "accuracy",
        "case": name,
        "unit": "% (top-1 on the test images; MACs)",
        "rounds": "1",
        "shape": "3x32x32",
        "dtype": "float32",
    }
    rows = [
        {
            **common,
            "provider": provider,
            **dict.fromkeys(("p20", "p50", "p80"), f"{value:.2f}"),
            **where,
        }
        for provider, value in figures.items()
    ]
    write(RESULTS / "papers.csv", rows)
    keep(f"{name.lower()}.json", {**kept(folder, weights), "metrics": metrics})


def sensitivity(network: str, weights: Path, out: Path, samples: int, more: Sequence[str]) -> None:
    """Each layer alone, smallest, random and largest first: the scores, and the figure."""
    folder = out / f"{network}-sensitivity"
    words = ["analyze", f"zoo:{network}", "--weights", str(weights), "--data", "cifar10"]
    words += ["--sensitivity", "--order", "smallest,random,largest", "--samples", str(samples)]
    run([*words, "--out", str(folder), *more])
    scan = json.loads((folder / "sensitivity.json").read_text())
    keep(f"sensitivity-{network}.json", {**kept(folder, weights), "samples": samples, "scan": scan})
    from fxprune import Sensitivity

    found = Sensitivity.from_json(json.dumps(scan))
    found.to_figure(RESULTS / "papers" / f"sensitivity-{network}.svg")


def keep(name: str, record: dict[str, Any]) -> None:
    """Write one record of results/papers/."""
    folder = RESULTS / "papers"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(record, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the papers whose weights were given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", metavar="NETWORK=FILE", action="append", required=True)
    parser.add_argument("--only", nargs="+", choices=PAPERS, default=list(PAPERS))
    parser.add_argument("--sensitivity", action="store_true", help="scan the layers instead")
    parser.add_argument("--samples", type=int, default=1000, help="test images of the scan")
    parser.add_argument("--out", type=Path, default=ROOT / "fxprune-out")
    parser.add_argument("more", nargs="*", help="more options of the command, behind --")
    chosen = parser.parse_args(argv)
    weights = {n: Path(f) for n, _, f in (pair.partition("=") for pair in chosen.weights)}
    if chosen.sensitivity:
        for network, file in weights.items():
            sensitivity(network, file, chosen.out, chosen.samples, chosen.more)
        return
    for name in chosen.only:
        if PAPERS[name].network in weights:
            paper(name, weights[PAPERS[name].network], chosen.out, chosen.more)


if __name__ == "__main__":
    main()
