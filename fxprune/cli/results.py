"""The end of a run: measure, write the files, show the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import fxprune
from fxprune.cli.console import step, tell, tell_files
from fxprune.cli.folder import Run
from fxprune.cli.values import choice_of
from fxprune.errors import OptionError
from fxprune.latency import compare, environment, remarks
from fxprune.report import Report, TimingRow
from fxprune.views.words import as_fast

if TYPE_CHECKING:
    from rich.console import Console

SECONDS = 20.0  # about how long a batch size is measured
_SMALL = 64 * 64  # pixels up to which an image is small
_EXPORTS = {"onnx": "net.onnx", "pt2": "net.pt2"}


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What is to come out of a run beside the network: timings, and exports by name."""

    latency: bool = True
    batches: Sequence[int] | None = None
    exports: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name in self.exports or ():
            choice_of(name, "--export", _EXPORTS)


def measure(
    console: Console,
    report: Report,
    original: nn.Module,
    pruned: Any,
    batches: Sequence[int] | None,
) -> None:
    """Time both networks in turns, into the report, with a note where time did not follow MACs."""
    (spec, *others) = pruned.origin.inputs
    if others:
        report.notes.append("latency is not measured: the network takes several inputs")
        return
    small = len(spec.shape) < 3 or spec.shape[-1] * spec.shape[-2] <= _SMALL
    first = next(pruned.parameters(), torch.zeros(()))
    example = spec.example().to(first.dtype)
    try:
        report.timings = compare(
            {"original": original, "pruned": pruned},
            example,
            batches=batches or (1, 64 if small else 8),
            seconds=SECONDS,
        )
    except (RuntimeError, MemoryError) as error:  # no memory for so many, or one size only
        why = (str(error).splitlines() or [type(error).__name__])[0]
        report.notes.append(f"latency is not measured: {why}; --latency-batch chooses other sizes")
        tell(console, report.notes[-1])
        return
    report.environment = environment(pruned)
    tell_timings(console, report.timings)
    m = report.metrics
    report.notes += remarks(report.timings, m["macs_before"], m["macs_after"])


def tell_timings(console: Console, rows: Sequence[TimingRow]) -> None:
    """A line per batch size."""
    for before, after in zip(rows[::2], rows[1::2], strict=True):
        tell(
            console,
            f"batch {before.batch}: {before.median_ms:.2f} ms -> {after.median_ms:.2f} ms, "
            + as_fast(before.median_ms / after.median_ms),
        )


def write(run: Run, pruned: Any, exports: Sequence[str] | None) -> None:
    """The network, its plan, its report, and what else it was asked for."""
    fxprune.save(pruned, run.folder / "net.safetensors")
    run.put("plan.json", pruned.plan.to_json(indent=2) + "\n")
    for name in exports or ():
        fxprune.export(pruned, run.folder / _EXPORTS[name])
    run.put("report.json", pruned.report.to_json() + "\n")
    pruned.report.to_html(run.folder / "report.html")
    run.finish()


def check_exports(run: Run, wanted: Wanted) -> None:
    """A finished run is shown as it is; OptionError for an export that it did not write."""
    for name in wanted.exports or ():
        if not (run.folder / _EXPORTS[name]).is_file():
            raise OptionError(
                f"the finished run in {run.folder} has no {_EXPORTS[name]}",
                where="--export",
                why="a finished run is only shown",
                fix=f'in Python, fxprune.export(fxprune.load(...), "{_EXPORTS[name]}"); or do all '
                "of it anew with --restart",
            )


def show(console: Console, run: Run) -> dict[str, Any]:
    """Print a finished run's report and files; the document that `--json` prints."""
    report = Report.from_json((run.folder / "report.json").read_text(encoding="utf-8"))
    console.print()
    console.print(report)
    console.print()
    tell_files(console, run.folder, run.files())
    return {
        "command": run.record["command"],
        "model": run.record["settings"]["model"],
        "out": str(run.folder),
        "resumed": run.resumed,
        "settings": run.record["settings"],
        "report": report.to_dict(),
        "files": {name: str(run.folder / name) for name in run.files()},
    }


class Steps:
    """Numbers the steps of a run as they are told."""

    def __init__(self, console: Console) -> None:
        self.console, self._number = console, 0

    def head(self, text: str) -> None:
        """The next step."""
        self._number += 1
        step(self.console, self._number, text)

    def tell(self, text: str) -> None:
        """A line below it."""
        tell(self.console, text)
