"""The law: a pruned network equals the original with its removed inputs set to zero.

Random networks with every coupling, float64, 1e-9 relative, two batch and two spatial sizes; the
masked original, the sliced tensors and the MACs all come from `oracle`, which shares no code with
the package.
"""

import os
import random

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from oracle import flops, masked, relative_error, sliced_state
from strategies import ALL_FEATURES, FREEZING, build, nets

import fxprune
from fxprune.cost import Cost
from fxprune.groups import Analysis
from fxprune.selection import write_plan

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


def check(net, seed):
    """A budget and a random plan on one network."""
    x = net.example_input()
    analysis = fxprune.analyze(net, x)
    if not analysis.groups:
        with pytest.raises(fxprune.PlanError, match="nothing can be pruned"):
            fxprune.compile(net, x)
        return analysis
    plan = random_plan(analysis, seed)
    assert_law(net, plan, fxprune.apply(net, fxprune.Plan.from_json(plan.to_json()), x))
    try:
        pruned = fxprune.compile(net, x, budget=0.5)
    except fxprune.PlanError as error:
        assert "budget cannot be reached" in str(error)
    else:
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
