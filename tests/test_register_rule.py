"""Rules, rewrites and refits from outside: what they make prunable, and how they are refused."""

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle import masked, relative_error
from torch import nn
from torch.nn import functional as F

import fxprune
from fxprune import extend
from fxprune.flow import RULES
from fxprune.labels import Label

BOUND = 1e-9
DOCUMENT = (Path(__file__).parents[1] / "docs" / "rules.md").read_text()


@torch.library.custom_op("fxprune_shop::swish", mutates_args=())
def swish(x: torch.Tensor, beta: float = 1.0) -> torch.Tensor:
    return x * torch.sigmoid(beta * x)


@swish.register_fake
def _(x, beta=1.0):
    return torch.empty_like(x)


@torch.library.custom_op("fxprune_shop::relu", mutates_args=())
def relu(x: torch.Tensor) -> torch.Tensor:
    """Not what torch calls relu: it mixes all channels."""
    return x.relu() + x.mean(1, keepdim=True)


@relu.register_fake
def _(x):
    return torch.empty_like(x)


def plain(x, scale):
    return torch.tanh(x) * scale[:, None, None]


@torch.fx.wrap
def checked(x, width):
    if x.shape[1] != width:
        raise ValueError(f"expected {width} channels")
    return x.sin()


@torch.fx.wrap
def mixed(x, kernel, offset=None):
    y = torch.einsum("oi,bihw->bohw", kernel[:, :, 0], x)
    return y if offset is None else y + offset[:, None, None]


@torch.fx.wrap
def flipped(x, dim):
    return x.flip(dim)


@torch.fx.wrap
def halves(x):
    return x + 1, x - 1


class Threshold(nn.Module):
    """Not traceable: it looks at values."""

    def __init__(self, channels):
        super().__init__()
        self.channels = channels
        self.amount = nn.Parameter(torch.rand(channels) / 4)
        self.gain = nn.Parameter(torch.rand(1, channels, 1, 1) + 0.5)

    def forward(self, x):
        if x.shape[1] != self.channels or torch.isnan(x).any():
            raise ValueError(f"expected {self.channels} channels")
        return self.gain * torch.sign(x) * torch.relu(x.abs() - self.amount[:, None, None])


class Mixer(nn.Module):
    def __init__(self, inner, outer):
        super().__init__()
        self.proj = nn.Linear(inner, outer)

    def forward(self, x):
        if x.shape[1] != self.proj.weight.shape[1]:
            raise ValueError("another width")
        return self.proj(x.movedim(1, -1)).movedim(-1, 1)


class Net(nn.Module):
    """conv, the operation under test, conv."""

    def __init__(self, middle, width=12):
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.scale = nn.Parameter(torch.randn(12))
        self.kernel = nn.Parameter(torch.randn(width, 12, 1))
        self.offset = nn.Parameter(torch.randn(width))
        self.layer = middle if isinstance(middle, nn.Module) else nn.Identity()
        self.middle = None if isinstance(middle, nn.Module) else middle
        self.last = nn.Conv2d(width, 4, 3, padding=1)

    def forward(self, x):
        x = self.layer(self.first(x))
        return self.last(x if self.middle is None else self.middle(self, x))


X = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def half(net):
    """The network at a third of its channels, which obeys the law."""
    pruned = fxprune.compile(net, X, method=fxprune.methods.L1(ratio=2 / 3))
    reference = masked(net, pruned.plan.to_dict())
    for x in (X, torch.cat([X, X.flip(0)], 3)):
        assert relative_error(reference(x), pruned(x)) <= BOUND
        assert relative_error(net(x), pruned(x)) > 1e-3
    return pruned


def make(middle, width=12):
    torch.manual_seed(1)
    return Net(middle, width).double().eval()


@pytest.fixture(autouse=True)
def forgotten():
    with extend.temporarily():
        yield


def assert_cut(pruned):
    assert pruned.first.out_channels == 4
    return pruned


@pytest.mark.parametrize(
    "target",
    [torch.ops.fxprune_shop.swish, torch.ops.fxprune_shop.swish.default, swish],
    ids=["packet", "overload", "definition"],
)
@pytest.mark.parametrize(
    "call",
    [
        lambda net, x: torch.ops.fxprune_shop.swish(x, 1.5),
        lambda net, x: torch.ops.fxprune_shop.swish.default(x, 1.5),
        lambda net, x: swish(x, 1.5),
    ],
    ids=["packet", "overload", "definition"],
)
def test_an_operator_has_its_rule_however_it_is_named(target, call):
    net = make(call)
    before = fxprune.analyze(net, X)
    assert "first" not in {g.name for g in before.groups}
    assert any("swish" in why for why in before.frozen.values())
    fxprune.register_rule(target)(extend.elementwise)
    pruned = assert_cut(half(net))
    exported = torch.export.export(pruned, (X,)).module()
    assert relative_error(pruned(X), exported(X)) <= BOUND


def test_a_namesake_of_torchs_own_operator_is_unknown():
    net = make(lambda net, x: torch.ops.fxprune_shop.relu(x))
    assert "first" not in {g.name for g in fxprune.analyze(net, X).groups}


def test_a_function_with_a_rule_is_not_traced_into():
    net = make(lambda net, x: plain(x, net.scale))

    @fxprune.register_rule(plain)
    def rule(flow, node):
        assert node.target is plain
        return extend.per_channel(flow, node, "scale")

    pruned = assert_cut(half(net))
    assert [n for n in pruned.graph.nodes if n.target is plain]
    assert pruned.scale.shape == (4,)
    for again in (copy.deepcopy(pruned), pickle.loads(pickle.dumps(pruned))):
        assert torch.equal(again(X), pruned(X))


def test_a_method_by_its_name():
    for known in ("relu_", "roll"):  # by torch's own tags, and by a rule of its own
        with pytest.raises(fxprune.FxPruneError, match=f"`{known.strip('_')}` has a rule already"):
            fxprune.register_rule(known)(extend.elementwise)
    net = make(lambda net, x: x.roll(1, 2))
    del RULES["roll"]
    assert not fxprune.analyze(net, X).groups
    fxprune.register_rule("roll")(lambda flow, node: extend.over_axes(flow, node, 2))
    assert_cut(half(net))


def test_a_layer_with_a_parameter_per_channel_and_a_size():
    net = make(Threshold(12))
    with pytest.raises(fxprune.TraceError):
        fxprune.compile(net, X)
    fxprune.register_rule(Threshold)(lambda f, n: extend.per_channel(f, n, "amount", "gain"))
    with pytest.raises(fxprune.FxPruneError, match="expected 12 channels"):
        fxprune.compile(net, X)
    shapes = []

    @fxprune.register_refit(Threshold)
    def sizes(layer, shape):
        shapes.append(shape)
        layer.channels = layer.amount.numel()

    pruned = assert_cut(half(net))
    assert shapes == [(2, 4, 8, 6)]
    assert pruned.layer.channels == 4
    assert pruned.layer.gain.shape == (1, 4, 1, 1)
    assert net.layer.channels == 12


def test_a_contraction_of_a_layer():
    net = make(Mixer(12, 9), 9)
    fxprune.register_rule(Mixer)(lambda f, n: extend.contraction(f, n, "proj.weight", "proj.bias"))
    pruned = assert_cut(half(net))
    assert pruned.layer.proj.weight.shape == (3, 4)
    assert pruned.plan.metrics["macs_before"] == 8 * 6 * (12 * 27 + 9 * 12 + 4 * 9 * 9)


def test_a_contraction_of_a_function():
    net = make(lambda net, x: mixed(x, net.kernel, offset=net.offset), 9)
    fxprune.register_rule(mixed)(lambda f, n: extend.contraction(f, n, "kernel", "offset"))
    pruned = assert_cut(half(net))
    assert pruned.kernel.shape == (3, 4, 1)
    assert pruned.offset.shape == (3,)
    (row,) = [row for row in pruned.report.layers if row.name == "kernel"]
    assert (row.channels_before, row.channels_after) == (9, 3)
    assert (row.macs_before, row.macs_after) == (8 * 6 * 9 * 12, 8 * 6 * 3 * 4)
    computed = make(lambda net, x: mixed(x, net.kernel * 2), 9)
    assert "computed" in str(fxprune.analyze(computed, X).frozen)


def test_an_operation_along_another_axis():
    net = make(lambda net, x: flipped(x, 3))

    @fxprune.register_rule(flipped)
    def rule(flow, node):
        return extend.over_axes(flow, node, extend.argument(node, "dim"), why="it is turned round")

    assert_cut(half(net))
    turned = fxprune.analyze(make(lambda net, x: flipped(x, 1)), X)
    assert any("it is turned round" in why for why in turned.frozen.values())


def test_a_rearrangement_is_run():
    net = make(lambda net, x: flipped(x, 1))
    fxprune.register_rule(flipped)(extend.rearrangement)
    assert_cut(half(net))


def test_freezing_gives_the_reason():
    net = make(lambda net, x: swish(x))
    fxprune.register_rule(swish)(lambda f, n: extend.freeze(f, n, "the shop wants it whole"))
    analysis = fxprune.analyze(net, X)
    assert any("the shop wants it whole" in why for why in analysis.frozen.values())


def test_an_argument_follows_the_cut():
    net = make(lambda net, x: checked(x, 12))
    fxprune.register_rule(checked)(extend.elementwise)
    with pytest.raises(fxprune.FxPruneError, match="expected 12 channels"):
        fxprune.compile(net, X)

    @fxprune.register_rewrite(checked)
    def rewrite(cut, node):
        return extend.call_with(cut, node, width=extend.size_after(cut, node.args[0], 1))

    pruned = assert_cut(half(net))
    assert torch.equal(pickle.loads(pickle.dumps(pruned))(X), pruned(X))
    keyword = make(lambda net, x: checked(x, width=12))
    assert_cut(half(keyword))


def test_several_results():
    @fxprune.register_rule(halves)
    def rule(flow, node):
        x = flow.first(node)
        return (x, x)

    net = make(lambda net, x: halves(x)[0] * halves(x)[1])
    assert_cut(half(net))


def test_a_second_rule_is_refused():
    fxprune.register_rule(swish)(extend.elementwise)
    with pytest.raises(fxprune.OptionError, match=r"`fxprune_shop\.swish` has a rule already"):
        fxprune.register_rule(torch.ops.fxprune_shop.swish.default)(extend.elementwise)
    with pytest.raises(fxprune.OptionError, match="has a rule already"):
        fxprune.register_rule(nn.Conv2d)(extend.elementwise)
    fxprune.register_rewrite(swish)(lambda cut, node: None)
    with pytest.raises(fxprune.OptionError, match="has a rewrite already"):
        fxprune.register_rewrite(swish)
    fxprune.register_refit(Threshold)(lambda layer, shape: None)
    with pytest.raises(fxprune.OptionError, match="`Threshold` has a refit already"):
        fxprune.register_refit(Threshold)


@pytest.mark.parametrize("target", [None, 3, "", int, nn.ReLU()])
def test_what_is_no_target_is_refused(target):
    with pytest.raises(fxprune.OptionTypeError, match="register_rule got"):
        fxprune.register_rule(target)
    with pytest.raises(fxprune.OptionTypeError):
        fxprune.register_refit(target)


def test_what_is_no_rule_is_refused():
    with pytest.raises(fxprune.OptionTypeError, match="the rule is a str"):
        fxprune.register_rule(swish)("elementwise")
    with pytest.raises(fxprune.OptionTypeError, match="Threshold is a layer"):
        fxprune.register_rewrite(Threshold)
    with pytest.raises(fxprune.OptionTypeError):
        fxprune.register_rule()


def test_what_was_registered_is_forgotten():
    net = make(lambda net, x: swish(x))
    with extend.temporarily():
        fxprune.register_rule(swish, Threshold, plain)(extend.elementwise)
        assert fxprune.analyze(net, X).groups
    assert not fxprune.analyze(net, X).groups
    fxprune.register_rule(swish)(extend.elementwise)
    assert fxprune.analyze(net, X).groups


def long_label(flow, node):
    return Label((2, 12, 8, 6), torch.zeros(1, 12, 8, dtype=torch.int64))


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (lambda f, n: None, "returned None, where a tensor of shape .2, 12, 8, 6. needs a Label"),
        (lambda f, n: f.first(n).ids, "returned a Tensor"),
        (lambda f, n: (f.first(n),), "returned a tuple"),
        (lambda f, n: Label((2, 12), torch.zeros(1, 1).long()), "of shape .2, 12. for a tensor"),
        (long_label, "ids of shape .1, 12, 8."),
        (lambda f, n: Label((2, 12, 8, 6), torch.zeros(1, 5, 1, 1).long()), "ids of shape"),
        (lambda f, n: Label((2, 12, 8, 6), torch.zeros(1, 1, 1, 1)), "no tensor of int64"),
        (lambda f, n: Label((2, 12, 8, 6), torch.full((1, 1, 1, 1), 9999)), "nobody made"),
        (lambda f, n: 1 / 0, "raised ZeroDivisionError: division by zero"),
        (lambda f, n: extend.per_channel(f, n, "gamma"), "has no argument `gamma`"),
        (lambda f, n: extend.per_channel(f, n, axis=7), "no axis 7"),
    ],
)
def test_misfits_are_refused_by_the_rules_name(rule, said):
    net = make(lambda net, x: swish(x))
    rule.__qualname__ = "my_rule"
    fxprune.register_rule(swish)(rule)
    with pytest.raises(fxprune.UnsupportedOpError, match=said) as caught:
        fxprune.analyze(net, X)
    assert "test_register_rule.py:" in caught.value.where
    assert "my_rule" in str(caught.value) or "swish" in str(caught.value)


def test_misfits_of_layers_and_of_several_results():
    net = make(Threshold(12))
    with extend.temporarily():
        fxprune.register_rule(Threshold)(extend.elementwise)
        with pytest.raises(fxprune.UnsupportedOpError, match="`amount`: use per_channel"):
            fxprune.analyze(net, X)
    with extend.temporarily():
        fxprune.register_rule(Threshold)(lambda f, n: extend.per_channel(f, n, "weight"))
        with pytest.raises(fxprune.UnsupportedOpError, match="has no tensor `weight`"):
            fxprune.analyze(net, X)
    with extend.temporarily():
        fxprune.register_rule(Threshold)(lambda f, n: extend.per_channel(f, n, "amount", axis=2))
        with pytest.raises(fxprune.UnsupportedOpError, match="no entry for each of 8 channels"):
            fxprune.analyze(net, X)
    with extend.temporarily():
        fxprune.register_rule(Threshold)(lambda f, n: extend.per_channel(f, n, "amount"))
        fxprune.register_refit(Threshold)(lambda layer, shape: layer.nothing.here)
        with pytest.raises(fxprune.UnsupportedOpError, match="raised AttributeError"):
            fxprune.compile(net, X)
    fxprune.register_rule(halves)(lambda f, n: (f.first(n),))
    with pytest.raises(fxprune.UnsupportedOpError, match="where the operation gives 2 values"):
        fxprune.analyze(make(lambda net, x: halves(x)[0]), X)


def test_a_rule_that_says_too_much_never_gives_a_wrong_network():
    net = make(lambda net, x: torch.ops.fxprune_shop.relu(x))
    fxprune.register_rule(relu)(extend.elementwise)
    with pytest.raises(fxprune.VerifyError):
        fxprune.compile(net, X)


def test_a_pruned_network_is_pruned_again():
    net = make(lambda net, x: F.relu(swish(x)))
    fxprune.register_rule(swish)(extend.elementwise)
    once = fxprune.compile(net, X, method=fxprune.methods.L1(ratio=1 / 3))
    twice = fxprune.compile(once, X, method=fxprune.methods.L1(ratio=1 / 2))
    assert twice.first.out_channels == 4
    assert relative_error(masked(net, twice.plan.to_dict())(X), twice(X)) <= BOUND


def blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", DOCUMENT, flags=re.DOTALL)


def test_the_example_of_the_document_runs(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", blocks()[0]], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    left = int(done.stdout.split(maxsplit=1)[0])
    assert 0 < left < 16
    assert "in float64" in done.stdout


def test_the_names_in_the_document_exist():
    for name in re.findall(r"\bextend\.(\w+)", DOCUMENT):
        assert hasattr(extend, name), name
    for name in re.findall(r"\bfxprune\.(\w+)", DOCUMENT):
        assert hasattr(fxprune, name), name
    for line in re.findall(r"^\| `(\w+)\(flow, node", DOCUMENT, flags=re.MULTILINE):
        assert hasattr(extend, line), line
