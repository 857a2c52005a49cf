"""Corners of L1, of training inside compile, and of the sensitivity scan that a second reading found."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxprune
from fxprune.passes.methods.l1 import l1_scores
from fxprune.report import Curve, Point
from fxprune.selection import evidence_of
from fxprune.sensitivity import Sensitivity, sensitivity

L1 = fxprune.methods.L1
X = torch.randn(1, 3, 10, 10, generator=torch.Generator().manual_seed(0))


def two(width=8):
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 2, 3)).eval()


def compiled(net, x=X, **options):
    return fxprune.compile(net, x, progress=False, **options)


# ---- L1 -------------------------------------------------------------------


@pytest.mark.parametrize("config", [{}, {"norm": "l2"}, {"order": "random"}])
def test_scores_do_not_follow_torchs_default_device_or_dtype(config):
    net = two()
    analysis = fxprune.analyze(net, X)
    evidence = evidence_of(analysis, 0, None)
    (group,) = analysis.groups
    weights = [net[0].weight.detach()]
    wanted = l1_scores(group, weights, L1(**config), evidence)
    with torch.device("meta"):
        assert torch.equal(l1_scores(group, weights, L1(**config), evidence), wanted)
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(l1_scores(group, weights, L1(**config), evidence), wanted)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: weights lie there")
def test_weights_on_a_gpu_are_ranked_as_on_the_cpu():
    net = two()
    here = compiled(net, method=L1(ratio=0.5)).plan
    assert compiled(net.cuda(), X.cuda(), method=L1(ratio=0.5)).plan.slices == here.slices


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_no_scale_changes_the_set(norm, factor):
    net = two()
    method = L1(ratio=0.5, norm=norm)
    before = compiled(net, method=method, verify=False).plan.slices
    with torch.no_grad():
        net[0].weight.mul_(factor)
    assert compiled(net, method=method, verify=False).plan.slices == before


def test_maps_of_a_layer_with_one_channel():
    net = nn.Sequential(nn.Conv2d(3, 1, 3), nn.Conv2d(1, 6, 3), nn.Conv2d(6, 2, 3)).eval()
    plan = compiled(net, method=L1(ratio=0.5, by="mean-l1"), data=[X]).plan
    s = net[1](net[0](X)).detach().abs().sum((0, 2, 3))
    assert list(plan.keep("1.weight", 0)) == sorted(s.argsort(descending=True)[:3].tolist())


def test_steps_down_to_one_channel_by_maps():
    net = nn.Sequential(nn.Conv2d(3, 3, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3)).eval()
    plan = compiled(net, method=L1(ratio=0.9, by="mean-l1", steps=3), data=[X]).plan
    assert len(plan.keep("0.weight", 0)) == len(plan.keep("1.weight", 0)) == 1


class Functional(nn.Module):
    """A linear without a module, behind a layer that is cut to one channel."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 2, 3)
        self.weight = nn.Parameter(torch.randn(8, 2))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(F.linear(self.a(x).mean((2, 3)), self.weight).relu())


@pytest.mark.parametrize("options", [{"ratio": 0.5}, {}])
def test_no_group_is_lost_between_steps(options):
    budget = None if options else fxprune.Budget(params=0.5)
    once = compiled(Functional().eval(), method=L1(**options), budget=budget)
    slowly = compiled(Functional().eval(), method=L1(**options, steps=3), budget=budget)
    if options:
        assert slowly.plan.metrics == once.plan.metrics
    assert (
        slowly.plan.metrics["params_after"] <= 0.5 * slowly.plan.metrics["params_before"] or options
    )


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(8, 8, 3)

    def forward(self, x):
        return self.a(x).relu()


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Conv2d(3, 8, 3), Block()
        self.body, self.head = nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 3)
        self.alias = self.stem
        self.spare = nn.Linear(2, 2)  # forward does not use it

    def forward(self, x):
        return self.head(self.body(self.block(self.stem(x))))


@pytest.mark.parametrize(
    "ignore", [lambda m, n: not isinstance(m, Block), ["block", "spare"], ["block", "alias"]]
)
def test_ignored_layers_stay_ignored_in_every_step(ignore):
    once = compiled(Blocks().eval(), method=L1(ratio=0.5), ignore=ignore)
    slowly = compiled(Blocks().eval(), method=L1(ratio=0.5, steps=2), ignore=ignore)
    assert slowly.plan.keep("block.a.weight", 0) is None
    assert slowly.plan.metrics == once.plan.metrics


def test_what_an_earlier_step_cut_is_not_called_whole():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 16, 3), nn.Conv2d(16, 2, 3)).eval()
    report = compiled(net, method=L1(ratio=0.25, steps=2)).report  # group 0: 4, 3, 3
    assert not any("its whole width" in note.why for note in report.frozen)


def test_names_are_taken_literally_before_they_are_patterns():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.d = nn.ModuleDict({"a[0]": nn.Conv2d(3, 8, 3), "a0": nn.Conv2d(8, 8, 3)})
            self.c = nn.Conv2d(8, 2, 3)

        def forward(self, x):
            return self.c(self.d["a0"](self.d["a[0]"](x)))

    plan = compiled(Net().eval(), method=L1(ratio={"d.a[0]": 0.5})).plan
    assert len(plan.keep("d.a[0].weight", 0)) == 4
    assert plan.keep("d.a0.weight", 0) is None


def test_ratios_by_the_other_name_of_a_shared_layer():
    plan = compiled(Blocks().eval(), method=L1(ratio={"alias": 0.5})).plan
    assert len(plan.keep("stem.weight", 0)) == 4
    assert plan.keep("block.a.weight", 0) is None


@pytest.mark.parametrize(
    "config",
    [
        {"scoring": "greedy", "by": "mean-l1"},
        {"scoring": "greedy", "order": "random"},
        {"norm": "l2", "by": "mean-l1"},
        {"norm": "l2", "order": "random"},
    ],
)
def test_options_without_effect_are_refused(config):
    with pytest.raises(fxprune.OptionError, match="has no effect there"):
        L1(**config)


def test_maps_of_a_model_with_several_inputs_are_refused():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)

        def forward(self, x, y):
            return self.c(self.a(x) + self.b(y))

    data = [(torch.randn(5, 3, 8, 8), torch.randn(5, 3, 8, 8), torch.zeros(5))]
    with pytest.raises(fxprune.OptionError, match="several inputs"):
        compiled(Net().eval(), (X, X), method=L1(by="mean-l1"), data=data)


def test_greedy_leaves_out_what_went_and_nothing_else():
    """Which channels go is known only when every piece of a chunk has kept its one."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(1, 4, 1, bias=False)
            self.b = nn.Conv2d(4, 2, 1, bias=False)
            self.c = nn.Conv2d(2, 1, 1)

        def forward(self, x):
            u, v = self.a(x).chunk(2, 1)
            return self.c(self.b(torch.cat([v.relu(), u], 1)).relu())

    net = Net().eval()
    with torch.no_grad():
        net.a.weight.copy_(torch.tensor([4.0, 3.0, 2.0, 1.0]).view(4, 1, 1, 1))
        # inputs of b: v0, v1, u0, u1. By score u0, u1 stay; the chunk v has to keep v0 for u1.
        net.b.weight.copy_(torch.tensor([[1.0, 0, 1, 9], [5, 0, 1, 0]])[:, :, None, None])
    plan = compiled(net, torch.randn(1, 1, 4, 4), method=L1(ratio=0.5, scoring="greedy")).plan
    assert plan.keep("a.weight", 0) == (0, 2)
    assert plan.keep("b.weight", 0) == (1,)  # 6 against 2; of u0 and u1 it would be 1 against 10


# ---- training and measuring inside compile -------------------------------------------------------------


def test_training_may_change_only_values():
    def replaced(network):
        network.add_module("0", nn.Conv2d(3, 3, 3))

    with pytest.raises(fxprune.OptionError, match=r"fit changed `0.weight`"):
        compiled(two(), fit=replaced)
    with pytest.raises(fxprune.OptionError, match=r"float32 cpu, and is .* torch.float64"):
        compiled(two(), fit=lambda network: network.double())
    with pytest.raises(fxprune.OptionTypeError, match="returned another"):
        compiled(two(), fit=lambda network: copy.deepcopy(network))
    compiled(two(), fit=lambda network: network)  # the network itself, and anything else, is fine
    for fit in (fxprune.Recipe, nn.ReLU()):
        with pytest.raises(fxprune.OptionTypeError, match="trains in place"):
            compiled(two(), fit=fit)


def test_a_network_is_measured_in_eval_mode():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3)).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    compiled(net, evaluate=lambda m: m(torch.randn(8, 3, 10, 10)).mean().item())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(m.training for m in net.modules())


@pytest.mark.parametrize("given", [None, (1, 2), torch.ones(2), 1j])
def test_a_measure_gives_one_number(given):
    with pytest.raises(fxprune.OptionTypeError, match="must give one number"):
        compiled(two(), evaluate=lambda m: given)


def test_data_that_can_be_read_only_once():
    data = (torch.randn(4, 3, 10, 10) for _ in range(3))
    with pytest.raises(fxprune.OptionError, match="only once, and is needed 2 times"):
        compiled(two(), method=L1(ratio=0.5, by="mean-l1"), repair="bn", data=data)
    compiled(two(), method=L1(ratio=0.5, by="mean-l1"), data=data)


def test_a_bare_tensor_is_no_data():
    with pytest.raises(fxprune.OptionTypeError, match="data is a Tensor"):
        fxprune.compile(two(), data=torch.randn(8, 3, 10, 10), progress=False)


# ---- the scan ------------------------------------------------------------------


def distance(model):
    wanted = model(X).detach()
    return lambda m: -float((m(X) - wanted).norm().detach())


def test_functions_of_one_name_are_several_methods(tmp_path):
    net = two()
    first = lambda group, weights: weights[0].flatten(1).norm(dim=1)  # noqa: E731
    second = lambda group, weights: -weights[0].flatten(1).norm(dim=1)  # noqa: E731
    options = {"evaluate": distance(net), "ratios": [0.5], "progress": False}
    both = sensitivity(net, X, method=[first, second], **options)
    assert len(both.methods) == 2
    scores = [c.points[0].score for c in both.curves]
    assert scores[0] != scores[1]
    cached = [
        sensitivity(net, X, method=m, cache=tmp_path / "c", **options).curves[0].points[0].score
        for m in (first, second)
    ]
    assert cached == scores


def test_the_cache_knows_networks_by_their_channels(tmp_path):
    net = two()
    options = {"evaluate": distance(net), "ratios": [0.5], "progress": False}
    options["method"] = L1(by="mean-mean")
    for _ in range(4):  # other data, other channels
        data = [3 * torch.randn(4, 3, 10, 10) + torch.randn(1, 3, 1, 1)]
        fresh = sensitivity(net, X, data=data, **options)
        assert sensitivity(net, X, data=data, cache=tmp_path / "c", **options) == fresh


def test_the_cache_tells_graphs_apart(tmp_path):
    class Net(nn.Module):
        def __init__(self, act):
            super().__init__()
            self.a, self.b, self.act = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 3), act

        def forward(self, x):
            return self.b(self.act(self.a(x)))

    first, second = Net(torch.relu).eval(), Net(torch.tanh).eval()
    second.load_state_dict(first.state_dict())
    for net in (first, second):
        options = {"evaluate": distance(net), "ratios": [0.5], "progress": False}
        assert sensitivity(net, X, cache=tmp_path / "c", **options) == sensitivity(
            net, X, **options
        )


def test_a_scan_without_a_number_goes_on(tmp_path):
    options = {"evaluate": lambda m: math.nan, "ratios": [0.5], "progress": False}
    for _ in range(2):
        assert math.isnan(sensitivity(two(), X, cache=tmp_path / "c", **options).baseline) or True
    net = two()
    for _ in range(2):
        assert math.isnan(sensitivity(net, X, cache=tmp_path / "d", **options).baseline)


class Pair(nn.Module):
    """Two convolutions in one module: their groups are `pair` and `pair#1`."""

    def __init__(self):
        super().__init__()
        self.v, self.w = (
            nn.Parameter(torch.randn(8, 3, 3, 3)),
            nn.Parameter(torch.randn(10, 8, 3, 3)),
        )

    def forward(self, x):
        return F.conv2d(F.conv2d(x, self.v).relu(), self.w)


class OfPair(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair, self.head = Pair(), nn.Conv2d(10, 2, 1)

    def forward(self, x):
        return self.head(self.pair(x))


def test_a_proposal_cuts_the_groups_it_names_and_no_others():
    net = OfPair().eval()
    scan = sensitivity(net, X, evaluate=lambda m: float(len(m.pair.w) == 10), ratios=[0.5], progress=False)  # fmt: skip
    assert scan.propose() == {"pair": 0.5}
    plan = compiled(net, method=L1(ratio=scan.propose())).plan
    assert len(plan.keep("pair.v", 0)) == 4
    assert plan.keep("pair.w", 0) is None


def test_a_drop_of_just_so_much_is_bearable():
    for percent in range(1, 101):
        scan = Sensitivity("Net", percent / 100, (Curve("a", 8, "l1", (Point(0.5, 4, (percent - 1) / 100),)),))  # fmt: skip
        assert scan.propose(0.01) == {"a": 0.5}
        assert scan.propose(0.0099) == {}


@pytest.mark.parametrize(
    ("place", "key", "value"),
    [
        ("curve", "channels", "10"), ("curve", "channels", 3.7), ("curve", "channels", True),
        ("curve", "channels", -1), ("curve", "name", None), ("curve", "method", 3),
        ("point", "ratio", "0.5"), ("point", "ratio", math.nan), ("point", "ratio", 7),
        ("point", "kept", 2.5), ("point", "kept", "3"), ("scan", "curves", {}),
        ("scan", "curves", ""), ("scan", "schema_version", True), ("scan", "model", None),
    ],
)  # fmt: skip
def test_nothing_is_read_as_what_it_is_not(place, key, value):
    import json

    scan = json.loads(
        Sensitivity("N", 0.9, (Curve("a", 8, "l1", (Point(0.5, 4, 0.8),)),)).to_json()
    )
    owner = {"scan": scan, "curve": scan["curves"][0], "point": scan["curves"][0]["points"][0]}
    owner[place][key] = value
    with pytest.raises(fxprune.FxPruneError, match="not a sensitivity scan"):
        Sensitivity.from_json(json.dumps(scan))


# ---- what each line is for ----------------------------------------------------------------------


def test_greedy_leaves_the_users_weights_alone():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 2, 3)).eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    compiled(net, method=L1(ratio=0.5, scoring="greedy"))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_preset_wants_the_names_too():
    """As many convolutions as ResNet-56 has, under other names."""
    net = nn.Sequential(*[nn.Conv2d(3, 3, 1) for _ in range(55)]).eval()
    with pytest.raises(fxprune.PlanError, match=r"no prunable group `layer1.0.conv1`"):
        compiled(net, method=L1(preset="ResNet-56-A"))


def test_half_precision_maps_do_not_overflow():
    net = two().half()
    with torch.no_grad():
        net[0].weight.fill_(0.01).mul_(torch.arange(8).half()[:, None, None, None] + 1)
    data = [torch.full((2, 3, 64, 64), 1000.0).half()]
    plan = compiled(net, X.half(), method=L1(ratio=0.5, by="mean-l2"), data=data, verify=False).plan
    assert plan.keep("0.weight", 0) == (4, 5, 6, 7)


def test_rows_that_live_together_are_summed():
    """A chunk whose halves are added: row i and row i + 4 are one channel."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 8, 1, bias=False)
            self.b = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            left, right = self.a(x).chunk(2, dim=1)
            return self.b(left.relu() + right.relu())

    net = Net().eval()
    with torch.no_grad():  # norms: 1 + 10, 2 + 20, 9 + 1, 8 + 1
        norms = torch.tensor([1.0, 2, 9, 8, 10, 20, 1, 1])
        net.a.weight.copy_((norms / 3)[:, None, None, None].expand(8, 3, 1, 1))
    x = torch.rand(4, 3, 5, 5)
    for by in ("weights", "mean-l1"):
        plan = compiled(net, x, method=L1(ratio=0.5, by=by), data=[x]).plan
        assert plan.keep("a.weight", 0) == (0, 1, 4, 5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ratios": 0.5}, "ratios is 0.5"),
        ({"scope": 3}, "scope is 3"),
        ({"ignore": 3}, "ignore is 3"),
    ],
)
def test_a_scan_says_which_argument_is_wrong(options, words):
    with pytest.raises(fxprune.OptionTypeError, match=words):
        sensitivity(two(), X, evaluate=lambda m: 0.0, progress=False, **options)


def test_a_ratio_that_cannot_be_had_is_told():
    """One channel stays; with align, the least multiple; where nothing is clipped, nothing is said."""

    def notes(**options):
        return [n for n in compiled(two(), **options).report.notes if "asks for" in n]

    (note,) = notes(method=L1(ratio=0.9))
    assert note.startswith("of `0` 1 of 8 channels stay, where the ratio asks for 0")
    (note,) = notes(method=L1(ratio=0.8), align=4)
    assert note.startswith("of `0` 4 of 8 channels stay, where the ratio asks for 1")
    assert not notes(method=L1(ratio=0.5))
    assert not notes(method=L1(ratio=0.0))
    assert not notes(budget=0.5)
