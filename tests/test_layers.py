"""Rows of layers: they add up to the network's own costs, exactly, whatever the network."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import assume, given, note, settings
from hypothesis import strategies as st
from oracle import flops
from strategies import nets
from test_cost import parameters, random_keep
from torch import nn

import fxprune
from fxprune.cost import Cost
from fxprune.layers import _apportioned, layer_rows
from fxprune.planning import write_plan

COUNTS = ("macs_before", "macs_after", "params_before", "params_after")
X = torch.randn(2, 3, 8, 8, dtype=torch.float64)


def total(rows, what):
    return sum(getattr(row, what) for row in rows)


def check(pruned):
    """The rows of a report add up to its metrics, and those are the network's."""
    report = pruned.report
    names = [row.name for row in report.layers]
    assert len(names) == len(set(names))
    for what in COUNTS:
        assert total(report.layers, what) == report.metrics[what], what
    for row in report.layers:
        assert 0 <= row.macs_after <= row.macs_before
        assert 0 <= row.channels_after <= row.channels_before
        assert row.params_after >= 0
    return {row.name: row for row in report.layers}


@settings(max_examples=max(settings.default.max_examples // 2, 10))
@given(net=nets(), seed=st.integers(0, 99))
def test_rows_add_up(net, seed):
    note(repr(net))
    x = net.example_input()
    analysis = fxprune.analyze(net, x)
    keep = random_keep(analysis, random.Random(seed))
    plan = write_plan(analysis, keep, Cost.of(analysis), method={"name": "random"})
    pruned = fxprune.apply(net, plan, x)
    rows = check(pruned)
    assert total(rows.values(), "macs_after") == flops(pruned, x)
    assert total(rows.values(), "params_after") == parameters(pruned)
    by_target = dict(pruned.named_modules())
    for name, row in rows.items():
        module = by_target.get(name)
        if isinstance(module, nn.Conv2d | nn.Linear) and row.kind in ("conv", "linear"):
            width = module.out_channels if isinstance(module, nn.Conv2d) else module.out_features
            assert row.channels_after == width


@settings(max_examples=max(settings.default.max_examples // 8, 10))
@given(net=nets(max_blocks=5), seed=st.integers(0, 99))
def test_rows_of_later_cuts_start_at_the_first_original(net, seed):
    note(repr(net))
    x, rng = net.example_input(), random.Random(seed)
    network, first = net, None
    for _ in range(2):
        analysis = fxprune.analyze(network, x)
        keep = random_keep(analysis, rng, 0.3)
        plan = write_plan(analysis, keep, Cost.of(analysis), method={"name": "random"})
        network = fxprune.apply(network, plan, x)
        rows = check(network)
        first = first or rows
        assert [r.name for r in first.values()] == [r.name for r in rows.values()]
        assert total(rows.values(), "macs_before") == flops(net, x)
        for name, row in rows.items():
            assert row.channels_before == first[name].channels_before


@settings(max_examples=max(settings.default.max_examples // 8, 10))
@given(net=nets(max_blocks=4))
def test_rows_after_folding(net):
    note(repr(net))
    x = net.example_input()
    assume(fxprune.analyze(net, x).groups)
    options = {"method": fxprune.methods.L1(ratio=0.3), "verify": False, "progress": False}
    pruned = fxprune.compile(net, x, fold=True, **options)
    rows = check(pruned)
    assert total(rows.values(), "params_after") == parameters(pruned)
    if fxprune.analyze(pruned, x).groups:
        check(fxprune.compile(pruned, x, **options))


def test_a_folded_batch_norm_is_told_with_nothing_left():
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
    pruned = fxprune.compile(
        net.double().eval(), X, method=fxprune.methods.L1(ratio=0.5), fold=True, progress=False
    )
    rows = check(pruned)
    assert (rows["1"].params_before, rows["1"].params_after) == (16, 0)
    assert (rows["0"].params_before, rows["0"].params_after) == (216, 108 + 4)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vit_b_16", "swin_t", "googlenet"])
def test_real_networks(name):
    size = 64
    options = {"googlenet": {"init_weights": False}, "vit_b_16": {"image_size": size}}
    model = getattr(torchvision.models, name)(**options.get(name, {})).eval()
    x = torch.randn(1, 3, size, size)
    analysis = fxprune.analyze(model, x)
    keep = random_keep(analysis, random.Random(0))
    cost, whole = Cost.of(analysis), analysis.everything()
    rows = layer_rows(analysis, keep)
    assert total(rows, "macs_before") == cost.macs(whole) == flops(model, x)
    assert total(rows, "macs_after") == cost.macs(keep)
    assert total(rows, "params_before") == cost.params(whole)
    assert total(rows, "params_after") == cost.params(keep)
    kinds = {row.kind for row in rows}
    assert kinds >= {"conv", "linear", "norm"}
    assert ("depthwise" in kinds) == (name == "mobilenet_v2")
    assert ("attention" in kinds) == (name == "vit_b_16")  # swin multiplies by hand
    assert ("product" in kinds) == (name == "swin_t")


def test_resnet18_row_by_row():
    model = torchvision.models.resnet18().eval()
    x = torch.randn(1, 3, 224, 224)
    plan = fxprune.analyze(model, x).plan({"layer1.0.conv1": range(48)})
    rows = check(fxprune.apply(model, plan, x))
    assert list(rows)[:4] == ["conv1", "bn1", "layer1.0.conv1", "layer1.0.bn1"]
    first = rows["layer1.0.conv1"]
    assert (first.kind, first.channels_before, first.channels_after) == ("conv", 64, 48)
    assert (first.macs_before, first.macs_after) == (115_605_504, 86_704_128)
    assert (first.params_before, first.params_after) == (36_864, 27_648)
    second = rows["layer1.0.conv2"]  # its inputs went
    assert (second.channels_before, second.channels_after) == (64, 64)
    assert second.macs_after == 86_704_128
    assert rows["fc"].macs_before == rows["fc"].macs_after == 512_000


class Shared(nn.Module):
    """One convolution under two names, called three times; a weight that two layers share."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.body = nn.Conv2d(6, 6, 3, padding=1)
        self.alias = self.body
        self.twin = nn.Conv2d(6, 6, 3, padding=1)
        self.twin.weight = self.body.weight
        self.head = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.alias(self.body(self.body(self.stem(x))).relu())
        return self.head(self.twin(x))


def test_shared_modules_and_weights_are_one_row():
    net = Shared().double().eval()
    rows = check(fxprune.compile(net, X, method=fxprune.methods.L1(ratio=0.5), progress=False))
    assert list(rows) == ["stem", "body", "head"]
    assert rows["body"].macs_before == 4 * 64 * 6 * 6 * 9
    assert rows["body"].macs_after == 4 * 64 * 3 * 3 * 9
    assert rows["body"].params_before == 6 * 6 * 9 + 2 * 6  # one weight, two biases
    assert rows["body"].channels_after == 3


class Functional(nn.Module):
    """Weights that are no layer's: plain, computed, multiplied, added."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 1)
        self.block = nn.Module()
        self.block.weight = nn.Parameter(torch.randn(8, 6, 3, 3))
        self.block.bias = nn.Parameter(torch.randn(8))
        self.standard = nn.Conv2d(8, 8, 3)
        self.gain = nn.Parameter(torch.randn(8, 1, 1, 1))
        self.matrix = nn.Parameter(torch.randn(8, 5))
        self.shift = nn.Parameter(torch.randn(5))
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, x):
        x = F.conv2d(self.stem(x), self.block.weight, self.block.bias).relu()
        w = self.standard.weight
        x = F.conv2d(x, (w - w.mean((1, 2, 3), keepdim=True)) * self.gain, self.standard.bias)
        x = F.batch_norm(x, self.scale.detach() * 0, self.scale.detach() * 0 + 1, self.scale)
        return x.mean((2, 3)) @ self.matrix + self.shift


def test_functional_layers_own_what_their_weights_are_made_of():
    net = Functional().double().eval()
    rows = check(fxprune.compile(net, X, method=fxprune.methods.L1(ratio=0.5), progress=False))
    assert {name: row.kind for name, row in rows.items()} == {
        "stem": "conv",
        "block": "conv",
        "standard.weight": "conv",
        "matrix": "linear",
        "scale": "norm",
        "shift": "other",
    }
    assert rows["block"].channels_before == 8
    assert rows["standard.weight"].params_before == 8 * 8 * 9 + 8 + 8
    assert rows["standard.weight"].macs_before == 4 * 4 * 8 * 8 * 9
    assert (rows["matrix"].channels_before, rows["matrix"].macs_before) == (5, 40)


class Attention(nn.Module):
    """Products of activations, one of them called like a module."""

    def __init__(self):
        super().__init__()
        self.matmul = nn.Linear(8, 24)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        q, k, v = self.matmul(x).chunk(3, -1)
        y = torch.matmul(torch.softmax(torch.matmul(q, k.transpose(1, 2)), -1), v)
        return self.second(self.first(x + y).relu())


def test_products_of_activations_have_rows_of_their_own():
    net, x = Attention().double().eval(), torch.randn(3, 5, 8, dtype=torch.float64)
    method = fxprune.methods.L1(ratio=0.5)
    pruned = fxprune.compile(net, x, method=method, progress=False)
    rows = check(pruned)
    products = [row for row in rows.values() if row.kind == "product"]
    assert [row.macs_before for row in products] == [5 * 5 * 8] * 2
    assert all(row.params_before == row.channels_before == 0 for row in products)
    assert rows["matmul"].kind == "linear"
    later = check(fxprune.compile(pruned, x, method=method, progress=False))
    assert list(later) == list(rows)
    assert later["first"].channels_before == 16
    assert later["first"].channels_after == 4


class ByHand(nn.Module):
    """Attention whose dropout follows the mode: the first cut makes a module of the call."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.out = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)
        self.w, self.b = nn.Parameter(torch.randn(24, 8)), nn.Parameter(torch.randn(24))

    def forward(self, x):
        out = self.out.weight, self.out.bias
        y, _ = F.multi_head_attention_forward(
            x, x, x, 8, 2, self.w, self.b, None, None, False, 0.1, *out,
            training=self.training, need_weights=False,
        )  # fmt: skip
        return self.second(self.first(y).relu())


def test_attention_that_follows_the_mode_counts_after_a_cut_too():
    net, x = ByHand().double().eval(), torch.randn(5, 2, 8, dtype=torch.float64)
    method = fxprune.methods.L1(ratio=0.5)
    first = fxprune.compile(net, x, method=method, progress=False)
    second = fxprune.compile(first, x, method=method, progress=False)
    for pruned in (first, second):
        rows = check(pruned)
        assert total(rows.values(), "macs_after") == flops(pruned, x)
        assert [row.kind for row in rows.values()] == ["attention", "linear", "linear"]


class Unshared(nn.Module):
    """A product without a batch axis: its multiply-adds per sample are no whole number."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.fc = nn.Linear(4, 3)
        self.position = nn.Parameter(torch.randn(5, 4))

    def forward(self, x):
        return self.conv(x).mean((2, 3)) @ self.fc(self.position).mean(0, keepdim=True).T.repeat(4, 1)[:4]  # fmt: skip


def test_fractions_still_add_up():
    x = torch.randn(7, 3, 4, 4, dtype=torch.float64)
    model = Unshared().double().eval()
    analysis = fxprune.analyze(model, x)
    rows = layer_rows(analysis, analysis.everything())
    assert total(rows, "macs_before") == Cost.of(analysis).macs(analysis.everything())
    assert all(isinstance(row.macs_before, int) for row in rows)


def test_a_saved_network_has_its_rows_again(tmp_path):
    model = torchvision.models.resnet18().eval()
    pruned = fxprune.compile(model, torch.randn(1, 3, 64, 64), budget=0.5, progress=False)
    fxprune.save(pruned, tmp_path / "net.safetensors")
    again = fxprune.load(tmp_path / "net.safetensors", torchvision.models.resnet18())
    check(again)
    assert again.report.layers == pruned.report.layers
    assert again.report.options == pruned.report.options


def test_apportioned_costs_add_up():
    rng = np.random.default_rng(0)
    for _ in range(3000):
        n = rng.integers(1, 6)
        parts = rng.integers(0, 9, (2, n)) / rng.integers(1, 5)  # halves, thirds, quarters
        parts *= rng.random(n) < 0.7
        total = sum(round(float(p.sum())) for p in parts)  # two sums, rounded on their own
        costs = parts.sum(0)
        whole = _apportioned(costs, total)
        assert sum(whole) == total
        assert min(whole) >= 0
        assert all(w == 0 for w, c in zip(whole, costs, strict=True) if c == 0)
        assert np.abs(np.array(whole) - costs).max() <= 1.5
    assert _apportioned(np.array([0.0, 1.0]), 0) == [0, 0]
    assert _apportioned(np.array([0.4, 0.0, 0.6]), 1) == [0, 0, 1]


class HalfPerSample(nn.Module):
    """With a batch of two, what does not depend on the input counts half per sample."""

    def __init__(self, rows):
        super().__init__()
        self.t = nn.Parameter(torch.randn(1, 3))
        self.u = nn.Parameter(torch.randn(rows, 3))
        self.q, self.k = nn.Linear(3, 5), nn.Linear(4, 5)
        self.o, self.p, self.r = nn.Linear(5, 3), nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        fixed = self.q(self.t) + torch.matmul(self.u, self.q.weight.t()).sum(0)
        return self.r(torch.relu(self.p(self.o(torch.relu(self.k(x)) + fixed))))


@pytest.mark.parametrize("rows", [1, 3, 5, 7])
def test_rows_add_up_where_layers_count_in_halves(rows):
    torch.manual_seed(0)
    method = fxprune.methods.L1(ratio=0.5)
    pruned = fxprune.compile(HalfPerSample(rows).eval(), torch.randn(2, 4), method=method)
    layers = pruned.report.layers
    for what in ("macs_before", "macs_after"):
        assert total(layers, what) == pruned.report.metrics[what]
        assert all(getattr(row, what) >= 0 for row in layers)
