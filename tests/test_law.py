"""The law: a pruned network equals the original with its removed inputs set to zero.

Random networks with every coupling, float64, 1e-9 relative, two batch and two spatial sizes; the
masked original, the sliced tensors and the MACs all come from `oracle`, which shares no code with
the package.
"""

import itertools
import os
import random

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from oracle import flops, masked, relative_error, sliced_state
from strategies import ALL_FEATURES, FREEZING, build, nets
from torch import nn

import fxprune
from fxprune.cost import Cost
from fxprune.groups import Analysis
from fxprune.planning import write_plan

BOUND = 1e-9


def random_plan(analysis: Analysis, seed: int, share: float = 0.4) -> fxprune.Plan:
    """A plan that removes each class with probability `share`, and empties no piece."""
    rng = random.Random(seed)
    keep = analysis.everything()
    for group in analysis.groups:
        for c in group.classes:
            keep[c] = rng.random() >= share
    for piece in analysis.pieces:
        if not keep[piece].any():
            keep[rng.choice(piece.tolist())] = True
    return write_plan(analysis, keep, Cost.of(analysis), method={"name": "random"})


def assert_law(net, plan, pruned):
    """Outputs, tensors and MACs are what the plan says."""
    document = plan.to_dict()
    reference = masked(net, document)
    for x in net.inputs():
        assert relative_error(reference(x), pruned(x)) <= BOUND
    expected = sliced_state(net, document)
    for name, t in pruned.state_dict().items():
        assert torch.equal(t, expected[name]), name
    assert flops(pruned, net.example_input()) == plan.metrics["macs_after"]
    assert sum(p.numel() for p in pruned.parameters()) == plan.metrics["params_after"]


def half(net, x, scope):
    """The network at half its MACs, or None where what is frozen costs more than that."""
    try:
        return fxprune.compile(net, x, budget=0.5, scope=scope)
    except fxprune.PlanError as error:
        if "budget cannot be reached" not in str(error):
            raise
        return None


def check_plan(net, analysis, seed):
    """A random plan, from its JSON, on one network."""
    plan = random_plan(analysis, seed)
    pruned = fxprune.apply(net, fxprune.Plan.from_json(plan.to_json()), net.example_input())
    assert_law(net, plan, pruned)


def check(net, seed):
    """A budget and a random plan on one network; by dimensions of heads too, where there are any."""
    x = net.example_input()
    analysis = fxprune.analyze(net, x)
    if not analysis.groups:
        with pytest.raises(fxprune.PlanError, match="nothing can be pruned"):
            fxprune.compile(net, x)
        return analysis
    check_plan(net, analysis, seed)
    scope = "all"
    if seed % 2 and any(group.kind == "heads" for group in analysis.groups):
        by_dims = fxprune.analyze(net, x, scope=["all", "head-dims"])
        if any(group.kind == "head-dims" for group in by_dims.groups):
            check_plan(net, by_dims, seed)
            scope = ["all", "head-dims"]
    pruned = half(net, x, scope)
    if pruned is not None:
        assert pruned.plan.metrics["macs_after"] <= 0.5 * pruned.plan.metrics["macs_before"]
        assert_law(net, pruned.plan, pruned)
    return analysis


@given(net=nets(), seed=st.integers(0, 99))
def test_random_networks_obey_the_law(net, seed):
    note(repr(net))
    check(net, seed)


@pytest.mark.parametrize("feature", [f for f in ALL_FEATURES if f not in FREEZING])
def test_every_coupling_obeys_the_law(feature):
    cut = 0
    for seed in range(3 if os.environ.get("FXPRUNE_PROFILE") != "long" else 20):
        net = build(seed, require={feature}, exclude=FREEZING, max_blocks=4)
        cut += len(check(net, seed).groups)
    assert cut, "nothing was cut in any of these networks: the law held trivially"


@pytest.mark.parametrize("feature", sorted(FREEZING))
def test_what_mixes_channels_freezes_and_says_why(feature):
    net = build(1, require={feature}, max_blocks=2)
    analysis = fxprune.analyze(net, net.example_input())
    assert [node for node in analysis.frozen if node != "output"]
    check(net, 1)


class Excursion(nn.Module):
    """A permute leaves channels-last strides, which one channel carries into a later view."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.mix = nn.Linear(4, 4)
        self.conv = nn.Conv2d(4, 5, 1)
        self.pool = nn.AdaptiveAvgPool2d(3)
        self.fc = nn.Linear(45, 2)

    def forward(self, x):
        y = self.mix(self.stem(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        y = self.pool(self.conv(y.contiguous()))
        return self.fc(y.view(-1, 45))


def test_views_survive_the_strides_that_one_channel_leaves():
    net = Excursion().double()
    x = torch.randn(2, 3, 8, 8).double()
    analysis = fxprune.analyze(net, x)
    for stem, mix in itertools.product(([1], [0, 2]), ([3], [1, 2])):
        plan = analysis.plan({"stem": stem, "mix": mix})
        pruned = fxprune.apply(net, plan, x)
        assert relative_error(masked(net, plan.to_dict())(x), pruned(x)) <= BOUND
