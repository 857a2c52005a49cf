"""L1: the top-k set, its invariants, coupled producers, and the arithmetic of the paper's tables."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, note, settings
from hypothesis import strategies as st
from oracle import flops
from strategies import FREEZING, nets
from torch import nn

import fxprune
from fxprune import zoo
from fxprune.selection import group_weights

L1 = fxprune.methods.L1


def chain(width, **weights):
    """conv -> conv -> linear; the first one has the given L1 norms, one per filter."""
    net = nn.Sequential(nn.Conv2d(2, width, 1, bias=False), nn.ReLU(), nn.Conv2d(width, 3, 1))
    return net.double().eval()


@torch.no_grad()
def with_norms(conv, norms):
    """Filters whose absolute weights sum to `norms`, of mixed signs."""
    t = conv.weight
    signs = torch.ones(t[0].numel(), dtype=t.dtype)
    signs[::2] = -1
    values = torch.as_tensor(norms, dtype=t.dtype)[:, None] * signs / len(signs)
    conv.weight.copy_(values.view_as(t))


def kept(net, x=None, tensor="0.weight", dim=0, **config):
    x = torch.randn(1, 2, 4, 4, dtype=next(net.parameters()).dtype) if x is None else x
    pruned = fxprune.compile(net, x, method=L1(**config), progress=False)
    return pruned.plan.keep(tensor, dim)


# ---- invariants over random networks ------------------------------------------------------------


@settings(max_examples=max(settings.default.max_examples // 2, 10))
@given(net=nets(exclude=FREEZING, max_blocks=5), ratio=st.sampled_from((0.25, 0.5, 0.8)))
def test_the_kept_set_is_the_top_set(net, ratio):
    """min(s[kept]) >= max(s[pruned]) in every group no part of which had to stay for a piece."""
    note(repr(net))
    x = net.example_input()
    analysis = fxprune.analyze(net, x)
    assume(analysis.groups)
    pruned = fxprune.compile(net, x, method=L1(ratio=ratio), progress=False)
    for group in analysis.groups:
        slot = group.producers[0]
        stays = pruned.plan.keep(slot.tensor, slot.dim)
        if stays is None:
            continue
        classes = analysis.classes(slot.ids)
        alive = set(classes[list(stays)].tolist())
        scores = sum(w.abs().flatten(1).sum(1) for w in group_weights(analysis, group))
        chosen = torch.tensor([c in alive for c in group.classes.tolist()])
        pieces = [p for p in analysis.pieces if set(p.tolist()) & set(group.classes.tolist())]
        split = any(len(p) < len(group) for p in pieces)
        if split or not chosen.any() or chosen.all():
            continue
        assert scores[chosen].min() >= scores[~chosen].max() - 1e-12


@settings(max_examples=max(settings.default.max_examples // 4, 10))
@given(net=nets(exclude=FREEZING, max_blocks=4), factor=st.sampled_from((1e-6, 0.5, 3.0, 1e6)))
def test_scaling_all_weights_keeps_the_set(net, factor):
    note(repr(net))
    x = net.example_input()
    assume(fxprune.analyze(net, x).groups)
    before = fxprune.compile(net, x, method=L1(ratio=0.5), progress=False, verify=False)
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(factor)
    after = fxprune.compile(net, x, method=L1(ratio=0.5), progress=False, verify=False)
    assert after.plan.slices == before.plan.slices


# ---- by hand ------------------------------------------------------------------------------------


def test_the_smallest_go():
    net = chain(6)
    with_norms(net[0], [3.0, 1.0, 6.0, 2.0, 5.0, 4.0])
    assert kept(net, ratio=0.5) == (2, 4, 5)
    assert kept(net, ratio=0.5, tensor="2.weight", dim=1) == (2, 4, 5)


@pytest.mark.parametrize("width", [2, 6, 10])
def test_largest_keeps_the_complement_at_one_half(width):
    net = chain(width)
    with_norms(net[0], torch.randperm(width) + 1.0)
    small, large = kept(net, ratio=0.5), kept(net, ratio=0.5, order="largest")
    assert sorted((*small, *large)) == list(range(width))


@pytest.mark.parametrize("factor", [1e-20, 1e-3, 1e4])
def test_scaling_a_layer_keeps_the_set(factor):
    net = chain(8)
    before = kept(net, ratio=0.5)
    with torch.no_grad():
        net[0].weight.mul_(factor)
    assert kept(net, ratio=0.5) == before


@pytest.mark.parametrize(
    ("ratio", "width", "count"),
    [
        (0.29, 100, 71),  # (1 - 0.29) * 100 is 71.0, but 0.71 * 100 is 70.99...
        (0.71, 100, 29),  # (1 - 0.71) * 100 is 29.000000000000004
        (0.1, 10, 9),
        (0.3, 10, 7),  # 0.7 * 10 is 7.0, 1 - 0.3 is 0.7
        (0.7, 10, 3),  # (1 - 0.7) * 10 is 3.0000000000000004
        (0.9, 10, 1),  # (1 - 0.9) * 10 is 0.99...
        (0.42, 50, 29),  # (1 - 0.42) * 50 is 29.000000000000004
        (0.1, 16, 14),
        (0.1, 64, 57),
        (0.6, 16, 6),
        (2 / 3, 9, 3),
        (0.5, 3, 1),
        (0.99, 7, 1),
    ],
)
def test_counts(ratio, width, count):
    assert len(kept(chain(width), ratio=ratio)) == count


def test_ties_keep_the_lower_index():
    net = chain(7)
    with_norms(net[0], [1.0, 2.0, 1.0, 2.0, 1.0, 1.0, 2.0])
    assert kept(net, ratio=0.4) == (0, 1, 3, 6)
    with_norms(net[0], [1.0] * 7)
    assert kept(net, ratio=0.4) == (0, 1, 2, 3)
    assert kept(net, ratio=0.4, order="largest") == (0, 1, 2, 3)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 1, bias=False)
        self.body = nn.Conv2d(4, 4, 1, bias=False)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head(self.body(x) + x)


def test_coupled_producers_are_summed():
    net = Residual().eval()
    with_norms(net.stem, [1.0, 8.0, 3.0, 4.0])
    with_norms(net.body, [9.0, 1.0, 2.0, 7.0])  # sums: 10, 9, 5, 11
    assert kept(net, ratio=0.25, tensor="stem.weight") == (0, 1, 3)
    assert kept(net, ratio=0.5, tensor="body.weight") == (0, 3)
    assert kept(net, ratio=0.5, tensor="body.weight", dim=1) == (0, 3)
    assert kept(net, ratio=0.5, tensor="head.weight", dim=1) == (0, 3)


def test_depthwise_weights_follow_their_producer():
    net = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 3, 1)).eval()
    with_norms(net[0], [4.0, 1.0, 3.0, 2.0])
    with_norms(net[1], [10.0, 90.0, 20.0, 80.0])  # would turn the order round
    assert kept(net, ratio=0.5) == (0, 2)
    assert kept(net, ratio=0.5, tensor="1.weight") == (0, 2)


def test_biases_and_norms_are_not_counted():
    net = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1)).eval()
    with_norms(net[0], [4.0, 1.0, 3.0, 2.0])
    with torch.no_grad():
        net[0].bias.copy_(torch.tensor([0.0, 100.0, 0.0, 100.0]))
        net[1].weight.copy_(torch.tensor([0.1, 9.0, 0.1, 9.0]))
    assert kept(net, ratio=0.5) == (0, 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_are_scored_in_float32(dtype):
    """In half precision the sums 4096 + 1 .. 4 would be rounded to equal numbers."""
    net = nn.Sequential(nn.Conv2d(64, 4, 1, bias=False), nn.Conv2d(4, 2, 1)).eval().to(dtype)
    with torch.no_grad():
        net[0].weight.fill_(64.0)
        net[0].weight[:, 0] = torch.tensor([1.0, 3.0, 2.0, 4.0], dtype=dtype)[:, None, None]
    x = torch.zeros(1, 64, 3, 3, dtype=dtype)
    assert kept(net, x, ratio=0.5) == (1, 3)


def test_half_sums_do_not_overflow():
    net = nn.Sequential(nn.Conv2d(64, 4, 1, bias=False), nn.Conv2d(4, 2, 1)).eval().half()
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([2.0, 4.0, 3.0, 1.0])[:, None, None, None].expand(4, 64, 1, 1) * 10_000)  # fmt: skip
    assert kept(net, torch.zeros(1, 64, 3, 3).half(), ratio=0.5) == (1, 2)


def test_transposed_filters_are_columns():
    net = nn.Sequential(nn.ConvTranspose2d(2, 3, 1, bias=False), nn.Conv2d(3, 2, 1)).eval()
    with torch.no_grad():  # [C_in, C_out, 1, 1]
        net[0].weight.copy_(torch.tensor([[1.0, -5.0, 2.0], [1.0, 0.0, 2.0]])[:, :, None, None])
    assert kept(net, ratio=0.5, tensor="0.weight", dim=1) == (1,)


def test_scores_of_one_layer_ignore_what_the_layer_before_lost():
    """'Independent' scoring: the norm of a filter counts the inputs that go as well."""
    net = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.Conv2d(2, 2, 1, bias=False), nn.Conv2d(2, 2, 1)).eval()  # fmt: skip
    with_norms(net[0], [1.0, 2.0])  # channel 0 goes
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[9.0, 1.0], [1.0, 5.0]])[:, :, None, None])
    assert kept(net, ratio=0.5) == (1,)
    assert kept(net, ratio=0.5, tensor="1.weight") == (0,)


def test_the_order_is_checked_and_recorded():
    with pytest.raises(fxprune.OptionError, match='"smallest" or "largest"'):
        L1(order="middle")
    net = chain(4)
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    plan = fxprune.compile(net, x, method=L1(ratio=0.5, order="largest"), progress=False).plan
    assert plan.to_dict()["method"] == {"name": "l1", "order": "largest", "ratio": 0.5}


# ---- the paper's networks -----------------------------------------------------------------------


def pfec(depth, ratios, skipped):
    """Per-stage ratios on the first convolutions of blocks; layer ids count convolutions from 1."""
    net = zoo.cifar_resnet(depth).eval()
    x = torch.randn(1, 3, 32, 32)
    blocks = (depth - 2) // 6
    keep = {}
    for block in range(3 * blocks):
        stage, i = divmod(block, blocks)
        width = 16 << stage
        if 2 * block + 2 not in skipped:
            keep[f"layer{stage + 1}.{i}.conv1"] = range(int(width * (100 - ratios[stage]) / 100))
    analysis = fxprune.analyze(net, x)
    plan = analysis.plan({name: list(k) for name, k in keep.items()})
    assert flops(fxprune.apply(net, plan, x), x) == plan.metrics["macs_after"]
    return plan.metrics


@pytest.mark.parametrize(
    ("depth", "ratios", "skipped", "before", "after"),
    [
        (56, (10, 10, 10), {16, 20, 38, 54}, 125_485_696, 112_435_840),
        (56, (60, 30, 10), {16, 18, 20, 34, 38, 54}, 125_485_696, 90_907_264),
        (110, (50, 0, 0), {36}, 252_887_680, 212_779_648),
        (110, (50, 40, 30), {36, 38, 74}, 252_887_680, 155_124_352),
    ],
    ids=["56-A", "56-B", "110-A", "110-B"],
)
def test_multiply_adds_of_the_published_resnets(depth, ratios, skipped, before, after):
    metrics = pfec(depth, ratios, skipped)
    assert metrics["macs_before"] == before
    assert metrics["macs_after"] == after


def test_the_first_published_resnet_stage_by_stage():
    """56-A as a user makes it: one call per stage, by scope and ratio; the plans are composed."""
    net, x = zoo.resnet56().eval(), torch.randn(1, 3, 32, 32)
    blocks = [b for b in range(27) if 2 * b + 2 not in {16, 20, 38, 54}]
    pruned = net
    for stage in range(3):
        scope = [f"layer{stage + 1}.{b % 9}.conv1" for b in blocks if b // 9 == stage]
        pruned = fxprune.compile(pruned, x, method=L1(ratio=0.1), scope=scope, progress=False)
    assert pruned.plan.metrics["macs_before"] == 125_485_696
    assert pruned.plan.metrics["macs_after"] == 112_435_840
    assert flops(pruned, x) == 112_435_840
    for s in pruned.plan.slices:
        if s.tensor.endswith("conv1.weight") and s.role == "out":
            norms = net.get_parameter(s.tensor).abs().flatten(1).sum(1)
            best = norms.argsort(descending=True, stable=True)[: len(s.keep)]
            assert sorted(best.tolist()) == list(s.keep)


class Vgg16(nn.Sequential):
    """VGG-16 for 32x32 images with one hidden linear layer."""

    def __init__(self):
        layers, c = [], 3
        for width in (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0):
            if width:
                layers += [nn.Conv2d(c, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                c = width
            else:
                layers.append(nn.MaxPool2d(2))
        super().__init__(*layers, nn.Flatten(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def test_multiply_adds_of_the_published_vgg():
    net, x = Vgg16().eval(), torch.randn(1, 3, 32, 32)
    convs = [str(i) for i, m in enumerate(net) if isinstance(m, nn.Conv2d)]
    halved = [convs[0], *convs[7:]]
    pruned = fxprune.compile(net, x, method=L1(ratio=0.5), scope=halved, progress=False)
    assert pruned.plan.metrics["macs_before"] == 313_463_808
    assert pruned.plan.metrics["macs_after"] == 206_279_680
    assert flops(pruned, x) == 206_279_680
    assert F.relu(pruned(x)).shape == (1, 10)
