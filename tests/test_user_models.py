"""Segmentation and detection code as its authors write it: a U-Net, an FPN with one head on all
levels, a YOLO-style net. Half of the MACs go, everywhere; the law holds at several sizes; what is
left trains and exports.
"""

import pytest
import torch
from models.fpn import Detector
from models.unet import UNet
from models.yolo import YOLO
from oracle import flops, masked, relative_error, sliced_state
from torch import nn
from torch.utils._pytree import tree_leaves

import fxprune

BOUND = 1e-9
MODELS = {
    "unet": lambda: UNet(),
    "unet_bilinear": lambda: UNet(bilinear=True),
    "unet_crop": lambda: UNet(crop=True, depth=2),
    "unet_instance": lambda: UNet(norm="instance"),
    "fpn": lambda: Detector(),
    "yolo": lambda: YOLO(),
}
# Sizes that a U-Net must pad or crop, and that the strides of a detector divide.
SIZES = {name: [(1, 64, 64), (2, 75, 101)] for name in MODELS}
SIZES["yolo"] = [(1, 64, 64), (2, 96, 160)]


def alive(name: str) -> nn.Module:
    """A model in float64 and eval mode in which no two values are equal, and signals stay alive."""
    torch.manual_seed(0)
    model = MODELS[name]().double()
    for m in model.modules():
        if isinstance(m, nn.Conv2d | nn.ConvTranspose2d) and m.weight.requires_grad:
            nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
            if m.bias is not None:
                nn.init.normal_(m.bias, 0, 0.2)
        elif isinstance(m, nn.BatchNorm2d | nn.InstanceNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, 0, 0.3)
        if isinstance(m, nn.BatchNorm2d):
            m.momentum = 1.0
    model.train()(example(name, 0, batch=4))
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.add_(torch.randn_like(m.running_mean) * m.running_var.sqrt() * 0.3)
            m.running_var.mul_(torch.empty_like(m.running_var).uniform_(0.5, 2.0))
    return model.eval()


def example(name: str, which: int, batch: int | None = None) -> torch.Tensor:
    n, h, w = SIZES[name][which]
    generator = torch.Generator().manual_seed(which)
    return torch.randn(batch or n, 3, h, w, generator=generator, dtype=torch.float64)


def output_layers(model: nn.Module) -> set[str]:
    """Convolutions whose channels reach the output, and the fixed ones that read them."""
    return {
        name
        for name, m in model.named_modules()
        if isinstance(m, nn.Conv2d)
        and (
            name in ("outc", "head.cls_logits", "head.bbox_pred", "detect.dfl.conv")
            or (
                name.startswith("detect.cv")
                and name.count(".") == 3
                and name.endswith((".2", ".3"))
            )
        )
    }


@pytest.mark.parametrize("name", MODELS)
def test_half_of_a_users_model(name):
    model = alive(name)
    xs = [example(name, 0), example(name, 1)]
    pruned = fxprune.compile(model, xs[0], budget=0.5)
    document = pruned.plan.to_dict()
    assert not pruned.plan.inexact
    assert flops(pruned, xs[0]) == pruned.plan.metrics["macs_after"] <= 0.5 * flops(model, xs[0])
    reference = masked(model, document)
    for x in xs:
        assert relative_error(reference(x), pruned(x)) <= BOUND
        assert relative_error(model(x), pruned(x)) > 1e-3, "the cut must be felt at the output"
    expected = sliced_state(model, document)
    assert all(torch.equal(t, expected[key]) for key, t in pruned.state_dict().items())

    convs = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)}
    inner = convs - output_layers(model)
    cut = {s.tensor.rpartition(".")[0] for s in pruned.plan.slices if s.dim in (0, 1)}
    frozen = [f"{note.node}: {note.why}" for note in pruned.plan.frozen]
    assert len(inner & cut) >= 0.9 * len(inner), frozen
    prunable = {
        member.rpartition(".")[0]
        for g in fxprune.analyze(model, xs[0]).groups
        for member in g.members
    }
    assert inner <= prunable, frozen


@pytest.mark.parametrize("name", MODELS)
def test_what_is_left_trains_and_exports(name):
    model = alive(name)
    x = example(name, 0, batch=2)
    pruned = fxprune.compile(model, x, budget=0.5, verify=False)
    pruned.train()
    optimizer = torch.optim.SGD([p for p in pruned.parameters() if p.requires_grad], lr=1e-3)
    loss = sum(t.square().mean() for t in tree_leaves(pruned(x)))
    loss.backward()
    learnt = [(n, p) for n, p in pruned.named_parameters() if p.requires_grad]
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for _, p in learnt)
    optimizer.step()
    pruned.eval()
    exported = torch.export.export(pruned, (x,)).module()  # its dict is of another class
    assert relative_error(tree_leaves(pruned(x)), tree_leaves(exported(x))) <= BOUND
