"""Scores -> which channels stay: rank every group, keep what every piece needs, fit the budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from fxprune.budget import Budget, Ranked, allowed_counts, by_budget, by_ratio, keep_mask
from fxprune.config import Method
from fxprune.cost import Cost, retained_tensors
from fxprune.errors import OptionError, OptionTypeError, PlanError
from fxprune.groups import Analysis, Array, Group
from fxprune.labels import Slot
from fxprune.pause import collector_paused
from fxprune.plan import Plan
from fxprune.planning import write_plan
from fxprune.scope import Ignore, choose_groups


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


def check_align(align: object) -> int:
    """A whole number of at least 1."""
    if isinstance(align, bool) or not isinstance(align, int):
        raise OptionTypeError(f"align is {align!r}", where="align", why="it must be a whole number")
    if align < 1:
        raise OptionError(f"align is {align}", where="align", why="it must be at least 1")
    return align
