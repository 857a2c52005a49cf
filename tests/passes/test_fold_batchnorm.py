"""Folding batch norm keeps the function, takes one node away per fold, and says what it refuses."""

import copy

import pytest
import torch
from hypothesis import assume, given, note, settings
from hypothesis import strategies as st
from oracle import masked, relative_error
from strategies import nets
from torch import nn
from torch.fx import GraphModule, symbolic_trace
from torch.fx.passes.shape_prop import ShapeProp

import fxprune
from fxprune.passes.fold_batchnorm import fold_batchnorm

BOUND = 1e-9  # relative, float64: one multiplication and one addition are moved
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)  # fmt: skip
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@torch.no_grad()
def alive(module, seed=0):
    """In float64 and eval mode, every value random, statistics included."""
    g = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    for name, t in [*module.named_parameters(), *module.named_buffers()]:
        if t.is_floating_point():
            low = 0.2 if name.endswith("running_var") else -1.0
            t.copy_(low + 2 * torch.rand(t.shape, generator=g, dtype=t.dtype))
    return module


def image(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def candidates(gm):
    """Norms that a convolution or linear feeds directly."""
    found = []
    for node in gm.graph.nodes:
        if node.op == "call_module" and isinstance(gm.get_submodule(node.target), NORMS):
            before = node.args[0]
            if before.op == "call_module" and isinstance(gm.get_submodule(before.target), LAYERS):
                found.append(node.target)
    return found


def fold(net, x, *, folded, skipped=()):
    """Fold a network and check all that must hold whatever is folded; the reasons of what is not."""
    gm = net if isinstance(net, GraphModule) else symbolic_trace(net)
    ShapeProp(gm).propagate(x)  # the rank decides for a linear
    expected, code = gm(x), gm.code
    before = {k: v.clone() for k, v in gm.state_dict().items()}
    out, report = fold_batchnorm(gm)
    assert relative_error(expected, out(x)) <= BOUND
    assert [bn for _, bn in report.folded] == list(folded)
    assert list(report.skipped) == list(skipped)
    assert len(out.graph.nodes) == len(gm.graph.nodes) - len(report.folded)
    assert gm.code == code
    assert gm.state_dict().keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in gm.state_dict().items())
    return dict(report.skipped)


# ---- the property -------------------------------------------------------------------------------


@given(net=nets())
def test_fold_keeps_the_function(net):
    note(repr(net))
    gm = symbolic_trace(net)
    state = {k: v.clone() for k, v in gm.state_dict().items()}
    out, report = fold_batchnorm(gm)
    for x in net.inputs():
        assert relative_error(gm(x), out(x)) <= BOUND
    assert len(out.graph.nodes) == len(gm.graph.nodes) - len(report.folded)
    named = {*report.skipped, *(bn for _, bn in report.folded)}
    assert named == {*candidates(gm)}  # none is passed over in silence
    assert all(torch.equal(v, state[k]) for k, v in gm.state_dict().items())
    again, second = fold_batchnorm(out)
    assert second.folded == ()
    assert dict(second.skipped) == dict(report.skipped)
    for x in net.inputs():
        assert relative_error(out(x), again(x)) == 0


@settings(max_examples=max(settings.default.max_examples // 4, 10))
@given(net=nets(), ratio=st.sampled_from((0.0, 0.3, 0.5)))
def test_compile_folds_and_the_plan_replays_it(net, ratio, tmp_path_factory):
    note(repr(net))
    x = net.example_input()
    assume(fxprune.analyze(net, x).groups)
    options = {"method": fxprune.methods.L1(ratio=ratio), "progress": False}
    plain = fxprune.compile(net, x, **options)
    folded = fxprune.compile(net, x, fold=True, **options)
    path = tmp_path_factory.mktemp("fold") / "net.safetensors"
    fxprune.save(folded, path)
    loaded = fxprune.load(path, net)
    replayed = fxprune.apply(net, fxprune.Plan.from_json(folded.plan.to_json()), x)
    reference = masked(net, folded.plan.to_dict())
    assert folded.plan.slices == plain.plan.slices
    assert loaded.plan == replayed.plan == folded.plan
    assert folded.plan.metrics["params_after"] == sum(p.numel() for p in folded.parameters())
    for x in net.inputs():
        assert relative_error(plain(x), folded(x)) <= BOUND
        assert relative_error(reference(x), folded(x)) <= BOUND
        assert relative_error(folded(x), replayed(x)) == 0
        assert relative_error(folded(x), loaded(x)) == 0


# ---- what is folded -----------------------------------------------------------------------------

PAIRS = {
    "conv1d": (lambda b: nn.Conv1d(3, 4, 3, bias=b), nn.BatchNorm1d, (2, 3, 9)),
    "conv2d": (lambda b: nn.Conv2d(3, 4, 3, padding=1, bias=b), nn.BatchNorm2d, (2, 3, 6, 6)),
    "reflect": (lambda b: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", bias=b), nn.BatchNorm2d, (2, 3, 6, 6)),
    "grouped": (lambda b: nn.Conv2d(4, 6, 3, groups=2, bias=b), nn.BatchNorm2d, (2, 4, 6, 6)),
    "depthwise": (lambda b: nn.Conv2d(4, 4, 3, groups=4, bias=b), nn.BatchNorm2d, (2, 4, 6, 6)),
    "conv3d": (lambda b: nn.Conv3d(2, 4, 2, bias=b), nn.BatchNorm3d, (2, 2, 4, 4, 4)),
    "transposed1d": (lambda b: nn.ConvTranspose1d(3, 4, 3, bias=b), nn.BatchNorm1d, (2, 3, 9)),
    "transposed2d": (lambda b: nn.ConvTranspose2d(3, 4, 3, stride=2, bias=b), nn.BatchNorm2d, (2, 3, 5, 5)),
    "square": (lambda b: nn.ConvTranspose2d(4, 4, 3, bias=b), nn.BatchNorm2d, (2, 4, 5, 5)),
    "transposed3d": (lambda b: nn.ConvTranspose3d(2, 4, 2, bias=b), nn.BatchNorm3d, (2, 2, 4, 4, 4)),
    "linear": (lambda b: nn.Linear(3, 4, bias=b), nn.BatchNorm1d, (5, 3)),
}  # fmt: skip


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 1e-3, 0.5])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", PAIRS)
def test_pairs(kind, bias, affine, eps):
    layer, norm, shape = PAIRS[kind]
    net = alive(nn.Sequential(layer(bias), norm(4 if kind != "grouped" else 6, eps, affine=affine)))
    assert fold(net, image(*shape), folded=["1"]) == {}


@pytest.mark.parametrize("variance", [0.0, 1e-8, 1e4])
@pytest.mark.parametrize("gamma", [0.0, -2.0])
def test_extreme_statistics(variance, gamma):
    net = alive(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with torch.no_grad():
        net[1].running_var.fill_(variance)
        net[1].weight.fill_(gamma)
    fold(net, image(2, 3, 6, 6), folded=["1"])


def test_two_norms_in_a_row_are_both_folded():
    net = alive(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    fold(net, image(2, 3, 6, 6), folded=["1", "2"])


def test_several_pairs_come_in_graph_order_and_only_the_named_ones_are_folded():
    net = alive(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)))  # fmt: skip
    x = image(2, 3, 6, 6)
    fold(net, x, folded=["1", "4"])
    out, report = fold_batchnorm(symbolic_trace(net), [("3", "4")])
    assert report.folded == (("3", "4"),)
    assert relative_error(net(x), out(x)) <= BOUND
    assert [n.target for n in out.graph.nodes if n.op == "call_module"] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_layout_and_flags_stay(dtype):
    net = alive(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))).to(dtype)
    net = net.to(memory_format=torch.channels_last)
    net[0].weight.requires_grad_(False)
    out, _ = fold_batchnorm(symbolic_trace(net))
    conv = out.get_submodule("0")
    assert conv.weight.dtype == conv.bias.dtype == dtype
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not conv.weight.requires_grad
    assert not conv.bias.requires_grad
    assert isinstance(conv.weight, nn.Parameter)
    assert isinstance(conv.bias, nn.Parameter)


def test_nothing_to_fold():
    fold(alive(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))), image(2, 3, 6, 6), folded=[])  # fmt: skip


# ---- what is refused ----------------------------------------------------------------------------


class ConvNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x))


X = image(2, 4, 6, 6)


def test_a_second_reader():
    class Net(ConvNorm):
        def forward(self, x):
            y = self.conv(x)
            return self.bn(y) + y

    assert fold(alive(Net()), X, folded=[], skipped=["bn"]) == {"bn": "`conv` has 2 readers"}


def test_two_norms_after_one_convolution():
    class Net(ConvNorm):
        def __init__(self):
            super().__init__()
            self.other = nn.BatchNorm2d(4)

        def forward(self, x):
            y = self.conv(x)
            return self.bn(y) * self.other(y)

    reasons = fold(alive(Net()), X, folded=[], skipped=["bn", "other"])
    assert set(reasons.values()) == {"`conv` has 2 readers"}


def test_the_output_is_a_reader():
    class Net(ConvNorm):
        def forward(self, x):
            y = self.conv(x)
            return self.bn(y), y

    assert fold(alive(Net()), X, folded=[], skipped=["bn"]) == {"bn": "`conv` has 2 readers"}


@pytest.mark.parametrize("norm_first", [True, False])
def test_a_convolution_called_at_two_nodes(norm_first):
    """Each call has one reader: torch.fx's own fuse folds here, and changes the other call."""

    class Net(ConvNorm):
        def forward(self, x):
            if norm_first:
                return self.conv(self.bn(self.conv(x)).relu())
            return self.bn(self.conv(self.conv(x).relu()))

    reasons = fold(alive(Net()), X, folded=[], skipped=["bn"])
    assert reasons == {"bn": "module `conv` is called by 2 nodes"}


def test_a_norm_called_at_two_nodes():
    class Net(ConvNorm):
        def forward(self, x):
            return self.bn(self.bn(self.conv(x)).relu())

    assert fold(alive(Net()), X, folded=[], skipped=["bn"]) == {"bn": "module `bn` is called by 2 nodes"}  # fmt: skip


def test_a_module_under_two_names():
    """A graph may call one convolution by two names."""
    net = alive(ConvNorm())
    root = {"a": net.conv, "b": net.conv, "bn": net.bn}
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_module("bn", (graph.call_module("a", (x,)),))
    graph.output(graph.call_module("b", (y,)))
    (reason,) = fold(GraphModule(root, graph), X, folded=[], skipped=["bn"]).values()
    assert "called by 2 nodes" in reason or "shared" in reason


@pytest.mark.parametrize("which", ["weight", "bias"])
def test_a_parameter_shared_with_another_layer(which):
    class Net(ConvNorm):
        def __init__(self):
            super().__init__()
            self.other = nn.Conv2d(4, 4, 3, padding=1)
            setattr(self.other, which, getattr(self.conv, which))

        def forward(self, x):
            return self.other(self.bn(self.conv(x)))

    reasons = fold(alive(Net()), X, folded=[], skipped=["bn"])
    assert reasons == {"bn": "a parameter of the pair is shared with another layer"}


@pytest.mark.parametrize("tensor", ["conv.weight", "conv.bias", "bn.weight"])
def test_a_tensor_that_the_graph_also_reads(tensor):
    class Net(ConvNorm):
        def forward(self, x):
            owner, name = tensor.split(".")
            scale = getattr(getattr(self, owner), name).mean()
            return self.bn(self.conv(x)) * scale

    (reason,) = fold(alive(Net()), X, folded=[], skipped=["bn"]).values()
    assert tensor in reason


def test_no_running_statistics():
    net = ConvNorm()
    net.bn = nn.BatchNorm2d(4, track_running_stats=False)
    assert fold(alive(net), X, folded=[], skipped=["bn"]) == {"bn": "it has no running statistics"}


def test_a_grouped_transposed_convolution():
    net = ConvNorm()
    net.conv = nn.ConvTranspose2d(4, 4, 3, groups=2)
    reasons = fold(alive(net), X, folded=[], skipped=["bn"])
    assert reasons == {"bn": "the convolution is transposed and grouped"}


@pytest.mark.parametrize("where", ["conv", "bn"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])  # fmt: skip
def test_hooks(where, kind):
    net = alive(ConvNorm())
    gm = symbolic_trace(net)
    getattr(gm.get_submodule(where), kind)(lambda *a: None)
    assert fold(gm, X, folded=[], skipped=["bn"]) == {"bn": "one of the two has hooks"}


def test_a_parametrized_convolution():
    """Its weight is computed at every call: nothing to fold into, and that has to be said."""

    class Twice(nn.Module):
        def forward(self, w):
            return 2 * w

    net = alive(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)))
    nn.utils.parametrize.register_parametrization(net[0], "weight", Twice())
    out, report = fold_batchnorm(fxprune.apply(net, fxprune.analyze(net, X).plan({}), X))
    assert relative_error(net(X), out(X)) <= BOUND
    assert report.folded == ()
    assert "parametriz" in report.skipped["1"]


def test_a_linear_over_other_axes_than_the_norm():
    """On [N, L, F] the linear makes F, and the norm scales L."""
    net = alive(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(4)))
    (reason,) = fold(net, image(2, 4, 3), folded=[], skipped=["1"]).values()
    assert reason


def test_a_linear_over_other_axes_of_equal_size():
    """With L = F all shapes would fit: only the rank of the example input tells."""
    net = alive(nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 4), nn.BatchNorm1d(4)))
    x = image(2, 4, 3)
    pruned = fxprune.compile(net, x, method=fxprune.methods.L1(ratio=0.5), fold=True)
    assert relative_error(masked(net, pruned.plan.to_dict())(x), pruned(x)) <= BOUND
    assert pruned.plan.folds == ()


def test_reasons_are_in_the_report_of_the_compiler():
    class Net(ConvNorm):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(4, 4, 1)
            self.head = nn.Conv2d(4, 2, 1)

        def forward(self, x):
            y = self.conv(self.first(x))
            return self.head(self.bn(y) + y)

    net = fxprune.compile(alive(Net()), X, method=fxprune.methods.L1(ratio=0.5), fold=True)
    assert "`bn` was not folded: `conv` has 2 readers" in net.report.notes
    assert net.plan.folds == ()


def test_a_plan_that_folds_what_cannot_be_folded_is_refused():
    class Net(nn.Module):
        def __init__(self, twice=False):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
            self.twice = twice

        def forward(self, x):
            y = self.conv(x)
            return self.bn(y) + y if self.twice else self.bn(y)

    analysis = fxprune.analyze(alive(Net()), X)
    plan = fxprune.compile(alive(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))), X, fold=True).plan  # fmt: skip
    data = {**plan.to_dict(), "slices": [], "fingerprint": analysis.fingerprint}
    data["folds"] = [{"conv": "conv", "bn": "bn", "compactor": False}]
    assert fxprune.apply(alive(Net()), fxprune.Plan.from_dict(data), X).plan.folds
    with pytest.raises(fxprune.UnsupportedOpError, match="folds `bn`, which cannot be folded here") as caught:  # fmt: skip
        fxprune.apply(alive(Net(twice=True)), fxprune.Plan.from_dict(data), X)
    assert "`conv` has 2 readers" in str(caught.value)


def test_the_argument_is_untouched_when_nothing_is_refused():
    gm = symbolic_trace(alive(ConvNorm()))
    twin = copy.deepcopy(gm)
    out, _ = fold_batchnorm(gm)
    with torch.no_grad():
        for t in [*out.parameters(), *out.buffers()]:
            t.zero_()
    assert relative_error(twin(X), gm(X)) == 0
