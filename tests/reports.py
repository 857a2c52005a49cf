"""Sample reports and scans that the tests of tables and pages share."""

from __future__ import annotations

from dataclasses import dataclass

from fxprune.plan import Note
from fxprune.report import Curve, GroupRow, LayerRow, Point, Report, TimingRow
from fxprune.views.page import sensitivity_page

NASTY = "<script>alert(1)</script>[red]&$x$\x1b[31m"


def sample(**changes):
    values = {
        "model": "CifarResNet",
        "method": "l1",
        "front_end": "torch.fx",
        "asked": {"macs": 0.5},
        "metrics": {
            "macs_before": 125_485_696,
            "macs_after": 62_701_234,
            "params_before": 853_018,
            "params_after": 431_210,
        },
        "groups": [
            GroupRow("layer1.0.conv1", 16, 5, ("layer1.0.conv1.weight", "layer1.0.bn1.weight")),
            GroupRow("conv1", 16, 16, ("conv1.weight",)),
        ],
        "frozen": [
            Note("linear", "an output"),
            *(Note(f"view_{i}", "unknown size") for i in range(9)),
        ],
        "folds": 2,
        "verified": "max relative difference 3.1e-16 (bound 1e-9)",
        "notes": ["branch aux was dropped"],
        "stages": {"before": 0.98, "after the cut": 0.31, "fine-tuned": 0.97},
        "timings": [
            TimingRow("original", 64, 20.0, 19.0, 22.0),
            TimingRow("pruned", 64, 10.0, 9.5, 10.5),
        ],
        "seconds": {"trace": 0.21, "verify": 0.1},
        "layers": [
            LayerRow("conv1", "conv", 16, 16, 442_368, 442_368, 432, 432),
            LayerRow("bn1", "norm", 16, 16, 0, 0, 32, 32),
            LayerRow("layer1.0.conv1", "conv", 16, 5, 2_359_296, 737_280, 2_304, 720),
            LayerRow("layer1.0.conv2", "conv", 16, 16, 2_359_296, 737_280, 2_304, 720),
            LayerRow("matmul", "product", 0, 0, 1_000, 1_000, 0, 0),
            LayerRow("linear", "linear", 10, 10, 640, 640, 650, 650),
        ],
        "options": {"name": "l1", "ratio": None, "order": "smallest", "preset": "ResNet-56-A"},
    }
    return Report(**{**values, **changes})


def small():
    return Report(model="M", method="l1", front_end="torch.fx", metrics={})


def mobile():
    """Groups with names as long as those of MobileNet, and with as many members."""
    return [
        GroupRow(
            f"features.{i}.block.{j}.{'fc1' if j == 2 else 0}",
            1280,
            640 + i,
            tuple(f"features.{i + k}.block.{j}.{k}.weight" for k in range(9)),
        )
        for i in range(10, 16)
        for j in range(3)
    ]


def long(count=480, **changes):
    """A network of hundreds of layers, as long as ResNet-152 and DenseNet-201 together."""
    layers, groups = [], []
    for i in range(count):
        name = f"features.denseblock{1 + 8 * i // count}.denselayer{i}.conv{1 + i % 2}"
        wide = 2_048 if i == count // 2 else 64 + i
        macs = 10**6 * (1 + i % 7)
        layers.append(LayerRow(name, "conv", wide, wide // 2, macs, macs // 3, 9 * wide, 4 * wide))
        layers.append(LayerRow(f"{name}.norm", "norm", wide, wide // 2, 0, 0, 2 * wide, wide))
        members = tuple(f"features.x{k}.norm.weight" for k in range(i, count))
        groups.append(GroupRow(name, wide, wide // 2, members))
    layers.append(LayerRow("classifier", "linear", 1000, 1000, 2**20, 2**19, 2**20, 2**19))
    frozen = [Note(f"view_{i}", f"reason {i % 3}") for i in range(count)]
    notes = [f"note number {i}" for i in range(5)]
    return sample(layers=layers, groups=groups, frozen=frozen, notes=notes, **changes)


@dataclass(frozen=True)
class Scanned:
    """A scan of sensitivity as tables and pages see it."""

    curves: tuple[Curve, ...]
    model: str = "CifarResNet"
    baseline: float = 0.93

    def propose(self, drop=0.01):
        first = self.curves[0].method if self.curves else ""
        found = {}
        for c in self.curves:
            able = [p.ratio for p in c.points if p.score >= self.baseline - drop]
            if c.method == first and able:
                found[c.name] = max(able)
        return found


def scan(names=None, methods=("l1 smallest", "l1 random", "l1 largest"), worst=0.8, top=0.93):
    """Curves that fall the faster, the later the method; the first group falls the most."""
    names = names or ["conv1", *(f"layer{1 + i // 9}.{i % 9}.conv1" for i in range(27))]
    ratios = [k / 10 for k in range(1, 10)]
    curves = [
        Curve(
            name,
            64,
            method,
            tuple(
                Point(r, round(64 * (1 - r)), top - worst * min(r ** (3 - m) / (1 + i), 1))
                for r in ratios
            ),
        )
        for m, method in enumerate(methods)
        for i, name in enumerate(names)
    ]
    return Scanned(tuple(curves), baseline=top)


def scan_page(scanned, drop=0.01, **changes):
    """The page of a scan; `changes` replace arguments."""
    options = {"title": "Sensitivity of CifarResNet", "baseline": scanned.baseline}
    options |= {"curves": scanned.curves, "proposals": scanned.propose(drop), "drop": drop}
    return sensitivity_page(**{**options, **changes})
