"""How numbers, names and methods are written."""

import math

import pytest
from rich.cells import cell_len

import fxprune
from fxprune.views import words


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "l1"),
        ({"name": "l1", "ratio": None, "order": "smallest"}, "L1, smallest first"),
        (
            {"name": "l1", "ratio": None, "preset": "ResNet-56-A", "order": "smallest"},
            "L1, smallest first, preset ResNet-56-A",
        ),
        ({"name": "l1", "ratio": 0.3, "order": "random"}, "L1, random first, 30 % of every group"),
        (
            {"ratio": {"layer1.*": 0.3, "layer2.*": 0.55}, "norm": "l2", "steps": 4},
            "L1, 2-norm, in 4 steps, 30 % of layer1.* and 55 % of layer2.*",
        ),
        (
            {"ratio": {f"layer{i}": i / 100 for i in range(10, 60)}},
            "L1, 10 to 59 % of 50 named parts",
        ),
        ({"by": "mean-std", "samples": 512}, "L1, by mean-std, 512 samples"),
        ({"scoring": "greedy", "global": True, "cache": False}, "L1, greedy scores, global, no cache"),
        ({"deep": {"a": [1]}, "list": [1, 2], "x_y": 3}, "L1, deep with 1 value, list with 2 values, x y 3"),
    ],
)  # fmt: skip
def test_a_method_is_one_line(options, said):
    assert words.method_line("l1", options) == said


def test_a_method_of_ones_own_is_named():
    line = words.method_line("custom", {"name": "custom", "callable": "my_scores"})
    assert line == "custom (my_scores)"


@pytest.mark.parametrize("value", [None, [], {}, 3, "x", {"a": "b"}, {"a": None}, math.nan])
@pytest.mark.parametrize("key", ["ratio", "order", "norm", "steps", "by", "x"])
def test_any_json_is_a_line(key, value):
    """The record of a plan is whatever its JSON holds."""
    line = words.method_line("l1", {key: value})
    assert line.startswith("L1")
    assert "\n" not in line


def test_what_compile_records_is_a_line():
    import torch
    from torch import nn

    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    method = fxprune.methods.L1(ratio=0.5, order="largest")
    report = fxprune.compile(net, torch.randn(1, 3, 8, 8), method=method, progress=False).report
    assert report.how == "L1, largest first, 50 % of every group"
    assert "pruned by L1, largest first, 50 % of every group" in str(report)


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "0"), (999, "999"), (1000, "1.00 k"), (12_345, "12.3 k"), (999_999, "1.00 M"), (2.5e12, "2.50 T")],
)  # fmt: skip
def test_si(number, said):
    assert words.si(number) == said


@pytest.mark.parametrize("most", [4, 9, 20])
@pytest.mark.parametrize("name", ["a" * 50, "層" * 50, "a\tb" * 20, "x"])
def test_short_names_fit(name, most):
    assert cell_len(words.short(name, most)) <= most
    assert words.short("x", most) == "x"


def test_drops():
    assert words.dropped(0.01, True) == "1 point"
    assert words.dropped(0.005, True) == "0.5 points"
    assert words.dropped(0.25, False) == "0.25"


@pytest.mark.parametrize("ratio", [10**400, {"a": 10**400}, float("nan"), -1])
def test_a_ratio_that_is_no_share_is_shown_as_it_is(ratio):
    assert "%" not in words.method_line("l1", {"ratio": ratio})
