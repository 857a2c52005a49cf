"""The zoo: parameter counts of the paper, keys, shapes, tracing, and clear refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from fxprune import zoo
from fxprune.errors import OptionError, OptionTypeError


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet20", 269_722),
        ("resnet32", 464_154),
        ("resnet44", 658_586),
        ("resnet56", 853_018),
        ("resnet110", 1_727_962),
    ],
)
def test_parameter_counts(name, parameters):
    assert sum(p.numel() for p in zoo.build(name).parameters()) == parameters


def test_keys_are_those_of_the_published_weights():
    modules = {key.rpartition(".")[0] for key in zoo.resnet20().state_dict()}
    blocks = {
        f"layer{stage}.{i}.{part}"
        for stage in (1, 2, 3)
        for i in range(3)
        for part in ("conv1", "bn1", "conv2", "bn2")
    }
    assert modules == {"conv1", "bn1", "linear"} | blocks


@pytest.mark.parametrize("size", [(8, 8), (32, 32), (7, 5), (4, 4)])
def test_shapes_and_tracing(size):
    model = zoo.resnet20(num_classes=7, in_channels=2, width=4).eval()
    x = torch.randn(3, 2, *size)
    assert model(x).shape == (3, 7)
    torch.testing.assert_close(fx.symbolic_trace(model)(x), model(x), rtol=0, atol=0)


def test_shortcut_strides_and_pads_before_and_after():
    block = zoo.BasicBlock(8, 16, stride=2).eval()
    torch.nn.init.zeros_(block.bn2.weight)  # leaves relu(shortcut(x))
    x = torch.randn(2, 8, 6, 6)
    expected = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 16 // 4, 16 // 4)).relu()
    torch.testing.assert_close(block(x), expected, rtol=0, atol=0)


def test_odd_width_is_taken():
    assert zoo.cifar_resnet(8, width=3)(torch.randn(2, 3, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("depth", "near"), [(18, "14 or depth=20"), (1, "8"), (57, "56 or depth=62")]
)
def test_depth_must_fit(depth, near):
    with pytest.raises(OptionError, match="no CIFAR ResNet of depth") as caught:
        zoo.cifar_resnet(depth)
    assert near in str(caught.value)


def test_counts_are_checked():
    with pytest.raises(OptionError, match="`width` must be at least 1"):
        zoo.resnet20(width=0)
    with pytest.raises(OptionTypeError, match="`num_classes` must be an integer"):
        zoo.resnet20(num_classes=2.5)


def test_unknown_name_offers_the_nearest():
    with pytest.raises(OptionError, match="did you mean 'resnet56'"):
        zoo.build("ResNet-56")
    with pytest.raises(OptionError, match="resnet20, resnet32"):
        zoo.build("zzz")
    with pytest.raises(OptionError, match="takes no option 'classes'"):
        zoo.build("resnet20", classes=3)


def test_every_name_builds():
    assert zoo.names()[0] == "resnet20"
    for name in zoo.names():
        assert zoo.build(name, width=2)(torch.randn(2, 3, 8, 8)).shape == (2, 10)
