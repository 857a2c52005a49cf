"""What every registered one-shot method must do, whatever its paper says."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from oracle import flops, masked, relative_error
from strategies import FREEZING, build

import fxprune
from fxprune.config import REGISTRY, resolve

SEEDS = (3, 11, 24)
METHODS = sorted(name for name, known in REGISTRY.items() if hasattr(known.config(), "ratio"))

every_method = pytest.mark.parametrize("name", METHODS)
every_net = pytest.mark.parametrize("seed", SEEDS)


def network(seed):
    return build(seed, exclude=FREEZING, max_blocks=5)


def config(name, ratio):
    return dataclasses.replace(REGISTRY[name].config(), ratio=ratio)


def compiled(net, method, **options):
    return fxprune.compile(net, net.example_input(), method=method, progress=False, **options)


def kept_of(analysis, plan):
    """Per group: how many of its classes the plan keeps."""
    keep = {}
    for slot in analysis.slots:
        classes = analysis.classes(slot.ids)
        kept = plan.keep(slot.tensor, slot.dim)
        stays = np.isin(np.arange(slot.size), kept) if kept is not None else np.ones(slot.size)
        keep |= dict(zip(classes.tolist(), stays.tolist(), strict=True))
    return [sum(bool(keep[c]) for c in group.classes.tolist()) for group in analysis.groups]


def test_there_is_something_to_test():
    assert "l1" in METHODS


@every_net
def test_the_networks_can_be_cut(seed):
    net = network(seed)
    assert len(fxprune.analyze(net, net.example_input()).groups) >= 2


@every_method
@every_net
def test_the_same_plan_twice(name, seed):
    first, second = (compiled(network(seed), name).plan.to_json() for _ in range(2))
    assert first == second


@every_method
@every_net
def test_ratio_0_is_the_identity(name, seed):
    net = network(seed)
    pruned = compiled(net, config(name, 0.0))
    assert pruned.plan.slices == ()
    for key, t in pruned.state_dict().items():
        assert torch.equal(t, net.state_dict()[key])
    for x in net.inputs():
        assert relative_error(net(x), pruned(x)) == 0


@every_method
@every_net
@pytest.mark.parametrize("ratio", [0.29, 0.5, 0.999])
def test_the_ratio_is_the_share_that_goes(name, seed, ratio):
    """int(C * (1 - ratio)) stay, at least one; more only where every piece of a split needs one."""
    net = network(seed)
    analysis = fxprune.analyze(net, net.example_input())
    plan = compiled(net, config(name, ratio)).plan
    for group, kept in zip(analysis.groups, kept_of(analysis, plan), strict=True):
        expected = max(math.floor((1 - ratio) * len(group) + 1e-9), 1)
        pieces = sum(bool(np.isin(group.classes, piece).any()) for piece in analysis.pieces)
        assert kept == expected or expected < kept <= pieces, group.name
    assert plan.to_dict()["method"]["ratio"] == ratio


@every_method
@every_net
@pytest.mark.parametrize("budget", [0.7, fxprune.Budget(params=0.6), fxprune.Budget(0.8, 0.5)])
def test_the_budget_holds(name, seed, budget):
    net = network(seed)
    pruned = compiled(net, name, budget=budget)
    m = pruned.plan.metrics
    limits = budget.to_dict() if isinstance(budget, fxprune.Budget) else {"macs": budget}
    assert dict(pruned.plan.budget) == limits
    for key, share in limits.items():
        assert m[f"{key}_after"] <= share * m[f"{key}_before"]
    assert m["macs_after"] == flops(pruned, net.example_input())
    assert m["params_after"] == sum(p.numel() for p in pruned.parameters())


@every_method
@every_net
def test_plans_are_valid_and_pure_data(name, seed):
    net = network(seed)
    plan = compiled(net, config(name, 0.6)).plan
    state = net.state_dict()
    assert plan.slices
    assert fxprune.Plan.from_json(plan.to_json()) == plan
    assert len({(s.tensor, s.dim) for s in plan.slices}) == len(plan.slices)
    for s in plan.slices:
        assert list(s.keep) == sorted(set(s.keep))
        assert 0 <= s.keep[0] <= s.keep[-1] < s.size
        assert len(s.keep) < s.size
        assert s.size % state[s.tensor].shape[s.dim] == 0
        assert s.role in ("in", "out")


@every_method
@every_net
def test_the_law_holds_and_the_model_is_unchanged(name, seed):
    net = network(seed)
    before = copy.deepcopy(net)
    flags = [m.training for m in net.modules()]
    pruned = compiled(net, config(name, 0.5))
    for key, t in net.state_dict().items():
        assert torch.equal(t, before.state_dict()[key]), key
    assert [m.training for m in net.modules()] == flags
    assert all(p.grad is None for p in net.parameters())
    reference = masked(before, pruned.plan.to_dict())
    for x in net.inputs():
        assert relative_error(reference(x), pruned(x)) <= 1e-9
    again = fxprune.apply(
        before, fxprune.Plan.from_json(pruned.plan.to_json()), net.example_input()
    )
    for x in net.inputs():
        assert relative_error(pruned(x), again(x)) == 0


@every_method
@every_net
def test_a_callable_with_the_same_scores_gives_the_same_cut(name, seed):
    net = network(seed)
    scores = resolve(name).scores
    groups = []

    def custom(group, weights):
        groups.append(group)
        assert all(len(w) == len(group) for w in weights)
        return scores(group, weights)

    named, called = compiled(net, name), compiled(net, custom)
    assert called.plan.slices == named.plan.slices
    assert groups
    assert called.plan.method["name"] == "custom"


@every_method
def test_a_bad_weight_is_refused(name):
    net = network(SEEDS[0])
    with torch.no_grad():
        next(net.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(fxprune.PlanError, match="NaN or infinite"):
        compiled(net, name)


@every_method
def test_the_config_is_frozen_and_checked(name):
    made = config(name, 0.5)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.ratio = 0.1
    with pytest.raises(TypeError):
        type(made)(0.5)  # keyword-only
    for ratio in (-0.1, 1.0, float("nan")):
        with pytest.raises(fxprune.OptionError, match="ratio"):
            config(name, ratio)
    with pytest.raises(fxprune.OptionError, match="both a budget and a ratio"):
        compiled(network(SEEDS[0]), made, budget=0.5)
