"""The law on torchvision's networks, whole: budgets reached and random plans, in float64.

Every batch norm gets random statistics and affine parameters near the activations' own scale, so
that signals neither die nor explode and an index error anywhere reaches the output.
"""

import pytest
import torch
import torchvision
from oracle import flops, masked, relative_error
from test_law import BOUND, random_plan
from torch import nn

import fxprune

QUICK = ["resnet18", "resnext50_32x4d", "densenet121", "mobilenet_v3_large", "shufflenet_v2_x1_0", "googlenet"]  # fmt: skip
LONG = [
    "alexnet", "vgg11_bn", "resnet50", "wide_resnet50_2", "squeezenet1_0", "inception_v3",
    "mobilenet_v2", "mnasnet1_0", "efficientnet_b0", "regnet_y_400mf",
]  # fmt: skip
SIZES = {"alexnet": (127, 159), "inception_v3": (107, 139)}
MODELS = [*QUICK, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)]


def alive(name: str, size: int) -> nn.Module:
    """A torchvision model in float64, eval mode, with random and distinct values everywhere."""
    torch.manual_seed(0)
    extra = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = getattr(torchvision.models, name)(weights=None, **extra).double()
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
                if m.bias is not None:
                    m.bias.normal_(0, 0.2)
        for m in norms:
            m.momentum = 1.0
            m.weight.uniform_(0.5, 1.5).mul_(torch.randn_like(m.weight).sign())
            m.bias.normal_(0, 0.3)
        model.eval()  # no dropout, no auxiliary heads
        for m in norms:
            m.train()
        model(torch.randn(4, 3, size, size, dtype=torch.float64))
        for m in norms:
            m.running_mean.add_(torch.randn_like(m.running_mean) * m.running_var.sqrt() * 0.3)
            m.running_var.mul_(torch.empty_like(m.running_var).uniform_(0.5, 2.0))
    return model.eval()


def inputs(small: int, large: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(1, 3, small, small), (2, 3, large, small)]
    return [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]


@pytest.mark.parametrize("name", MODELS)
def test_torchvision_network_obeys_the_law(name):
    small, large = SIZES.get(name, (64, 96))
    model, xs = alive(name, small), inputs(small, large)
    before = [model(x) for x in xs]
    analysis = fxprune.analyze(model, xs[0])
    pruned = fxprune.compile(model, xs[0], budget=0.5, verify=False)
    share = flops(pruned, xs[0]) / flops(model, xs[0])
    assert 0.42 <= share <= 0.50
    assert flops(pruned, xs[0]) == pruned.plan.metrics["macs_after"]
    plans = [random_plan(analysis, seed, 0.3) for seed in range(3)]
    nets = [(pruned.plan, pruned), *((plan, fxprune.apply(model, plan, xs[0])) for plan in plans)]
    with torch.no_grad():
        for plan, net in nets:
            reference = masked(model, plan.to_dict())
            for x, old in zip(xs, before, strict=True):
                assert relative_error(reference(x), net(x)) <= BOUND
                assert relative_error(old, net(x)) > 1e-3, "the cut must be felt at the output"


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_scope_free_leaves_residual_channels_alone(name):
    model = alive(name, 64)
    x = inputs(64, 64)[0]
    whole = fxprune.compile(model, x, method=fxprune.methods.L1(ratio=0.5))
    free = fxprune.compile(model, x, method=fxprune.methods.L1(ratio=0.5), scope="free")
    coupled = {g.name for g in fxprune.analyze(model, x).groups if g.residual}
    assert coupled
    cut = {row.name: row.before - row.after for row in whole.report.groups}
    left = {row.name: row.before - row.after for row in free.report.groups}
    assert all(cut[name] > 0 for name in coupled)
    assert all(left[name] == 0 for name in coupled)
    assert any(left.values())
    reference = masked(model, free.plan.to_dict())
    assert relative_error(reference(x), free(x)) <= BOUND
