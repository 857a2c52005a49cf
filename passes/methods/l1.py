"""Magnitude of filters. Li et al. 2017 (arXiv:1608.08710), section 3: s_j = sum |F_ij|; smallest go.

Promise: filters are ranked within a layer, never across layers: their scales do not compare.
The paper's other choices are options: largest or random first, the 2-norm, statistics of feature
maps (its section 4.4), scores that leave out pruned inputs (its section 3.3), its networks.

Departs: producers that an addition couples are summed (the paper takes the shortcut's filters).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from fxprune.config import Evidence, Preset, Ratio, check_choice, check_ratio, check_whole, register
from fxprune.errors import OptionError

_ORDERS = ("smallest", "largest", "random")
_NORMS = {"l1": 1, "l2": 2}
_SCORINGS = ("independent", "greedy")
_BY = ("weights", "mean-mean", "mean-std", "mean-l1", "mean-l2", "var-l2")


def _resnet(
    depth: int, ratios: Sequence[float], skipped: set[int], sizes: Sequence[int]
) -> dict[str, float]:
    """The first convolution of every block but the skipped; ids count convolutions from the stem."""
    blocks = [(stage, i) for stage, size in enumerate(sizes) for i in range(size)]
    assert depth == 2 * len(blocks) + 2
    return {
        f"layer{stage + 1}.{i}.conv1": ratios[stage]
        for block, (stage, i) in enumerate(blocks)
        if 2 * block + 2 not in skipped and ratios[stage]
    }


_cifar56 = partial(_resnet, 56, sizes=(9, 9, 9))
_cifar110 = partial(_resnet, 110, sizes=(18, 18, 18))
_imagenet34 = partial(_resnet, 34, skipped={2, 8, 14, 16, 26, 28, 30, 32}, sizes=(3, 4, 6, 3))
_VGG16 = (0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)  # `features.N` of its convolutions

# The networks of the paper's table 1; ratios and skipped layers as in its section 4 and in
# "Rethinking the value of network pruning" (Liu et al. 2019), which re-ran them.
PRESETS: dict[str, Preset] = {
    "VGG-16-A": Preset(
        "zoo.vgg16_bn", 13, {f"features.{n}": 0.5 for n in (_VGG16[0], *_VGG16[7:])}
    ),
    "ResNet-56-A": Preset("zoo.resnet56", 55, _cifar56((0.1, 0.1, 0.1), {16, 20, 38, 54})),
    "ResNet-56-B": Preset("zoo.resnet56", 55, _cifar56((0.6, 0.3, 0.1), {16, 18, 20, 34, 38, 54})),
    "ResNet-110-A": Preset("zoo.resnet110", 109, _cifar110((0.5, 0.0, 0.0), {36})),
    "ResNet-110-B": Preset("zoo.resnet110", 109, _cifar110((0.5, 0.4, 0.3), {36, 38, 74})),
    "ResNet-34-A": Preset("torchvision's resnet34", 36, _imagenet34((0.3, 0.3, 0.3, 0.0))),
    "ResNet-34-B": Preset("torchvision's resnet34", 36, _imagenet34((0.5, 0.6, 0.4, 0.0))),
}


@dataclass(frozen=True, kw_only=True)
class L1:
    """Filter pruning by magnitude.

    ratio: the share of each group's channels that goes, 0 <= ratio < 1; or {pattern: share} by names
        of modules, of which the first that fits counts and groups that none fits stay whole; None
        leaves it to the preset or the budget.
    preset: a network of the paper, a name in `PRESETS`; it is the ratios of its layers.
    order: which go: "smallest" (the paper's method), "largest" or "random" (its comparisons).
    norm: "l1" or "l2", of a filter's weights.
    scoring: "independent" counts every input of a filter; "greedy" goes from the first layer to the
        last and counts the inputs that are left.
    by: "weights", or a statistic of each channel's feature maps x_n over images n of `data`, as the
        convolution gives them: "mean-mean", "mean-std", "mean-l1", "mean-l2" (means over n of the
        map's mean, standard deviation, 1-norm, 2-norm), "var-l2" (the variance of its 2-norm).
    samples: images for `by`.
    steps: in how many steps of equal size the channels go; scores are taken anew, and `fit` trains,
        after each of them.

    Raises OptionError or OptionTypeError for a value out of range.
    """

    ratio: Ratio | None = None
    preset: str | None = None
    order: Literal["smallest", "largest", "random"] = "smallest"
    norm: Literal["l1", "l2"] = "l1"
    scoring: Literal["independent", "greedy"] = "independent"
    by: Literal["weights", "mean-mean", "mean-std", "mean-l1", "mean-l2", "var-l2"] = "weights"
    samples: int = 1024
    steps: int = 1

    def __post_init__(self) -> None:
        if self.ratio is not None:
            object.__setattr__(self, "ratio", check_ratio(self.ratio))
        if self.preset is not None:
            check_choice("preset", self.preset, tuple(PRESETS))
            if self.ratio is not None:
                raise OptionError(
                    f"both a ratio and a preset ({self.preset}) were given",
                    where="ratio, preset",
                    why="a preset is the ratios of its layers",
                    fix="drop one of them",
                )
        check_choice("order", self.order, _ORDERS)
        check_choice("norm", self.norm, tuple(_NORMS))
        check_choice("scoring", self.scoring, _SCORINGS)
        check_choice("by", self.by, _BY)
        for option, default in (("scoring", "independent"), ("norm", "l1")):
            value = getattr(self, option)
            if value != default and (self.by != "weights" or self.order == "random"):
                other = "order" if self.order == "random" else "by"
                raise OptionError(
                    f"{option} is {value!r}, and {other} is {getattr(self, other)!r}",
                    where=f"{option}, {other}",
                    why=f"{option} is about scores that weights give",
                    fix=f"drop one of them: {option} has no effect there",
                )
        check_whole("samples", self.samples, least=1)
        check_whole("steps", self.steps, least=1)

    @property
    def shares(self) -> Ratio | Preset | None:
        """What goes: a share, shares by pattern, a network of the paper, or what the budget says."""
        return PRESETS[self.preset] if self.preset else self.ratio

    @property
    def looks_at_data(self) -> bool:
        """Whether scores need `data`."""
        return self.by != "weights" and self.order != "random"


@register("l1", L1)
def l1_scores(group: Any, weights: Sequence[Tensor], config: L1, evidence: Evidence) -> Tensor:
    """Scores [C], highest stay; weights are the group's producers, each [C, ...]."""
    if config.order == "random":
        draws = evidence.generator(group.name)  # wherever torch puts tensors by default
        return torch.rand(len(group), generator=draws, dtype=torch.float64, device="cpu")
    if config.by == "weights":
        p = _NORMS[config.norm]
        # In float64: squares of 1e-23 are 0 in float32.
        norms = [torch.linalg.vector_norm(F.flatten(1), p, 1, dtype=torch.float64) for F in weights]
        parts = [norm.cpu() for norm in norms]
    else:
        parts = [maps[config.by] for maps in evidence.maps(group, config.samples)]
    s = torch.stack(parts).sum(0)  # s_j, [C] float64
    return s if config.order == "smallest" else -s
