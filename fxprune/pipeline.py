"""Cut, fold, prove, report: the steps that every way into the compiler shares."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from rich.console import Console

from fxprune.errors import UnsupportedOpError
from fxprune.groups import Analysis, Array, lineage_of
from fxprune.layers import after_folding, layer_rows, since_original
from fxprune.mask import mask
from fxprune.passes.fold_batchnorm import fold_batchnorm
from fxprune.passes.slice_channels import slice_channels
from fxprune.pause import collector_paused
from fxprune.plan import Fold, Plan
from fxprune.planning import compose
from fxprune.pruned import (
    Origin,
    PrunedModule,
    build,
    carry_attributes,
    input_specs,
    plan_now,
    stamp_of,
)
from fxprune.report import GroupRow, Report
from fxprune.verify import BOUND_32, verify


@dataclass
class Progress:
    """Names the step at work on a terminal, and keeps the seconds each took."""

    shown: bool
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a step; show it while it runs, if anybody watches."""
        start = time.perf_counter()
        if self.shown and sys.stderr.isatty():
            with Console(stderr=True).status(f"fxprune: {name} ..."):
                yield
        else:
            yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


@collector_paused
def cut(
    analysis: Analysis,
    plan: Plan,
    keep: Array,
    progress: Progress,
    *,
    check: bool,
    notes: list[str],
) -> PrunedModule:
    """Apply a plan made on `analysis`: the pruned network with plan, report and origin."""
    traced = analysis.traced
    older = traced.model if isinstance(traced.model, PrunedModule) else None
    with progress.step("cut"):
        root, graph, _ = slice_channels(analysis, keep)
        pruned = build(traced.model, root, graph)
        left = carry_attributes(traced.model, pruned)
    verified = ""
    if check:
        with progress.step("verify"):
            verified = verify(mask(traced.model, plan), pruned, traced.example_inputs)
    notes = [*notes, *traced.notes, *_left_out(analysis, pruned)]
    if left:
        notes.append(f"attributes that could not be carried over: {', '.join(sorted(left))}")
    whole = compose(plan_now(older), plan, older.origin.lineage.keys) if older else plan
    pruned.plan = whole
    lineage = lineage_of(analysis, keep, older.origin.lineage if older else None)
    pruned.origin = Origin(input_specs(traced.example_inputs), lineage, traced.front_end, 0)
    former = older.report if older else None
    pruned.report = _report(analysis, plan, whole, keep, verified, notes, former)
    pruned.report.seconds = progress.seconds
    return pruned


def _left_out(analysis: Analysis, pruned: PrunedModule) -> list[str]:
    """Tensors of the model that the graph does not use, so that nobody looks for them in vain."""
    here = pruned.state_dict()
    gone = [k for k in analysis.state if k not in here]
    owners = [
        owner
        for owner in dict.fromkeys(k.rpartition(".")[0] or k for k in gone)
        if owner.split(".")[0] not in analysis.traced.dropped
    ]
    if not owners:
        return []
    named = ", ".join(f"`{name}`" for name in owners[:8]) + (", ..." if len(owners) > 8 else "")
    return [f"forward does not use {named}: left out of the pruned network"]


def _report(
    analysis: Analysis,
    step: Plan,
    whole: Plan,
    keep: Array,
    verified: str,
    notes: list[str],
    older: Report | None,
) -> Report:
    rows = []
    first = {} if older is None else {row.name: row.before for row in older.groups}
    for group in analysis.groups:
        classes = analysis.classes(group.widest.ids)
        rows.append(
            GroupRow(
                name=group.name,
                before=first.get(group.name, len(classes)),
                after=int(np.count_nonzero(keep[classes])),
                members=group.members,
            )
        )
    layers = layer_rows(analysis, keep)
    return Report(
        model=type(analysis.traced.model).__name__,
        method=str(step.method["name"]),
        front_end=analysis.traced.front_end,
        asked=None if step.budget is None else dict(step.budget),
        metrics=dict(whole.metrics),
        groups=rows,
        frozen=list(step.frozen),
        verified=verified,
        notes=notes,
        layers=since_original(older.layers, layers) if older else layers,
        options=dict(step.method),
    )


def fold(
    pruned: PrunedModule,
    progress: Progress,
    only: tuple[Fold, ...] | None = None,
    *,
    check: bool = False,
) -> PrunedModule:
    """Fold batch norms (all that can be, or those of a plan); the plan says which were.

    Folding rounds weights to their own dtype, so its check has the bound of float32.
    """
    with progress.step("fold"):
        pairs = None if only is None else [(f.conv, f.bn) for f in only]
        folded, report = fold_batchnorm(pruned, pairs)
    assert isinstance(folded, PrunedModule)
    if check:
        with progress.step("verify"):
            inputs = tuple(spec.example() for spec in pruned.origin.inputs)
            dtypes = [p.dtype for p in folded.parameters() if p.is_floating_point()]
            bound = max([BOUND_32, *(16 * torch.finfo(d).eps for d in dtypes)])
            said = verify(pruned, folded, inputs, bound)
            folded.report.verified += "; folding: " + said.replace(
                "masked original", "unfolded one"
            )
    if only is not None and len(report.folded) != len(only):
        missing = sorted({f.bn for f in only} - {bn for _, bn in report.folded})
        raise UnsupportedOpError(
            f"the plan folds `{missing[0]}`, which cannot be folded here",
            where=f"module {missing[0]}",
            why=dict(report.skipped).get(missing[0], "no convolution feeds it in this model"),
            fix="use the plan with the architecture that it was made for",
        )
    folds = tuple(Fold(conv, bn) for conv, bn in report.folded)
    folded.plan = replace(
        folded.plan,
        folds=folded.plan.folds + (folds if only is None else ()),
        metrics={
            **folded.plan.metrics,
            "params_after": sum(p.numel() for p in folded.parameters()),
        },
    )
    folded.report.folds = len(folded.plan.folds)
    folded.report.metrics = dict(folded.plan.metrics)
    folded.report.layers = after_folding(folded.report.layers, report.folded, folded)
    if report.skipped and only is None:
        folded.report.notes += [
            f"`{bn}` was not folded: {why}" for bn, why in report.skipped.items()
        ]
    return folded


def sealed(pruned: PrunedModule) -> PrunedModule:
    """Note what the tensors are at this moment, so that later training is recognised."""
    pruned.origin = replace(pruned.origin, stamp=stamp_of(pruned))
    return pruned
