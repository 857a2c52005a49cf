"""The zoo: counts of the papers to the digit, keys, shapes, training, pruning, clear refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxprune
from fxprune import zoo
from fxprune.cost import Cost, macs, thop
from fxprune.errors import OptionError, OptionTypeError

# name -> MACs of convolutions and linears, the same + 2 x batch-norm elements, parameters
COUNTS = {
    "resnet20": (40_551_040, 40_927_872, 269_722),
    "resnet32": (68_862_592, 69_468_800, 464_154),
    "resnet44": (97_174_144, 98_009_728, 658_586),
    "resnet56": (125_485_696, 126_550_656, 853_018),
    "resnet110": (252_887_680, 254_984_832, 1_727_962),
    "mobilenet_v1": (568_740_352, 578_825_728, 4_231_976),
    "vgg16_bn": (313_463_808, 314_017_792, 14_991_946),
    "vgg19_bn": (398_398_464, 399_005_696, 20_304_202),
}
SMALL = {  # one of each family, quick to run: options, and an image's shape
    "resnet20": ({"width": 4}, (3, 16, 16)),
    "mobilenet_v1": ({"width": 4, "num_classes": 10}, (3, 32, 32)),
    "vgg16_bn": ({"width": 4}, (3, 32, 32)),
}


def small(name, **options):
    torch.manual_seed(0)
    return zoo.build(name, **SMALL[name][0], **options), torch.randn(4, *SMALL[name][1])


def conv_macs(model, x):
    """MACs by the sizes that each layer sees: nobody's counter."""
    total = 0

    def add(module, args, out):
        nonlocal total
        total += out[0].numel() * module.weight[0].numel()

    for m in model.modules():
        if isinstance(m, nn.Conv2d | nn.Linear):
            m.register_forward_hook(add)
    model(x)
    return total


@pytest.mark.parametrize("name", zoo.names())
def test_counts_of_the_papers(name):
    with torch.device("meta"):
        model, x = zoo.build(name).eval(), torch.zeros(2, *zoo.input_shape(name))
    total, with_norms, parameters = COUNTS[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert macs(model, (x,)) == total  # torch.utils.flop_counter's half
    assert thop(model, (x,)) == with_norms
    assert conv_macs(model, x[:1]) == total


@pytest.mark.parametrize("name", ["mobilenet_v1", "vgg16_bn", "vgg19_bn"])
def test_the_compiler_counts_the_same(name):
    """The residual networks are in test_cost.py."""
    model, x = zoo.build(name).eval(), torch.zeros(1, *zoo.input_shape(name))
    analysis = fxprune.analyze(model, x)
    cost = Cost.of(analysis)
    assert cost.macs(analysis.everything()) == COUNTS[name][0]
    assert cost.params(analysis.everything()) == COUNTS[name][2]


def test_every_name_is_counted_and_in_order():
    assert set(zoo.names()) == set(COUNTS)
    assert sorted(zoo.names(), key=lambda name: COUNTS[name][2]) == list(zoo.names())


def test_input_shapes():
    assert zoo.input_shape("resnet56") == zoo.input_shape("vgg19_bn") == (3, 32, 32)
    assert zoo.input_shape("mobilenet_v1") == (3, 224, 224)
    with pytest.raises(OptionError, match="did you mean 'mobilenet_v1'"):
        zoo.input_shape("MobileNet")


def test_keys_are_those_of_the_published_weights():
    modules = {key.rpartition(".")[0] for key in zoo.resnet20().state_dict()}
    blocks = {
        f"layer{stage}.{i}.{part}"
        for stage in (1, 2, 3)
        for i in range(3)
        for part in ("conv1", "bn1", "conv2", "bn2")
    }
    assert modules == {"conv1", "bn1", "linear"} | blocks


@pytest.mark.parametrize(("name", "letter"), [("vgg16_bn", "D"), ("vgg19_bn", "E")])
def test_vgg_features_are_torchvisions(name, letter):
    from torchvision.models import vgg

    theirs = vgg.make_layers(vgg.cfgs[letter], batch_norm=True).eval()
    ours = zoo.build(name).features.eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)


def test_vgg_without_biases():
    with_bias, without = zoo.vgg16_bn(width=2), zoo.vgg16_bn(width=2, bias=False)
    count = sum(p.numel() for p in with_bias.parameters()) - sum(
        p.numel() for p in without.parameters()
    )
    assert count == 2 * (2 * 1 + 2 * 2 + 3 * 4 + 3 * 8 + 3 * 8)  # a bias per filter


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(8, 8), (32, 32), (28, 28), (7, 5), (1, 1), (64, 40)])
def test_shapes_and_tracing(name, size):
    model = small(name, in_channels=2)[0].eval()
    x = torch.randn(3, 2, *size)
    assert model(x).shape == (3, 10)
    torch.testing.assert_close(fx.symbolic_trace(model)(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", SMALL)
def test_it_learns_a_batch(name):
    model, x = small(name)
    y = torch.arange(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize("name", SMALL)
def test_it_is_pruned_and_verified(name):
    model, x = small(name)
    model(x)  # batch norms that tell channels apart
    pruned = fxprune.compile(model.eval(), x, method="l1", budget=0.5, progress=False)
    metrics = pruned.plan.metrics
    assert 0.3 < metrics["macs_after"] / metrics["macs_before"] <= 0.5
    masked = fxprune.mask(model, pruned.plan)
    torch.testing.assert_close(
        pruned.double()(x.double()), masked.double()(x.double()), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize(
    ("name", "count"),
    [("resnet20", COUNTS["resnet20"][0]), ("vgg16_bn", COUNTS["vgg16_bn"][0])],
)
def test_without_an_example_it_is_measured_at_its_own_size(name, count):
    pruned = fxprune.compile(zoo.build(name), method="l1", budget=0.9, verify=False, progress=False)
    assert pruned.plan.metrics["macs_before"] == count


def test_the_example_is_like_the_weights():
    x = zoo.mobilenet_v1(in_channels=1, width=2).double().example_input_array
    assert (x.shape, x.dtype) == ((1, 1, 224, 224), torch.float64)


@pytest.mark.parametrize(("shortcut", "before"), [("pad-both", 4), ("pad-after", 0)])
def test_shortcut_strides_and_pads(shortcut, before):
    block = zoo.BasicBlock(8, 16, 2, shortcut).eval()
    nn.init.zeros_(block.bn2.weight)  # leaves relu(shortcut(x))
    x = torch.randn(2, 8, 6, 6)
    expected = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, before, 8 - before)).relu()
    torch.testing.assert_close(block(x), expected, rtol=0, atol=0)


def test_the_shortcuts_differ_only_where_channels_stand():
    """Moving the channels of a stage turns one network into the other: same counts, other sums."""
    both, after = (small("resnet20", shortcut=s)[0].eval() for s in ("pad-both", "pad-after"))
    assert list(both.state_dict()) == list(after.state_dict())
    after.load_state_dict(both.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert macs(both, (x,)) == macs(after, (x,))
    assert not torch.allclose(both(x), after(x))
    pruned = fxprune.compile(after, x, method="l1", budget=0.5, progress=False)  # verified
    assert pruned.plan.metrics["macs_after"] * 2 <= pruned.plan.metrics["macs_before"]


def test_odd_width_is_taken():
    for shortcut in ("pad-both", "pad-after"):
        net = zoo.cifar_resnet(8, width=3, shortcut=shortcut)
        assert net(torch.randn(2, 3, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("depth", "near"), [(18, "14 or depth=20"), (1, "8"), (57, "56 or depth=62")]
)
def test_depth_must_fit(depth, near):
    with pytest.raises(OptionError, match="no CIFAR ResNet of depth") as caught:
        zoo.cifar_resnet(depth)
    assert near in str(caught.value)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("option", ["num_classes", "in_channels", "width"])
def test_counts_are_checked(name, option):
    with pytest.raises(OptionError, match=f"`{option}` must be at least 1, not 0"):
        zoo.build(name, **{option: 0})
    for wrong in (2.5, True, "16"):
        with pytest.raises(OptionTypeError, match=f"`{option}` must be an integer, not {wrong!r}"):
            zoo.build(name, **{option: wrong})


def test_other_options_are_checked():
    with pytest.raises(OptionError, match="no shortcut 'B'") as caught:
        zoo.resnet20(shortcut="B")
    assert "fix:   use one of 'pad-both', 'pad-after'" in str(caught.value)
    with pytest.raises(OptionTypeError, match="`bias` must be True or False, not 1"):
        zoo.vgg16_bn(bias=1)


def test_unknown_names_offer_the_nearest():
    with pytest.raises(OptionError, match="did you mean 'resnet56'"):
        zoo.build("ResNet-56")
    with pytest.raises(OptionError, match="did you mean 'vgg16_bn'"):
        zoo.build("vgg16")
    with pytest.raises(OptionError, match="resnet20, resnet32"):
        zoo.build("zzz")
    with pytest.raises(OptionTypeError, match="a string, not 56"):
        zoo.build(56)
    with pytest.raises(OptionError, match="takes no option 'classes'") as caught:
        zoo.build("vgg16_bn", classes=3)
    assert "it takes num_classes, in_channels, width, bias" in str(caught.value)


def test_every_name_builds():
    for name in zoo.names():
        assert zoo.build(name, width=2, num_classes=7)(torch.randn(2, 3, 8, 8)).shape == (2, 7)
