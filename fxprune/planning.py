"""Plans from masks and back: written, made by hand, read against an analysis, composed."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from fxprune._version import __version__
from fxprune.cost import Cost
from fxprune.errors import OptionTypeError, PlanError
from fxprune.groups import Analysis, Array, Group, by_head_dims
from fxprune.labels import Slot
from fxprune.passes.slice_channels import slices_of
from fxprune.plan import Fold, Plan, Slice


def write_plan(
    analysis: Analysis,
    keep: Array,
    cost: Cost,
    *,
    method: Mapping[str, Any],
    budget: Mapping[str, float] | None = None,
    scope: str | tuple[str, ...] = "all",
    seed: int = 0,
    folds: Iterable[Fold] = (),
) -> Plan:
    """The plan of a keep mask, bool [classes]."""
    known = analysis.state
    whole = analysis.everything()
    if analysis.flow.ledger.by_head_dims and not by_head_dims(scope):
        scope = (*([scope] if isinstance(scope, str) else scope), "head-dims")
    return Plan(
        fxprune_version=__version__,
        method=dict(method),
        budget=budget,
        scope=scope,
        seed=seed,
        fingerprint=analysis.fingerprint,
        slices=tuple(s for s in slices_of(analysis, keep) if s.tensor in known),
        folds=tuple(folds),
        frozen=analysis.notes,
        metrics={
            "macs_before": cost.macs(whole),
            "macs_after": cost.macs(keep),
            "params_before": cost.params(whole),
            "params_after": cost.params(keep),
        },
    )


def plan_by_hand(analysis: Analysis, keep: Mapping[str, Sequence[int]]) -> Plan:
    """`Analysis.plan`: keep lists of groups, modules or tensors; couplings expanded."""
    if not isinstance(keep, Mapping):
        raise OptionTypeError(f"keep is {type(keep).__name__}", where="keep", why="it must map names to indices")  # fmt: skip
    mask, wanted = analysis.everything(), {}
    for name, indices in keep.items():
        slot, part = _slot_named(analysis, name)
        stays = _indices(name, indices, slot.size)
        classes = analysis.classes(slot.ids)
        if part is not None:
            stays = stays | ~np.isin(classes, part.classes)
        _check_coupled(analysis, name, slot, stays)
        wanted[name] = (classes, stays)
        mask[classes[~stays]] = False
    for name, (classes, stays) in wanted.items():
        lost = np.flatnonzero(stays & ~mask[classes])
        if len(lost):
            raise PlanError(
                f"channel {lost[0]} of `{name}` is kept, and removed by another entry",
                where=f"keep[{name!r}]",
                why="the two entries name coupled channels and disagree",
                fix="give one entry per coupled group",
            )
    check_mask(analysis, mask)
    return write_plan(analysis, mask, Cost.of(analysis), method={"name": "manual"})


def _slot_named(analysis: Analysis, name: str) -> tuple[Slot, Group | None]:
    """The dimension that a name means, and its group where a group was named."""
    tensors = analysis.traced.tensors
    for group in analysis.groups:
        if name == group.name:
            return group.producers[0], group
    canonical = {alias: first for first, names in tensors.names.items() for alias in names}
    for tensor in (name, f"{name}.weight"):
        first = canonical.get(tensor)
        slots = [s for s in analysis.slots if s.tensor == first]
        for slot in sorted(slots, key=lambda s: not s.makes):
            return slot, None
    analysis.group(name)  # raises with the names there are
    raise AssertionError(name)


def _indices(name: str, indices: Sequence[int], size: int) -> Array:
    """Kept indices as a mask of length `size`; PlanError for anything out of order."""
    stays = np.zeros(size, dtype=bool)
    where = f"keep[{name!r}]"
    if isinstance(indices, str) or not isinstance(indices, Iterable):
        raise OptionTypeError(
            f"{where} is {indices!r}", where=where, why="it must be a list of indices that stay"
        )
    for item in indices:
        i = _index(item, where)
        if not 0 <= i < size:
            raise PlanError(f"{where} holds {i}", where=where, why=f"it has {size} channels, 0 to {size - 1}")  # fmt: skip
        if stays[i]:
            raise PlanError(
                f"{where} holds {i} twice",
                where=where,
                why="an index stays once",
                fix="drop the repetition",
            )
        stays[i] = True
    if not stays.any():
        raise PlanError(f"{where} is empty", where=where, why="at least one channel must stay")
    return stays


def _index(item: object, where: str) -> int:
    try:
        if isinstance(item, bool):
            raise TypeError
        return operator.index(item)  # type: ignore[arg-type]
    except TypeError:
        raise OptionTypeError(
            f"{where} holds {item!r}", where=where, why="indices are integers"
        ) from None


def _check_coupled(analysis: Analysis, name: str, slot: Slot, stays: Array) -> None:
    """Rows of one class go together, frozen ones stay."""
    classes = analysis.classes(slot.ids)
    frozen = np.flatnonzero(analysis.stays[classes] & ~stays)
    if len(frozen):  # guard: frozen by hand -> tests/test_groups.py -k outputs
        raise PlanError(
            f"channel {frozen[0]} of `{name}` cannot be removed",
            where=f"`{slot.tensor}` dimension {slot.dim}",
            why=why_frozen(analysis, int(classes[frozen[0]])),
        )
    torn = np.flatnonzero(stays & np.isin(classes, classes[~stays]))
    if len(torn):  # guard: coupled by hand -> tests/bad_input/test_plans.py -k coupled
        partner = next(i for i in np.flatnonzero(~stays) if classes[i] == classes[torn[0]])
        raise PlanError(
            f"channels {torn[0]} and {partner} of `{name}` are coupled: keep both or neither",
            where=f"`{slot.tensor}` dimension {slot.dim}",
            why="the network adds, shuffles or groups them together",
            fix=f"keep or remove {torn[0]} and {partner} alike",
        )


def why_frozen(analysis: Analysis, cls: int) -> str:
    """The reason for which a class stays."""
    for freeze in analysis.flow.ledger.frozen:
        if (analysis.classes(freeze.ids) == cls).any():
            return analysis.frozen.get(freeze.node.name, freeze.why)
    return "it reaches an input or a tensor that is not cut"


def check_mask(analysis: Analysis, keep: Array) -> None:
    """Every tensor and every part of a split keeps something."""
    for piece in analysis.pieces:
        if not keep[piece].any():  # guard: empty by hand -> tests/test_groups.py -k piece
            names = [
                s.tensor for s in analysis.slots if np.isin(analysis.classes(s.ids), piece).any()
            ]
            raise PlanError(
                f"nothing of a part of `{names[0] if names else 'the network'}` would stay",
                where=", ".join(names[:4]),
                why="every tensor, and every piece of a split, needs at least one channel",
            )


def mask_of(analysis: Analysis, plan: Plan) -> Array:
    """The keep mask of a plan, after checking that it is complete under this analysis.

    Raises PlanError naming the first tensor at which plan and couplings disagree.
    """
    keep = analysis.everything()
    slots = {(s.tensor, s.dim): s for s in analysis.slots}
    for s in plan.slices:
        slot = slots.get((s.tensor, s.dim))
        if slot is None or slot.size != s.size or slot.role != s.role:
            raise PlanError(
                f"the plan cuts `{s.tensor}` along dimension {s.dim} as {s.role!r} of {s.size}",
                where=f"`{s.tensor}`",
                why="in this model that dimension is "
                + ("not prunable" if slot is None else f"{slot.role!r} of {slot.size}"),
                fix="use the plan with the architecture (and library version) it was made for",
            )
        stays = _indices(f"{s.tensor}, dimension {s.dim}", s.keep, s.size)
        _check_coupled(analysis, s.tensor, slot, stays)
        keep[analysis.classes(slot.ids)[~stays]] = False
    known = analysis.state
    complete = {(s.tensor, s.dim): s for s in slices_of(analysis, keep) if s.tensor in known}
    given = {(s.tensor, s.dim): s for s in plan.slices}
    for key, s in complete.items():
        if given.get(key) != s:  # guard: incomplete -> tests/bad_input/test_plans.py -k incomplete
            raise PlanError(
                f"the plan is incomplete: `{s.tensor}` dimension {s.dim} must be cut too",
                where=f"`{s.tensor}`",
                why="its channels are coupled with channels that the plan removes",
                fix="make plans with fxprune.analyze(model).plan(...), which expands couplings",
            )
    check_mask(analysis, keep)
    return keep


def compose(first: Plan, second: Plan, keys: Collection[str]) -> Plan:
    """One plan for two cuts in a row: `second` was made on what `first` left.

    All indices of the result refer to the first original, whose state_dict has `keys`; tensors that
    a fold made (a new bias) are written as cuts of the batch norm that they came from.
    """
    slices = {(s.tensor, s.dim): s for s in first.slices}
    bn_of = {f"{f.conv}.bias": f.bn for f in first.folds}
    for s in second.slices:
        for target in _origins(s, bn_of, keys):
            old = slices.get((target.tensor, target.dim))
            if old is not None:
                size = old.size
                keep = tuple(old.keep[i] for i in target.keep)
                target = replace(target, size=size, keep=keep, role=old.role)
            slices[target.tensor, target.dim] = target
    metrics = {
        **{k: first.metrics[k] for k in ("macs_before", "params_before")},
        **{k: second.metrics[k] for k in ("macs_after", "params_after")},
    }
    return replace(
        second,
        fingerprint=first.fingerprint,
        slices=tuple(slices.values()),
        groupings=first.groupings + second.groupings,
        folds=first.folds + second.folds,
        weights="changed" if "changed" in (first.weights, second.weights) else "cut",
        metrics=metrics,
    )


def _origins(s: Slice, bn_of: Mapping[str, str], keys: Collection[str]) -> list[Slice]:
    """The tensors of the first original that a slice of a later network cuts."""
    bn = bn_of.get(s.tensor)
    parts = ("weight", "bias", "running_mean", "running_var") if bn else ()
    names = [s.tensor, *(f"{bn}.{part}" for part in parts)]
    return [replace(s, tensor=name) for name in names if name in keys]
