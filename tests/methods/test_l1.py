"""L1: the top-k set, its invariants, coupled producers, and the arithmetic of the paper's tables."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, note, settings
from hypothesis import strategies as st
from oracle import flops, masked, relative_error
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


def test_the_record_holds_what_was_chosen():
    net = chain(4)
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)

    def record(**config):
        return fxprune.compile(net, x, method=L1(**config), progress=False).plan.to_dict()["method"]

    assert record() == {"name": "l1", "order": "smallest", "ratio": None}
    assert record(ratio=0.5, order="largest") == {"name": "l1", "order": "largest", "ratio": 0.5}
    assert record(norm="l2", ratio={"0": 0.5}) == {
        "name": "l1",
        "norm": "l2",
        "order": "smallest",
        "ratio": {"0": 0.5},
    }


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        ({"order": "middle"}, fxprune.OptionError, '"smallest", "largest" or "random"'),
        ({"order": "smalest"}, fxprune.OptionError, "did you mean 'smallest'"),
        ({"norm": "l3"}, fxprune.OptionError, '"l1" or "l2"'),
        ({"scoring": "lazy"}, fxprune.OptionError, '"independent" or "greedy"'),
        ({"by": "mean"}, fxprune.OptionError, '"mean-mean"'),
        ({"samples": 0}, fxprune.OptionError, "at least 1"),
        ({"samples": 1.5}, fxprune.OptionTypeError, "whole number"),
        ({"steps": 0}, fxprune.OptionError, "at least 1"),
        ({"steps": True}, fxprune.OptionTypeError, "whole number"),
        ({"preset": "ResNet-56-C"}, fxprune.OptionError, "did you mean 'ResNet-56-"),
        ({"preset": "ResNet-56-A", "ratio": 0.1}, fxprune.OptionError, "both a ratio and a preset"),
        ({"ratio": {}}, fxprune.OptionError, "names no layer"),
        ({"ratio": {"a": 1.0}}, fxprune.OptionError, "ratio\\['a'\\]"),
        ({"ratio": {"a": float("nan")}}, fxprune.OptionError, "ratio\\['a'\\]"),
        ({"ratio": {"a": "0.5"}}, fxprune.OptionTypeError, "must be a number"),
        ({"ratio": {3: 0.5}}, fxprune.OptionTypeError, "patterns of names"),
        ({"ratio": {"a": 10}}, fxprune.OptionError, "not percent: 0.1"),
    ],
)
def test_what_makes_no_sense_is_refused(config, error, words):
    with pytest.raises(error, match=words):
        L1(**config)


# ---- the paper's comparisons --------------------------------------------------------------------


def test_the_2_norm_ranks_by_the_2_norm():
    net = chain(4)
    with torch.no_grad():  # 1-norms 4, 5, 3, 6; 2-norms 2.8, 3.6, 3, 4.2
        net[0].weight.copy_(torch.tensor([[2.0, 2], [2, 3], [3, 0], [3, 3]])[:, :, None, None])
    assert kept(net, ratio=0.25) == (0, 1, 3)
    assert kept(net, ratio=0.25, norm="l2") == (1, 2, 3)
    assert kept(net, ratio=0.25, norm="l2", order="largest") == (0, 1, 2)


def test_random_draws_follow_the_seed_and_the_name_alone():
    net, x = zoo.resnet20().eval(), torch.randn(1, 3, 32, 32)

    def slices(**options):
        method = L1(ratio=0.5, order="random")
        plan = fxprune.compile(net, x, method=method, progress=False, verify=False, **options).plan
        return {(s.tensor, s.dim): s.keep for s in plan.slices}

    first = slices(seed=1)
    assert first == slices(seed=1)
    assert first != slices(seed=2)
    some = slices(seed=1, scope=["layer2.0.conv1"])  # no other group moves this one's draws
    assert some == {k: first[k] for k in some}
    assert torch.initial_seed() == 0


def test_random_draws_are_even():
    net = chain(8)
    hits = torch.zeros(8)
    for seed in range(200):
        x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
        method = L1(ratio=0.5, order="random")
        plan = fxprune.compile(net, x, method=method, seed=seed, progress=False, verify=False).plan
        hits[list(plan.keep("0.weight", 0))] += 1
    assert hits.sum() == 800
    assert hits.min() > 70  # 100 expected, with a standard deviation of 7.1
    assert hits.max() < 130


# ---- scores that leave out what went before -----------------------------------------------------


def test_greedy_scores_leave_out_inputs_that_are_gone():
    net = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.Conv2d(2, 2, 1, bias=False), nn.Conv2d(2, 2, 1)).eval()  # fmt: skip
    with_norms(net[0], [1.0, 2.0])  # channel 0 goes
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[9.0, 1.0], [1.0, 5.0]])[:, :, None, None])
    assert kept(net, ratio=0.5, tensor="1.weight") == (0,)
    assert kept(net, ratio=0.5, tensor="1.weight", scoring="greedy") == (1,)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_greedy_agrees_with_going_through_a_chain_by_hand(seed, ratio):
    torch.manual_seed(seed)
    widths = [3, 8, 10, 7, 12, 5]
    convs = [nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths)]
    net = nn.Sequential(*convs).eval()
    plan = fxprune.compile(
        net, torch.randn(1, 3, 6, 6), method=L1(ratio=ratio, scoring="greedy"), progress=False
    ).plan
    inputs = list(range(3))
    for i, conv in enumerate(convs[:-1]):
        s = conv.weight.detach()[:, inputs].abs().flatten(1).sum(1)
        count = int(len(s) * (1 - ratio))
        inputs = sorted(s.argsort(descending=True, stable=True)[:count].tolist())
        assert list(plan.keep(f"{i}.weight", 0)) == inputs


@settings(max_examples=max(settings.default.max_examples // 8, 10))
@given(net=nets(exclude=FREEZING, max_blocks=4), budget=st.sampled_from((0.4, 0.7)))
def test_greedy_keeps_the_budget_and_the_law(net, budget):
    note(repr(net))
    x = net.example_input()
    assume(fxprune.analyze(net, x).groups)
    try:
        pruned = fxprune.compile(net, x, method=L1(scoring="greedy"), budget=budget, progress=False)
    except fxprune.PlanError as error:
        assume("cannot be reached" not in str(error))
        raise
    assert pruned.plan.metrics["macs_after"] <= budget * pruned.plan.metrics["macs_before"]
    reference = masked(net, pruned.plan.to_dict())
    for x in net.inputs():
        assert relative_error(reference(x), pruned(x)) <= 1e-9


# ---- feature maps -------------------------------------------------------------------------------


def statistics(maps):
    """The paper's five, from maps [N, C, H, W]."""
    flat = maps.double().flatten(2)
    norms = flat.pow(2).sum(2).sqrt()
    return {
        "mean-mean": flat.mean(2).mean(0),
        "mean-std": flat.var(2, correction=0).sqrt().mean(0),
        "mean-l1": flat.abs().sum(2).mean(0),
        "mean-l2": norms.mean(0),
        "var-l2": norms.var(0, correction=0),
    }


def observed(net, names, x):
    """What the convolutions of these names give on x."""
    maps = {}
    handles = [
        net.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: maps.__setitem__(name, out.detach())
        )
        for name in names
    ]
    with torch.no_grad():
        net.eval()(x)
    for handle in handles:
        handle.remove()
    return maps


@pytest.mark.parametrize("by", ["mean-mean", "mean-std", "mean-l1", "mean-l2", "var-l2"])
@pytest.mark.parametrize("order", ["smallest", "largest"])
def test_channels_are_ranked_by_statistics_of_their_maps(by, order):
    net = zoo.resnet20(width=8).eval()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.weight)
            nn.init.normal_(m.bias)
            nn.init.uniform_(m.running_var, 0.5, 2)
    x = torch.randn(24, 3, 16, 16)
    data = [(part, torch.zeros(len(part), dtype=torch.int64)) for part in x.split(7)]
    method = L1(ratio=0.5, by=by, order=order, samples=20)
    plan = fxprune.compile(net, method=method, data=data, progress=False).plan
    assert plan.method["by"] == by
    free = [f"layer{s}.{i}.conv1" for s in (1, 2, 3) for i in range(3)]
    residual = ["layer3.0.conv2", "layer3.1.conv2", "layer3.2.conv2"]
    maps = observed(net, free + residual, x[:20])
    for name in free:
        s = statistics(maps[name])[by] * (1 if order == "smallest" else -1)
        best = s.argsort(descending=True, stable=True)[: len(s) // 2]
        assert list(plan.keep(f"{name}.weight", 0)) == sorted(best.tolist())


def test_maps_of_coupled_and_shared_layers_are_summed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(2, 5, 1)
            self.twice = nn.Conv2d(5, 5, 1, bias=False)
            self.weight = nn.Parameter(torch.randn(4, 5, 1, 1))
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            x = self.stem(x)
            x = x + self.twice(self.twice(x).relu())
            x = F.conv2d(x, self.weight)  # a convolution without a module
            return self.head(x.mean((2, 3)))

    net = Net().eval()
    x = torch.randn(6, 2, 4, 4)
    plan = fxprune.compile(net, method=L1(ratio=0.5, by="mean-l1"), data=[x], progress=False).plan
    with torch.no_grad():
        stem = net.stem(x)
        once = net.twice(stem)
        two = net.twice(once.relu())
        functional = F.conv2d(stem + two, net.weight)
    s = (
        sum(statistics(m)["mean-l1"] for m in (stem,))
        + statistics(torch.cat([once, two]))["mean-l1"]
    )
    assert list(plan.keep("stem.weight", 0)) == sorted(s.argsort(descending=True)[:2].tolist())
    s = statistics(functional)["mean-l1"]
    assert list(plan.keep("weight", 0)) == sorted(s.argsort(descending=True)[:2].tolist())


def test_looking_at_maps_leaves_the_model_and_the_random_state_alone():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Dropout(), nn.Conv2d(8, 2, 3))  # fmt: skip
    net.train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    noise = torch.get_rng_state()
    data = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))]
    fxprune.compile(net, method=L1(ratio=0.5, by="mean-l1"), data=data, progress=False)
    assert all(m.training for m in net.modules())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert torch.equal(noise, torch.get_rng_state())


def test_maps_need_data():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 3))
    with pytest.raises(fxprune.OptionError, match="looks at feature maps, needs data"):
        fxprune.compile(net, torch.randn(1, 3, 8, 8), method=L1(by="mean-l1"))
    with pytest.raises(fxprune.OptionError, match="gave no batch"):
        fxprune.compile(net, torch.randn(1, 3, 8, 8), method=L1(by="mean-l1"), data=[])


# ---- ratios by name -----------------------------------------------------------------------------


def widths(pruned):
    return {row.name: row.after for row in pruned.report.groups}


def test_ratios_by_name():
    net, x = zoo.resnet20().eval(), torch.randn(1, 3, 32, 32)
    shares = {"layer1.0.conv1": 0.25, "layer1.*.conv1": 0.5, "layer3.2.*1": 0.9}
    after = widths(fxprune.compile(net, x, method=L1(ratio=shares), progress=False))
    assert after["layer1.0.conv1"] == 12  # the first pattern that fits
    assert after["layer1.1.conv1"] == after["layer1.2.conv1"] == 8
    assert after["layer3.2.conv1"] == 6
    assert after["layer2.0.conv1"] == 32  # none fits: whole
    assert after["conv1"] == 64


def test_a_coupled_group_goes_by_any_layer_that_makes_its_channels():
    net, x = zoo.resnet20().eval(), torch.randn(1, 3, 32, 32)
    plan = fxprune.compile(net, x, method=L1(ratio={"layer3.1.conv2": 0.5}), progress=False).plan
    assert len(plan.keep("layer3.0.conv2.weight", 0)) == 32


@pytest.mark.parametrize(
    ("shares", "options", "words"),
    [
        ({"layer9.*": 0.1}, {}, "'layer9.\\*' in ratio matches nothing"),
        ({"layer1.0.cnv1": 0.1}, {}, "did you mean 'layer1.0.conv1'"),
        ({"layer1.0.conv1": 0.0}, {}, "nothing can be pruned"),
        ({"layer1.0.conv1": 0.5}, {"ignore": ["layer1.*"]}, "none has a share above 0"),
    ],
)
def test_ratios_that_fit_nothing(shares, options, words):
    net, x = zoo.resnet20().eval(), torch.randn(1, 3, 32, 32)
    with pytest.raises(fxprune.PlanError, match=words):
        fxprune.compile(net, x, method=L1(ratio=shares), progress=False, **options)


# ---- in several steps ---------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 5])
@pytest.mark.parametrize("ratio", [0.29, 0.5, {"layer1.*.conv1": 0.3, "layer2.0.*": 0.7}])
def test_steps_end_where_one_cut_ends(ratio, steps):
    net, x = zoo.resnet20().eval(), torch.randn(1, 3, 32, 32)
    once = fxprune.compile(net, x, method=L1(ratio=ratio), progress=False)
    slowly = fxprune.compile(net, x, method=L1(ratio=ratio, steps=steps), progress=False)
    assert widths(slowly) == widths(once)
    assert slowly.plan.metrics == once.plan.metrics
    reference = masked(net, slowly.plan.to_dict())
    assert relative_error(reference.double()(x.double()), slowly.double()(x.double())) <= 1e-9


def test_steps_keep_the_budget_of_the_original():
    net, x = zoo.resnet20().eval(), torch.randn(1, 3, 32, 32)
    seen = []
    pruned = fxprune.compile(
        net,
        x,
        method=L1(steps=4),
        budget=0.3,
        fit=lambda network: seen.append(network.plan.metrics["macs_after"]),
        progress=False,
    )
    whole = pruned.plan.metrics["macs_before"]
    assert whole == 40_551_040
    shares = [macs / whole for macs in seen]
    assert shares == pytest.approx([0.825, 0.65, 0.475, 0.3], abs=0.02)
    assert shares[-1] <= 0.3
    assert flops(pruned, x) == pruned.plan.metrics["macs_after"]


def test_scores_are_taken_anew_after_each_training():
    net = chain(8)
    with_norms(net[0], torch.arange(8.0) + 1)

    def turn_round(network):  # what was largest becomes smallest
        weight = network.get_parameter("0.weight")
        with torch.no_grad():
            weight.div_(weight.abs().flatten(1).sum(1)[:, None, None, None] ** 2)

    x = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    plan = fxprune.compile(
        net, x, method=L1(ratio=0.5, steps=2), fit=turn_round, progress=False
    ).plan
    assert plan.keep("0.weight", 0) == (2, 3, 4, 5)  # 0, 1 went first, then 6, 7
    assert plan.weights == "changed"


# ---- the paper's networks -----------------------------------------------------------------------


def published(depth, ratios, skipped):
    """Kept widths by hand: layer ids count convolutions from 1, blocks begin at even ones."""
    blocks = (depth - 2) // 6
    keep = {}
    for block in range(3 * blocks):
        stage, i = divmod(block, blocks)
        width = 16 << stage
        if 2 * block + 2 not in skipped:
            keep[f"layer{stage + 1}.{i}.conv1"] = width * (100 - ratios[stage]) // 100
    return keep


@pytest.mark.parametrize(
    ("preset", "depth", "ratios", "skipped", "macs", "params"),
    [
        ("ResNet-56-A", 56, (10, 10, 10), {16, 20, 38, 54}, 112_435_840, 9.34),
        ("ResNet-56-B", 56, (60, 30, 10), {16, 18, 20, 34, 38, 54}, 90_907_264, 13.75),
        ("ResNet-110-A", 110, (50, 0, 0), {36}, 212_779_648, 2.28),
        ("ResNet-110-B", 110, (50, 40, 30), {36, 38, 74}, 155_124_352, 32.38),
    ],
)
def test_the_published_resnets(preset, depth, ratios, skipped, macs, params):
    net, x = zoo.cifar_resnet(depth).eval(), torch.randn(1, 3, 32, 32)
    pruned = fxprune.compile(net, x, method=L1(preset=preset), progress=False)
    m = pruned.plan.metrics
    assert m["macs_before"] == {56: 125_485_696, 110: 252_887_680}[depth]
    assert m["macs_after"] == flops(pruned, x) == macs
    assert m["params_before"] == {56: 853_018, 110: 1_727_962}[depth]
    assert m["params_after"] == sum(p.numel() for p in pruned.parameters())
    assert round(100 * (1 - m["params_after"] / m["params_before"]), 2) == params
    by_hand = published(depth, ratios, skipped)
    after = widths(pruned)
    assert {name: after[name] for name in by_hand} == by_hand
    assert all(row.before == row.after for row in pruned.report.groups if row.name not in by_hand)
    for s in pruned.plan.slices:
        if s.role == "out" and s.tensor.endswith("conv1.weight"):
            norms = net.get_parameter(s.tensor).abs().flatten(1).sum(1)
            best = norms.argsort(descending=True, stable=True)[: len(s.keep)]
            assert sorted(best.tolist()) == list(s.keep)


def test_the_published_vgg():
    net, x = zoo.vgg16_bn().eval(), torch.randn(1, 3, 32, 32)
    pruned = fxprune.compile(net, x, method=L1(preset="VGG-16-A"), progress=False)
    m = pruned.plan.metrics
    assert m["macs_before"] == 313_463_808
    assert m["macs_after"] == flops(pruned, x) == 206_279_680
    assert round(100 * (1 - m["params_after"] / m["params_before"]), 1) == 64.0
    convs = [c.out_channels for c in pruned.modules() if isinstance(c, nn.Conv2d)]
    assert convs == [32, 64, 128, 128, 256, 256, 256, *[256] * 6]


@pytest.mark.parametrize(
    ("preset", "macs", "params"), [("ResNet-34-A", 15.46, 7.61), ("ResNet-34-B", 24.19, 10.77)]
)
def test_the_published_imagenet_resnets(preset, macs, params):
    """The paper leaves the three 1x1 projections out of its counts."""
    torchvision = pytest.importorskip("torchvision")
    net, x = torchvision.models.resnet34(weights=None).eval(), torch.randn(1, 3, 224, 224)
    plan = fxprune.compile(net, x, method=L1(preset=preset), progress=False, verify=False).plan
    m = plan.metrics
    shortcuts = [net.get_submodule(f"layer{s}.0.downsample") for s in (2, 3, 4)]
    projections = sum(p.numel() for shortcut in shortcuts for p in shortcut.parameters())
    assert m["macs_before"] == 3_663_761_408
    assert m["params_before"] - projections == 21_623_848
    outside = 3_663_761_408 - 3_644_493_824
    went = (m["macs_before"] - m["macs_after"]) / (m["macs_before"] - outside)
    assert round(100 * went, 2) == macs
    gone = (m["params_before"] - m["params_after"]) / (m["params_before"] - projections)
    assert round(100 * gone, 2) == params


@pytest.mark.parametrize(
    ("preset", "build", "words"),
    [
        ("ResNet-56-A", zoo.resnet110, "55 convolutions; this network has 109"),
        (
            "ResNet-110-A",
            zoo.resnet56,
            "this network has 55, and no prunable group `layer1.9.conv1`",
        ),
        ("VGG-16-A", zoo.resnet20, "made for zoo.vgg16_bn"),
    ],
)
def test_a_preset_wants_its_network(preset, build, words):
    with pytest.raises(fxprune.PlanError, match=words):
        fxprune.compile(build().eval(), torch.randn(1, 3, 32, 32), method=L1(preset=preset))


def test_a_preset_and_a_budget_are_too_much():
    with pytest.raises(fxprune.OptionError, match=r"both a budget and a preset \(ResNet-56-A\)"):
        fxprune.compile(zoo.resnet56(), method=L1(preset="ResNet-56-A"), budget=0.5)
