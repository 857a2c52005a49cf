"""Analysis + a method's scores -> a Plan; and plans made by hand, composed, or read from files."""

from __future__ import annotations

import fnmatch
import operator
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune._version import __version__
from fxprune.budget import Budget, Ranked, allowed_counts, by_budget, by_ratio, keep_mask
from fxprune.config import Method
from fxprune.cost import Cost, retained_tensors
from fxprune.errors import OptionError, OptionTypeError, PlanError
from fxprune.groups import Analysis, Array, Group
from fxprune.labels import Slot
from fxprune.passes.slice_channels import slices_of
from fxprune.pause import collector_paused
from fxprune.plan import Fold, Plan, Slice

Ignore = Sequence[str] | Callable[[nn.Module, str], bool]


# Scores


def out_first(slot: Slot, t: Tensor) -> Tensor:
    """A producer's weight with one row per channel it makes: [size, ...]."""
    if slot.dim == 0:
        return t
    if slot.blocks == 1:
        return t.transpose(0, 1)
    g = slot.blocks  # grouped transposed convolution: [C_in, C_out / g, ...]
    return t.view(g, t.shape[0] // g, *t.shape[1:]).transpose(1, 2).flatten(0, 1)


def group_weights(analysis: Analysis, group: Group) -> list[Tensor]:
    """The producers' weights with one entry per class: float32 or float64, each [C, ...].

    A class that holds several rows of a producer gets [C, rows, ...]; missing rows are zeros.
    """
    position = np.full(len(analysis.stays), -1)
    position[group.classes] = np.arange(len(group))
    return [_per_class(analysis, slot, position, len(group)) for slot in group.producers]


def _per_class(analysis: Analysis, slot: Slot, position: Array, count: int) -> Tensor:
    t = analysis.traced.tensors.tensor[slot.tensor].detach()
    rows = out_first(slot, t if t.dtype == torch.float64 else t.float())
    at = position[analysis.classes(slot.ids)]
    inside = np.flatnonzero(at >= 0)
    if len(inside) == count and (at[inside] == np.arange(count)).all():
        return rows if len(inside) == len(rows) else rows[torch.from_numpy(inside)]
    order = inside[np.argsort(at[inside], kind="stable")]
    where = at[order]
    nth = np.arange(len(order)) - np.searchsorted(where, where)
    most = int(nth.max()) + 1 if len(nth) else 1
    out = rows.new_zeros((count, most, *rows.shape[1:]))
    out[torch.from_numpy(where), torch.from_numpy(nth)] = rows[torch.from_numpy(order)]
    return out.squeeze(1) if most == 1 else out


def rank(analysis: Analysis, group: Group, method: Method) -> Array:
    """A group's classes by score, the one that stays longest first; ties: lower index stays."""
    weights = group_weights(analysis, group)
    if method.name == "custom":
        weights = [w.clone() for w in weights]  # not the user's own memory
    try:
        scores = torch.as_tensor(method.scores(group, weights)).detach().flatten().double().cpu()
    except Exception as error:
        if method.name != "custom":
            raise
        raise PlanError(
            f"the scoring function failed on group `{group.name}`: {error}",
            where="method",
            why=f"it is called as scores(group, weights) and raised {type(error).__name__}",
            fix="return one number per channel of the group: a tensor or list of length len(group)",
        ) from error
    if len(scores) != len(group) or not bool(torch.isfinite(scores).all()):
        raise PlanError(
            f"method {method.name!r} gave {len(scores)} scores for the {len(group)} channels of "
            f"group `{group.name}`" + ("" if len(scores) != len(group) else ", some not finite"),
            where="method",
            fix="return one finite score per channel, the higher the longer it stays",
        )
    order: Array = group.classes[np.argsort(-scores.numpy(), kind="stable")]
    return order


def protect(
    analysis: Analysis, groups: Sequence[Group], orders: Sequence[Array], align: int
) -> list[Ranked]:
    """Put the best class of every piece first: one of each must stay, and pieces span groups."""
    height = np.full(
        len(analysis.stays), -1.0
    )  # 0: the best of its group; below 0: not up for choice
    for order in orders:
        height[order] = np.arange(len(order)) / len(order)
    marked = np.zeros(len(analysis.stays), dtype=bool)
    for piece in analysis.pieces:
        needs_one = (height[piece] >= 0).all() and not marked[piece].any()
        if needs_one:  # guard: pieces keep one -> tests/test_groups.py -k piece
            marked[piece[np.argmin(height[piece])]] = True
    ranked = []
    for group, order in zip(groups, orders, strict=True):
        first = marked[order]
        counts = allowed_counts(analysis, group, int(first.sum()), align)
        ranked.append(Ranked(group, np.concatenate([order[first], order[~first]]), counts))
    return ranked


# What may be cut


def choose_groups(analysis: Analysis, scope: str | Sequence[str], ignore: Ignore) -> list[Group]:
    """The groups that scope and ignore leave; PlanError for a pattern that matches nothing."""
    frozen = _ignored_classes(analysis, ignore)
    groups = [g for g in analysis.groups if not frozen[g.classes].any()]
    if scope == "free":
        groups = [g for g in groups if not g.residual]
    elif scope != "all":
        patterns = [scope] if isinstance(scope, str) else list(scope)
        names = {g.name: {g.name, *g.members, *(m.rpartition(".")[0] for m in g.members)} for g in groups}  # fmt: skip
        for pattern in patterns:
            if not any(fnmatch.filter(n, pattern) for n in names.values()):
                raise _no_match("scope", pattern, sorted(names))
        groups = [g for g in groups if any(fnmatch.filter(names[g.name], p) for p in patterns)]
    if not groups:
        raise _nothing(analysis, scope, ignore)
    return groups


def _no_match(where: str, pattern: str, names: Sequence[str]) -> PlanError:
    some = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
    return PlanError(
        f"the pattern {pattern!r} in {where} matches nothing",
        where=where,
        why=f"there are, for example, {some}" if names else "there is nothing to match",
        fix="patterns are those of fnmatch, over names of modules and parameters: 'layer1.*'",
    )


def _nothing(analysis: Analysis, scope: object, ignore: object) -> PlanError:
    if analysis.groups:
        why = f"scope={scope!r} and ignore={ignore!r} leave none of {len(analysis.groups)} groups"
    else:
        reasons = [f"{node}: {text}" for node, text in analysis.frozen.items()]
        opaque = {str(node.name): why for node, why in analysis.flow.ledger.whole.values()}
        reasons += [
            f"{node}: {text}" for node, text in opaque.items() if node not in analysis.frozen
        ]
        why = "every channel is frozen. " + "; ".join(reasons[:8]) if reasons else "the model has no layer with channels to cut"  # fmt: skip
    return PlanError(
        "nothing can be pruned",
        where=type(analysis.traced.model).__name__,
        why=why,
        fix="print(fxprune.analyze(model)) shows what is frozen and why",
    )


def _ignored_classes(analysis: Analysis, ignore: Ignore) -> Array:
    """Classes that hold an output channel of an ignored module or parameter: bool [classes]."""
    frozen = np.zeros(len(analysis.stays), dtype=bool)
    tensors = analysis.traced.tensors
    ignored = _ignored_names(analysis, ignore)
    for slot in analysis.slots:
        makes = slot.role == "out" or analysis.flow.ledger.whole_groups.get(slot.tensor, False)
        if makes and not ignored.isdisjoint(tensors.names.get(slot.tensor, [slot.tensor])):
            frozen[analysis.classes(slot.ids)] = True
    return frozen


def _ignored_names(analysis: Analysis, ignore: Ignore) -> set[str]:
    model = analysis.traced.model
    names = [n for owned in analysis.traced.tensors.names.values() for n in owned]
    if callable(ignore):
        keep = {n: m for n, m in model.named_modules() if n and not ignore(m, n)}
        return {n for n in names if any(n.startswith(m + ".") for m in keep)}
    patterns = [ignore] if isinstance(ignore, str) else list(ignore)
    modules = [n for n, _ in model.named_modules() if n]
    ignored: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise OptionTypeError(f"ignore holds {pattern!r}", where="ignore", why="patterns are strings")  # fmt: skip
        hit_modules = fnmatch.filter(modules, pattern)
        hit = set(fnmatch.filter(names, pattern))
        hit |= {n for n in names for m in hit_modules if n.startswith(m + ".")}
        if not hit and not hit_modules:
            raise _no_match("ignore", pattern, modules)
        ignored |= hit
    return ignored


# Plans


def check_finite(analysis: Analysis) -> None:
    """NaN or Inf in a weight would make every choice arbitrary: refuse, naming the tensor."""
    for name, t in retained_tensors(analysis.traced).items():
        if t.is_meta:
            raise PlanError(
                f"`{name}` is on the meta device and holds no values",
                where=f"parameter {name}",
                why="a method ranks channels by their weights",
                fix="load weights first, or make the plan by hand: fxprune.analyze(model).plan(...)",
            )
        if t.is_floating_point() and not bool(torch.isfinite(t.detach().sum())):
            bad = int((~torch.isfinite(t.detach())).sum())
            if bad:  # guard: not finite -> tests/test_bad_input.py -k nan
                raise PlanError(
                    f"`{name}` has {bad} values that are NaN or infinite",
                    where=f"{'parameter' if isinstance(t, nn.Parameter) else 'buffer'} {name}",
                    why="channels cannot be ranked by such weights",
                    fix="train or load the model again; a diverged checkpoint cannot be pruned",
                )


@collector_paused
def select(
    analysis: Analysis,
    method: Method,
    budget: Budget | None,
    *,
    scope: str | Sequence[str] = "all",
    ignore: Ignore = (),
    align: int = 1,
    seed: int = 0,
) -> tuple[Plan, Array]:
    """Rank every group, fit the budget or the ratio, and write the plan down."""
    groups = choose_groups(analysis, scope, ignore)
    check_finite(analysis)
    ranked = protect(analysis, groups, [rank(analysis, g, method) for g in groups], align)
    cost = Cost.of(analysis)
    if budget is None and method.ratio is not None:
        counts = by_ratio(ranked, method.ratio)
    else:
        budget = budget or Budget(macs=0.5)
        whole = analysis.everything()
        price: dict[str, Callable[[Array], int]] = {"macs": cost.macs, "params": cost.params}
        limits = {n: int(share * price[n](whole)) for n, share in budget.to_dict().items()}
        counts = by_budget(analysis, ranked, limits, price)
    keep = keep_mask(analysis, ranked, counts)
    plan = write_plan(
        analysis,
        keep,
        cost,
        method=method.record,
        budget=None if budget is None else budget.to_dict(),
        scope=scope if isinstance(scope, str) else tuple(scope),
        seed=seed,
    )
    return plan, keep


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
        for slot in sorted(slots, key=lambda s: s.role != "out"):
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
    if len(torn):  # guard: coupled by hand -> tests/test_bad_input.py -k coupled
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
        if given.get(key) != s:  # guard: incomplete -> tests/test_bad_input.py -k incomplete
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


def check_align(align: object) -> int:
    """A whole number of at least 1."""
    if isinstance(align, bool) or not isinstance(align, int):
        raise OptionTypeError(f"align is {align!r}", where="align", why="it must be a whole number")
    if align < 1:
        raise OptionError(f"align is {align}", where="align", why="it must be at least 1")
    return align
