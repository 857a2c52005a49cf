"""The random networks are valid, alive, distinct in every element, and reach every feature."""

from functools import cache

import blocks
import pytest
import torch
from blocks import Net
from hypothesis import Phase, find, given, settings
from strategies import ALL_FEATURES, FREEZING, GLUE, build, nets
from torch import Tensor
from torch.fx import symbolic_trace
from torch.utils._pytree import tree_leaves, tree_structure

SEEDS = range(400)
ANY_SEED = settings(max_examples=50)  # drawing is what is tested here, and SEEDS do most of it


@cache
def drawn(seed: int) -> Net:
    return build(seed)


def outputs(net: torch.nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return tree_leaves(net(x))


def check_runs(net: Net) -> None:
    """Both inputs; float64; finite, not constant, and different for different images."""
    small, large = net.inputs()
    assert torch.equal(small, net.example_input())
    assert (len(small), len(large)) == (1, 3)
    assert small.shape[2:] != large.shape[2:]
    for x in (small, large):
        for out in outputs(net, x):
            assert out.dtype == torch.float64
            assert len(out) == len(x)
            assert out.isfinite().all()
            assert out.std() > 1e-6
            assert out.abs().max() < 1e4
    assert all((out[1:] - out[:1]).abs().max() > 1e-6 for out in outputs(net, large))


def check_traces(net: Net) -> None:
    traced = symbolic_trace(net)
    for x in net.inputs():
        assert tree_structure(traced(x)) == tree_structure(net(x))
        for a, b in zip(outputs(net, x), outputs(traced, x), strict=True):
            assert torch.equal(a, b)


def check_values(net: Net) -> None:
    for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
        if tensor.is_floating_point():
            assert tensor.dtype == torch.float64, name
            assert tensor.unique().numel() == tensor.numel(), name
            assert tensor.ne(0).all(), name
        if name.endswith("running_var"):
            assert tensor.min() >= 0.05, name
            assert tensor.max() <= 4, name


def check_trains(net: Net) -> None:
    """Training mode works forward and backward: no block writes where autograd reads."""
    net.train()
    try:
        sum(out.square().mean() for out in tree_leaves(net(net.inputs()[1]))).backward()
    finally:
        net.eval()
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    assert grads
    assert all(grad.isfinite().all() for grad in grads)


CHECKS = (check_runs, check_values, check_traces)


@ANY_SEED
@given(net=nets())
def test_drawn_networks_are_valid(net: Net) -> None:
    assert not net.training
    assert net.features <= set(ALL_FEATURES)
    for check in CHECKS:
        check(net)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_built_networks_are_valid(check: object) -> None:
    for seed in SEEDS:
        check(drawn(seed))


def test_built_networks_train() -> None:
    for seed in SEEDS[:100]:
        check_trains(build(seed))


def test_seeds_reach_every_feature() -> None:
    seen = frozenset().union(*(drawn(seed).features for seed in SEEDS))
    assert seen == frozenset(ALL_FEATURES)


@pytest.mark.parametrize("name", ALL_FEATURES)
def test_feature_can_be_required_alone(name: str) -> None:
    """Also the case that a restricted pool holds one block, nested or not."""
    net = build(0, features={name}, require={name}, max_blocks=2)
    assert name in net.features
    assert net.features <= {name} | GLUE
    for check in (*CHECKS, check_trains):
        check(net)


@pytest.mark.parametrize(
    "name", ["chunk2", "residual", "shuffle_view", "attention_sdpa", "windows", "head_constant"]
)
def test_simplest_example_is_small(name: str) -> None:
    quick = settings(max_examples=20, phases=[Phase.generate, Phase.shrink], derandomize=True)
    net = find(nets(require={name}), lambda net: True, settings=quick)
    assert len(net.blocks) <= 2
    assert sum(p.numel() for p in net.parameters()) < 150


def test_failing_example_shrinks_to_what_fails() -> None:
    """Looked for: a chunk before a grouped convolution; found: little else."""
    quick = settings(max_examples=500, phases=[Phase.generate, Phase.shrink], derandomize=True)
    net = find(
        nets(features={"chunk2", "grouped", "residual", "se_conv", "head_pool"}),
        lambda net: {"chunk2", "grouped"} <= net.features,
        settings=quick,
    )
    assert len(net.blocks) <= 3
    assert len(repr(net)) < 500


def test_required_features_are_all_there() -> None:
    wanted = {"chunk3", "se_linear", "max_pool", "nearest", "head_dict"}
    for seed in range(20):
        net = build(seed, require=wanted, exclude=FREEZING)
        assert wanted <= net.features
        assert not FREEZING & net.features


def test_required_blocks_need_not_be_in_the_pool() -> None:
    net = build(0, features={"head_mean"}, require={"chunk2"})
    assert {"chunk2", "head_mean"} <= net.features <= {"chunk2", "head_mean"} | GLUE


def test_impossible_wishes_are_refused() -> None:
    with pytest.raises(ValueError, match="no such features: \\['chonk'\\]"):
        build(0, require={"chonk"})
    with pytest.raises(ValueError, match="required and excluded: \\['sort'\\]"):
        build(0, require={"sort"}, exclude=FREEZING)
    with pytest.raises(ValueError, match="one head"):
        build(0, require={"head_pool", "head_mean"})
    with pytest.raises(ValueError, match="in 1 blocks"):
        build(0, require={"chunk2", "chunk3"}, max_blocks=1)


def test_seed_decides_everything() -> None:
    for seed in SEEDS[:20]:
        one, two = build(seed), build(seed)
        assert repr(one) == repr(two)
        assert one.features == two.features
        for (key, a), b in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
            assert torch.equal(a, b), key
            assert a.data_ptr() != b.data_ptr(), key  # no state is shared between draws
    assert len({repr(drawn(seed)) for seed in SEEDS}) > 0.9 * len(SEEDS)


def test_printed_network_can_be_pasted() -> None:
    for seed in SEEDS[:100]:
        net = drawn(seed)
        pasted = eval(repr(net), vars(blocks))
        assert pasted.features == net.features
        for x in net.inputs():
            for a, b in zip(outputs(net, x), outputs(pasted, x), strict=True):
                assert torch.equal(a, b)
