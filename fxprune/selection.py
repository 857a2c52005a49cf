"""Scores -> which channels stay: rank every group, keep what every piece needs, fit the budget."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.budget import Budget, Ranked, allowed_counts, by_budget, by_ratio, keep_mask
from fxprune.config import Method, Preset, Ratio
from fxprune.cost import Cost, retained_tensors
from fxprune.errors import OptionError, OptionTypeError, PlanError
from fxprune.evidence import Evidence
from fxprune.groups import Analysis, Array, Group
from fxprune.labels import Slot
from fxprune.mask import zero_inputs
from fxprune.pause import collector_paused
from fxprune.plan import Plan, Slice
from fxprune.planning import write_plan
from fxprune.scope import Ignore, choose_groups, no_match


def out_first(slot: Slot, t: Tensor) -> Tensor:
    """A producer's weight with one row per channel it makes: [size, ...]."""
    if slot.dim == 0:
        return t
    if slot.blocks == 1:
        return t.movedim(slot.dim, 0)
    g = slot.blocks  # grouped transposed convolution: [C_in, C_out / g, ...]
    return t.view(g, t.shape[0] // g, *t.shape[1:]).transpose(1, 2).flatten(0, 1)


def group_weights(analysis: Analysis, group: Group, keep: Array | None = None) -> list[Tensor]:
    """The producers' weights with one entry per class: float32 or float64, each [C, ...].

    A class that holds several rows of a producer gets [C, rows, ...]; missing rows are zeros.
    keep: bool [classes]; weights that read a class which does not stay count as zeros.
    """
    return [
        per_class(analysis, slot, group, out_first(slot, _weight(analysis, slot, keep)))
        for slot in group.producers
    ]


def _weight(analysis: Analysis, slot: Slot, keep: Array | None) -> Tensor:
    """A producer's tensor in float32 or float64, its removed inputs zeroed."""
    t = analysis.traced.tensors.tensor[slot.tensor].detach()
    t = t if t.dtype == torch.float64 else t.float()
    if keep is None:
        return t
    for s in analysis.slots:
        stays = keep[analysis.classes(s.ids)]
        if s.tensor == slot.tensor and s.dim != slot.dim and not stays.all():
            t = t.clone()  # guard: own copy -> tests/methods -k users_weights
            zero_inputs(t, Slice(s.tensor, s.dim, "in", s.size, tuple(np.flatnonzero(stays))))
    return t


def per_class(analysis: Analysis, slot: Slot, group: Group, rows: Tensor) -> Tensor:
    """Rows of a producer [size, ...] -> one entry per class of a group, [C, ...]."""
    count = len(group)
    position = np.full(len(analysis.stays), -1)
    position[group.classes] = np.arange(count)
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


def rank(
    analysis: Analysis,
    group: Group,
    method: Method,
    evidence: Evidence,
    keep: Array | None = None,
) -> Array:
    """A group's classes by score, the one that stays longest first; ties: lower index stays.

    keep: as in `group_weights`.
    """
    weights = group_weights(analysis, group, keep)
    if method.custom:
        weights = [w.clone() for w in weights]  # not the user's own memory
    try:
        scores = method.scores(group, weights, evidence)
        scores = torch.as_tensor(scores).detach().flatten().double().cpu()
    except Exception as error:
        if not method.custom:
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
            fix="return one finite score per channel, the higher the longer it stays"
            if method.custom
            else "look for NaN, infinities or numbers near the largest float in weights and data",
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
            if bad:  # guard: not finite -> tests/bad_input/test_weights.py -k nan
                raise PlanError(
                    f"`{name}` has {bad} values that are NaN or infinite",
                    where=f"{'parameter' if isinstance(t, nn.Parameter) else 'buffer'} {name}",
                    why="channels cannot be ranked by such weights",
                    fix="train or load the model again; a diverged checkpoint cannot be pruned",
                )


@dataclass(frozen=True)
class Step:
    """One of several cuts in a row, each of which takes the same part of what goes in all.

    number: from 1 to `of`. widths, costs: channels of each group, and prices, before the first cut.
    """

    number: int = 1
    of: int = 1
    widths: Mapping[str, int] = field(default_factory=dict)
    costs: Mapping[str, int] = field(default_factory=dict)

    def part(self, gone: float) -> float:
        """Of a share that goes in all, the share that has gone after this step."""
        return gone * self.number / self.of


@dataclass(frozen=True)
class Selection:
    """What was chosen. notes: groups of which more stay than the ratio asks for."""

    plan: Plan
    keep: Array  # bool [classes]
    notes: list[str]


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
    data: Iterable[Any] | None = None,
    step: Step | None = None,
) -> Selection:
    """Rank every group, fit the budget or the ratio, and write the plan down."""
    step = step or Step()
    groups = choose_groups(analysis, scope, ignore)
    check_finite(analysis)
    evidence = evidence_of(analysis, seed, data)
    cost = Cost.of(analysis)
    price: dict[str, Callable[[Array], int]] = {"macs": cost.macs, "params": cost.params}

    ratios: list[float] = []
    limits: dict[str, int] = {}
    if budget is None and method.shares is not None:
        ratios = [step.part(ratio) for ratio in ratios_of(analysis, groups, method.shares)]
        if not any(ratios) and not isinstance(method.shares, int | float):
            raise _nothing_of(method.shares, scope, ignore)
    else:
        budget = budget or Budget(macs=0.5)
        for name, share in budget.to_dict().items():
            total = step.costs.get(name, price[name](analysis.everything()))
            limits[name] = int((1 - step.part(1 - share)) * total + 1e-6)

    def counts_of(ranked: list[Ranked]) -> list[int]:
        if limits:
            return by_budget(analysis, ranked, limits, price)
        return by_ratio(ranked, ratios, [step.widths.get(g.name, len(g)) for g in groups])

    orders = [rank(analysis, g, method, evidence) for g in groups]
    ranked = protect(analysis, groups, orders, align)
    counts = counts_of(ranked)
    if method.greedy:
        ranked, counts = _greedy(
            analysis, groups, method, evidence, align, orders, counts, counts_of
        )
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
    widths = [step.widths.get(g.name, len(g)) for g in groups]
    asked = [math.floor((1 - r) * width + 1e-9) for r, width in zip(ratios, widths, strict=False)]
    return Selection(plan, keep, _clipped(groups, counts, asked))


def _clipped(groups: Sequence[Group], counts: list[int], asked: list[int]) -> list[str]:
    """Where more stay than a ratio asks for: one of every piece must, and `align` leaves no less."""
    return [
        f"of `{g.name}` {count} of {len(g)} channels stay, where the ratio asks for {wanted}: fewer "
        "would leave a tensor, or a piece of a split, empty, or break the alignment"
        for g, count, wanted in zip(groups, counts, asked, strict=False)
        if count > wanted
    ]


def first_step(analysis: Analysis) -> Step:
    """What later steps need to know of the network before the first cut."""
    cost, whole = Cost.of(analysis), analysis.everything()
    return Step(
        widths={g.name: len(g) for g in analysis.groups},
        costs={"macs": cost.macs(whole), "params": cost.params(whole)},
    )


def evidence_of(analysis: Analysis, seed: int, data: Iterable[Any] | None) -> Evidence:
    """What methods may ask about the groups of an analysis."""

    def rows(slot: Slot, group: Group, values: Tensor) -> Tensor:
        return per_class(analysis, slot, group, values)

    return Evidence(analysis, seed=seed, data=data, rows=rows)


def _greedy(
    analysis: Analysis,
    groups: Sequence[Group],
    method: Method,
    evidence: Evidence,
    align: int,
    orders: list[Array],
    counts: list[int],
    counts_of: Callable[[list[Ranked]], list[int]],
) -> tuple[list[Ranked], list[int]]:
    """Rank the groups in order, each without the inputs that those before it lose.

    orders: of scores that count every input, where to begin. How many go decides what is left to
    count, and may in turn depend on which go: the two are repeated until both stay.
    """
    for _ in range(_GREEDY_ROUNDS):
        keep = analysis.everything()
        for i, group in enumerate(groups):
            orders[i] = rank(analysis, group, method, evidence, keep)
            # what goes is known only once every piece has its one: it may be another group's choice
            ranked = protect(analysis, groups, orders, align)
            keep[ranked[i].order[counts[i] :]] = False
        counts = counts_of(ranked)
        if (keep_mask(analysis, ranked, counts) == keep).all():
            break
    return ranked, counts


_GREEDY_ROUNDS = 4


def ratios_of(analysis: Analysis, groups: Sequence[Group], shares: Ratio | Preset) -> list[float]:
    """The share that goes of each group; PlanError for a pattern or a preset that does not fit."""
    if not isinstance(shares, Preset | Mapping):
        return [float(shares)] * len(groups)
    names = _names(analysis)
    if isinstance(shares, Preset):
        _check_preset(analysis, shares, names)
        return [shares.ratios.get(g.name, 0.0) for g in groups]
    known = set().union(*names.values())

    def fits(pattern: str, owned: set[str]) -> bool:
        if pattern in known:  # guard: literal names -> tests/methods -k literally
            return pattern in owned
        return bool(fnmatch.filter(owned, pattern))

    for pattern in shares:
        if not any(fits(pattern, owned) for owned in names.values()):
            raise no_match("ratio", pattern, sorted(names))
    return [next((r for p, r in shares.items() if fits(p, names[g.name])), 0.0) for g in groups]


def _names(analysis: Analysis) -> dict[str, set[str]]:
    """Group -> its name and those of the modules that make its channels, under every alias; but a
    name that is a group's own is that group's alone."""
    aliases = analysis.traced.tensors.names
    own = {g.name for g in analysis.groups}
    return {
        g.name: {g.name}
        | {
            alias.rpartition(".")[0] or alias
            for slot in g.producers
            for alias in aliases.get(slot.tensor, [slot.tensor])
        }
        - (own - {g.name})
        for g in analysis.groups
    }


def _check_preset(analysis: Analysis, preset: Preset, names: Mapping[str, object]) -> None:
    found = sum(
        isinstance(t, nn.Parameter) and t.dim() == 4
        for t in retained_tensors(analysis.traced).values()
    )
    missing = [name for name in preset.ratios if name not in names]
    if missing or found != preset.convolutions:  # guard: network -> tests/methods -k preset_wants
        raise PlanError(
            f"the preset does not fit this {type(analysis.traced.model).__name__}",
            where="preset",
            why=f"it is made for {preset.network} with {preset.convolutions} convolutions; this "
            f"network has {found}" + (f", and no prunable group `{missing[0]}`" if missing else ""),
            fix=f"use it with {preset.network}, or pass the shares by name: ratio={{'layer1.*': 0.1}}",
        )


def _nothing_of(shares: object, scope: object, ignore: object) -> PlanError:
    return PlanError(
        "nothing can be pruned",
        where="ratio",
        why=f"of the groups that scope={scope!r} and ignore={ignore!r} leave, none has a share above 0",
        fix="print(fxprune.analyze(model)) lists the groups and their names",
    )


def check_align(align: object) -> int:
    """A whole number of at least 1."""
    if isinstance(align, bool) or not isinstance(align, int):
        raise OptionTypeError(f"align is {align!r}", where="align", why="it must be a whole number")
    if align < 1:
        raise OptionError(f"align is {align}", where="align", why="it must be at least 1")
    return align
