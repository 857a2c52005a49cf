"""Magnitude of filters. Li et al. 2017 (arXiv:1608.08710), section 3: s_j = sum |F_ij|; smallest go.

Departs: producers that an addition couples are summed (the paper takes the shortcut's filters).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fxprune.config import check_share, register
from fxprune.errors import OptionError


@dataclass(frozen=True, kw_only=True)
class L1:
    """L1-norm filter pruning.

    ratio: share of each group's channels removed, 0 <= ratio < 1; None leaves it to the budget.
    order: which go, "smallest" (the paper's method) or "largest" (its ablation).
    """

    ratio: float | None = None
    order: Literal["smallest", "largest"] = "smallest"

    def __post_init__(self) -> None:
        if self.ratio is not None:
            check_share("ratio", self.ratio, least_ok=True, most_ok=False)
        if self.order not in ("smallest", "largest"):
            raise OptionError(
                f"order is {self.order!r}", where="order", why='it must be "smallest" or "largest"'
            )


@register("l1", L1)
def l1_scores(group: Any, weights: Sequence[Tensor], config: L1) -> Tensor:
    """Scores [C], highest stay; weights are the group's producers, each [C, ...]."""
    s = torch.zeros(len(group))  # s_j, [C]
    for F in weights:
        s = s + torch.linalg.vector_norm(F.flatten(1), ord=1, dim=1)
    return s if config.order == "smallest" else -s
