"""`fxprune report`: show again what a run found, from any of the files that it wrote.

In Python: `Report.from_json`, `Sensitivity.from_json`, `Plan.from_json`, `fxprune.load`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Protocol

import typer

from fxprune import storage
from fxprune.cli import options as o
from fxprune.cli.console import print_json, telling
from fxprune.errors import FxPruneError, OptionError
from fxprune.plan import Plan
from fxprune.report import GroupRow, Report
from fxprune.sensitivity import Sensitivity

EXAMPLES = """
[bold]Examples[/]

  fxprune report fxprune-out/resnet56-l1

  fxprune report net.safetensors --json

  fxprune report sensitivity.json --html curves.html
"""
_IN_A_FOLDER = ("report.json", "sensitivity.json", "net.safetensors", "plan.json")


class Shown(Protocol):
    """What can be printed, and written as a page and as JSON."""

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""

    def to_html(self, path: Path) -> None:
        """As a page."""


def report(
    file: Annotated[
        Path,
        typer.Argument(
            help="report.json, sensitivity.json, net.safetensors, plan.json, or the folder of a run."
        ),
    ],
    html: Annotated[Path | None, typer.Option(help="Also write the page.")] = None,
    as_json: o.AsJson = False,
    debug: o.Debug = False,
) -> None:
    """Show a report, a scan of sensitivity, or what a saved network's plan cuts."""
    del debug
    found = found_in(file)
    with telling(as_json) as console:
        if html is not None:
            _write_page(found, html)
        console.print(found)
        if html is not None:
            console.print(f"\nwritten: {html}", markup=False, soft_wrap=True)
    if as_json:
        print_json({"command": "report", "file": str(file), "report": found.to_dict()})


def _write_page(found: Shown, html: Path) -> None:
    """The page in its file; FxPruneError names that, not what it is called while it is written."""
    try:
        found.to_html(html)
    except OSError as error:
        raise FxPruneError(
            f"the page cannot be written: {error.strerror or error}",
            where=str(html),
            fix="name a file in a folder that exists",
        ) from error


def found_in(file: Path) -> Shown:
    """What a file holds; OptionError when there is none, FxPruneError when it is something else."""
    if file.is_dir():
        there = [file / name for name in _IN_A_FOLDER if (file / name).is_file()]
        if not there:
            raise OptionError(
                f"the folder {file} holds no report",
                where="FILE",
                why=f"looked for {', '.join(_IN_A_FOLDER)}",
                fix="a run that was stopped has none: give its command again to go on",
            )
        return found_in(there[0])
    if not file.is_file():
        raise OptionError(f"there is no file `{file}`", where="FILE")
    if file.suffix == ".safetensors":
        return _of_plan(file, plan_in(file), "the file's SHA-256 fits its tensors and its plan")
    text = file.read_bytes()
    kind = _kind(text)
    if kind == "plan":
        return _of_plan(file, Plan.from_json(text), "")
    if kind == "sensitivity":
        return Sensitivity.from_json(text)
    if kind == "report":
        return Report.from_json(text)
    raise FxPruneError(
        "this is no file of fxprune's",
        where=str(file),
        fix=f"pass one of {', '.join(_IN_A_FOLDER)}, or the folder of a run",
    )


def plan_in(file: Path) -> Plan:
    """The plan of a saved network or of a plan.json."""
    if file.suffix == ".safetensors":
        return storage.read(file)[0]
    try:
        return Plan.from_json(file.read_bytes())
    except FxPruneError as error:
        error.where = error.where or str(file)
        raise


def _kind(text: bytes) -> str:
    """What a JSON document is, by its keys."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    keys = set(data) if isinstance(data, dict) else set()
    for kind, needed in (
        ("plan", {"slices", "fingerprint"}),
        ("sensitivity", {"curves", "baseline"}),
        ("report", {"metrics", "groups"}),
    ):
        if needed <= keys:
            return kind
    return ""


def _of_plan(file: Path, plan: Plan, verified: str) -> Report:
    """A plan as a report: a row per layer that makes channels, without the norms that follow it."""
    notes = ["this shows the plan alone: report.json holds what was measured"]
    if plan.weights == "changed":
        notes.append("the weights were trained or repaired since the cut")
    named = {s.tensor for s in plan.slices}
    rows = []
    for s in plan.slices:
        layer, _, kind = s.tensor.rpartition(".")
        if s.role == "out" and kind == "weight" and f"{layer}.running_mean" not in named:
            rows.append(GroupRow(layer, s.size, len(s.keep), ()))
    return Report(
        model=file.name,
        method=str(plan.method["name"]),
        options=dict(plan.method),
        front_end="torch.fx",
        asked=None if plan.budget is None else dict(plan.budget),
        metrics=dict(plan.metrics),
        groups=rows,
        frozen=list(plan.frozen),
        folds=len(plan.folds),
        verified=verified,
        notes=notes,
    )
