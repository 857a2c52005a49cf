"""Budgets -> how many channels each group keeps, by closed-form costs. No model is ever run.

Every group keeps the same share of its channels, the largest share that fits the budget; what is
left over is then spent channel by channel, on the groups that lost the largest share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fxprune.config import check_share
from fxprune.errors import OptionError, PlanError
from fxprune.groups import Analysis, Array, Group
from fxprune.labels import Slot


@dataclass(frozen=True)
class Budget:
    """What may remain, as fractions of the original: 0 < macs <= 1, 0 < params <= 1, either or both."""

    macs: float | None = None
    params: float | None = None

    def __post_init__(self) -> None:
        if self.macs is None and self.params is None:
            raise OptionError(
                "an empty budget", where="budget", fix="Budget(macs=0.5) or Budget(params=0.5)"
            )
        for name, value in (("macs", self.macs), ("params", self.params)):
            if value is not None:
                check_share(f"budget {name}", value, least_ok=False, most_ok=True)

    def to_dict(self) -> dict[str, float]:
        """The limits that were given."""
        limits = {"macs": self.macs, "params": self.params}
        return {name: float(value) for name, value in limits.items() if value is not None}


@dataclass(frozen=True)
class Ranked:
    """A group's classes in the order in which they stay, and the counts that may stay."""

    group: Group
    order: Array  # int64 [C]: classes, the one that stays longest first
    allowed: Array  # int64, ascending: counts that respect pieces and alignment; the last is C

    def count(self, share: float) -> int:
        """The largest allowed count of at most `share` of the channels (or the least one)."""
        limit = math.floor(share * len(self.order) + 1e-9)
        below = self.allowed[self.allowed <= limit]
        return int(below[-1] if len(below) else self.allowed[0])


def allowed_counts(analysis: Analysis, group: Group, protected: int, align: int) -> Array:
    """Counts of classes for which every producer keeps a multiple of `align` rows, or all."""
    counts = np.arange(max(1, protected), len(group) + 1)
    if align == 1:
        return counts
    fits = np.ones(len(counts), dtype=bool)
    for slot in group.producers:
        fixed, per_class = _rows(analysis, group, slot)
        fits &= (fixed + counts * per_class) % align == 0 if per_class else False
    fits[-1] = True
    return counts[fits]


def _rows(analysis: Analysis, group: Group, slot: Slot) -> tuple[int, int]:
    """Rows of a producer outside the group, and rows per class (0 when classes differ)."""
    classes = analysis.classes(slot.ids)
    count = np.bincount(classes, minlength=len(analysis.stays))[group.classes]
    inside = int(count.sum())
    return len(classes) - inside, int(count[0]) if (count == count[0]).all() else 0


def keep_mask(analysis: Analysis, ranked: list[Ranked], counts: list[int]) -> Array:
    """Everything but the last ones of each group: bool [classes]."""
    keep = analysis.everything()
    for r, count in zip(ranked, counts, strict=True):
        keep[r.order[count:]] = False
    return keep


def by_ratio(ranked: list[Ranked], ratios: list[float], widths: list[int]) -> list[int]:
    """PFEC's count, int(C * (1 - ratio)) of each group's `widths` channels, at least one.

    widths: the C that ratios are meant of; above a group's own count where it was cut before.
    """
    wanted = [max((1 - ratio) * width, 1) for ratio, width in zip(ratios, widths, strict=True)]
    return [r.count(min(k / len(r.order), 1.0)) for r, k in zip(ranked, wanted, strict=True)]


def by_budget(
    analysis: Analysis,
    ranked: list[Ranked],
    limits: dict[str, int],
    price: dict[str, Callable[[Array], int]],
) -> list[int]:
    """Counts that fit all limits (absolute numbers); PlanError when even the least do not."""

    def fits(counts: list[int]) -> bool:
        keep = keep_mask(analysis, ranked, counts)
        return all(price[name](keep) <= limit for name, limit in limits.items())

    shares = np.unique(np.concatenate([r.allowed / len(r.order) for r in ranked] + [np.ones(1)]))
    low, high = (
        -1,
        len(shares) - 1,
    )  # shares[low] fits (or is below the least), shares[high] is next
    if fits([len(r.order) for r in ranked]):
        return [len(r.order) for r in ranked]
    counts = [r.count(0.0) for r in ranked]
    if not fits(counts):
        keep = keep_mask(analysis, ranked, counts)
        reached = ", ".join(f"{price[n](keep):,} {n}" for n in limits)
        asked = ", ".join(f"{limit:,} {n}" for n, limit in limits.items())
        whole = analysis.everything()
        least = " and ".join(f"{n}={_up(price[n](keep) / price[n](whole))}" for n in limits)
        raise PlanError(
            f"the budget cannot be reached: at most {asked} may remain, at least {reached} do",
            where="budget",
            why=f"that is with as few channels as can be in each of {len(ranked)} groups; "
            "what is frozen, ignored, out of scope or aligned stays",
            fix=f"raise the budget to {least}; print(fxprune.analyze(model)) shows what is frozen",
        )
    while high - low > 1:
        middle = (low + high) // 2
        trial = [r.count(float(shares[middle])) for r in ranked]
        if fits(trial):
            low, counts = middle, trial
        else:
            high = middle
    return _spend(ranked, counts, fits)


def _up(share: float) -> float:
    """A share rounded up to three digits."""
    return math.ceil(share * 1000) / 1000


def _spend(ranked: list[Ranked], counts: list[int], fits: Callable[[list[int]], bool]) -> list[int]:
    """Give single channels back while they fit, to those groups first that keep the least share."""
    order = sorted(range(len(ranked)), key=lambda i: (counts[i] / len(ranked[i].order), i))
    for i in order:
        more = ranked[i].allowed[ranked[i].allowed > counts[i]]
        if len(more):
            trial = [*counts[:i], int(more[0]), *counts[i + 1 :]]
            if fits(trial):
                counts = trial
    return counts
