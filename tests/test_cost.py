"""Closed-form costs: after any cut they equal what torch counts on the network that is left."""

import random

import pytest
import torch
import torchvision
from hypothesis import given, note, settings
from hypothesis import strategies as st
from oracle import flops
from strategies import nets
from torch import nn

import fxprune
from fxprune import zoo
from fxprune.cost import Cost, macs, thop
from fxprune.planning import write_plan


def parameters(model):
    return sum(p.numel() for p in model.parameters())


def random_keep(analysis, rng, share=None):
    """A mask that removes each class with one probability, and empties no piece."""
    share = rng.uniform(0.1, 0.9) if share is None else share
    keep = analysis.everything()
    for group in analysis.groups:
        for c in group.classes:
            keep[c] = rng.random() >= share
    for piece in analysis.pieces:
        if not keep[piece].any():
            keep[rng.choice(piece.tolist())] = True
    return keep


def check(model, x, seed, cuts):
    analysis = fxprune.analyze(model, x)
    cost = Cost.of(analysis)
    whole = analysis.everything()
    assert cost.macs(whole) == flops(model, x) == macs(model, (x,))
    rng = random.Random(seed)
    for _ in range(cuts):
        keep = random_keep(analysis, rng)
        plan = write_plan(analysis, keep, cost, method={"name": "random"})
        pruned = fxprune.apply(model, plan, x)
        assert cost.macs(keep) == plan.metrics["macs_after"] == flops(pruned, x)
        assert cost.params(keep) == plan.metrics["params_after"] == parameters(pruned)
        assert cost.macs(keep) <= cost.macs(whole)
        assert cost.params(keep) <= cost.params(whole)


@settings(max_examples=max(settings.default.max_examples // 2, 10))
@given(net=nets(), seed=st.integers(0, 99))
def test_random_networks(net, seed):
    note(repr(net))
    check(net, net.example_input(), seed, cuts=2)


@given(net=nets(max_blocks=4))
@settings(max_examples=max(settings.default.max_examples // 4, 10))
def test_costs_are_per_sample(net):
    note(repr(net))
    one = net.example_input()
    x = torch.cat([one, one, one])
    single, batch = (fxprune.analyze(net, v) for v in (one, x))
    a, b = Cost.of(single), Cost.of(batch)
    assert a.macs(single.everything()) == b.macs(batch.everything()) == flops(net, x)
    assert a.params(single.everything()) == b.params(batch.everything())


@pytest.mark.parametrize("batch", [1, 2])
def test_resnet18(batch):
    check(torchvision.models.resnet18().eval(), torch.randn(batch, 3, 64, 64), seed=0, cuts=4)


@pytest.mark.parametrize("mode", [True, False])
def test_the_mode_does_not_matter_and_stays(mode):
    model = torchvision.models.mobilenet_v2().train(mode)
    model.features[0].eval()
    flags = [m.training for m in model.modules()]
    assert macs(model, (torch.randn(1, 3, 224, 224),)) == 300_774_272
    assert [m.training for m in model.modules()] == flags


@pytest.mark.parametrize(
    ("name", "total", "with_norms", "params"),
    [
        ("resnet20", 40_551_040, 40_927_872, 269_722),
        ("resnet32", 68_862_592, 69_468_800, 464_154),
        ("resnet56", 125_485_696, 126_550_656, 853_018),
        ("resnet110", 252_887_680, 254_984_832, 1_727_962),
    ],
)
def test_cifar_resnets(name, total, with_norms, params):
    """Convolutions and the last linear, as He et al. 2016 and Li et al. 2017 count them; and as thop."""
    model, x = zoo.build(name).eval(), torch.randn(2, 3, 32, 32)
    analysis = fxprune.analyze(model, x)
    cost = Cost.of(analysis)
    assert cost.macs(analysis.everything()) == macs(model, (x,)) == total
    assert cost.params(analysis.everything()) == params
    assert thop(model, (x,)) == with_norms


def test_params_count_what_the_graph_uses():
    """An auxiliary head that exists only in training is neither kept nor counted."""
    model = torchvision.models.googlenet(init_weights=False).eval()
    pruned = fxprune.compile(model, torch.randn(1, 3, 64, 64), budget=0.5, progress=False)
    aux = parameters(model.aux1) + parameters(model.aux2)
    assert pruned.plan.metrics["params_before"] == parameters(model) - aux
    assert pruned.plan.metrics["params_after"] == parameters(pruned)


class Attention(nn.Module):
    """Matrix products between activations: no rule cuts them, and all of them count."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):  # [N, T, 8]
        q, k, v = self.qkv(x).chunk(3, -1)
        y = torch.softmax(q @ k.transpose(1, 2) / 8**0.5, -1) @ v
        return self.second(self.first(x + y).relu())


@pytest.mark.parametrize("batch", [1, 4])
def test_products_of_activations_count(batch):
    model, x = Attention().double().eval(), torch.randn(batch, 5, 8, dtype=torch.float64)
    analysis = fxprune.analyze(model, x)
    expected = 5 * 8 * 24 + 2 * 5 * 5 * 8 + 2 * 5 * 8 * 16
    assert Cost.of(analysis).macs(analysis.everything()) == macs(model, (x,)) == expected
    check(model, x, seed=1, cuts=2)


def test_transposed_grouped_and_strided_convolutions():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.Conv2d(8, 12, 3, groups=4, dilation=2, padding=2),
        nn.ConvTranspose2d(12, 6, 4, stride=2, padding=1, groups=2),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.Flatten(),
        nn.LazyLinear(5),
    ).double().eval()  # fmt: skip
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    net(x)
    check(net, x, seed=3, cuts=8)


def test_a_layer_called_twice_costs_twice_and_is_held_once():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.body, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 2, 1)  # fmt: skip

        def forward(self, x):
            return self.head(self.body(self.body(self.stem(x)).relu()))

    net, x = Net().double().eval(), torch.randn(1, 3, 5, 5, dtype=torch.float64)
    analysis = fxprune.analyze(net, x)
    assert Cost.of(analysis).macs(analysis.everything()) == 25 * (18 + 2 * 6 * 6 * 9 + 12)
    assert Cost.of(analysis).params(analysis.everything()) == parameters(net)
    check(net, x, seed=0, cuts=4)
