"""Ways of writing a network that a second reading of the rules got wrong, one each.

Every network is cut to given channels and compared with the masked original, on the example input
and on inputs of another batch and another spatial size.
"""

import pytest
import torch
import torch.nn.functional as F
from blocks import randomise
from oracle import flops, masked, relative_error
from torch import nn

import fxprune

BOUND = 1e-9
ODD = [0, 2, 5]  # of 6 channels


class Net(nn.Module):
    """conv `a` (6 channels), what is tested, then whatever `parts` hold."""

    def __init__(self, body, **parts):
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1)
        self.b = nn.Conv2d(6, 4, 1)
        self.fc = nn.Linear(6, 4)
        for name, part in parts.items():
            if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.body = body
        self.double().eval()
        randomise(self, 0)

    def forward(self, x):
        return self.body(self, x)


def images(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


X = images(1, 3, 8, 8)
OTHERS = (X, images(3, 3, 8, 8), images(2, 3, 10, 12))


def law(net, keep=None, inputs=OTHERS):
    """The cut network equals the masked original everywhere, at the MACs of the plan."""
    plan = fxprune.analyze(net, X).plan({"a": ODD} if keep is None else keep)
    assert plan.slices
    pruned = fxprune.apply(net, plan, X)
    reference = masked(net, plan.to_dict())
    for x in inputs:
        assert relative_error(reference(x), pruned(x)) <= BOUND
    assert flops(pruned, X) == plan.metrics["macs_after"]


# Wrong numbers, and the check on the example input does not see it


@pytest.mark.parametrize("size", [lambda y: y.flatten(1).shape[1], lambda y: y.flatten(1).size(1)])
def test_a_size_that_channels_share_with_positions_follows_the_positions(size):
    def body(net, x):
        y = net.a(x)
        return net.b(y / size(y))

    law(Net(body))


# Wrong numbers on the example input


def test_an_inplace_operation_whose_result_only_gives_a_size_is_not_dropped():
    def body(net, x):
        y = net.a(x)
        z = y.relu_()
        return net.b(y / z.shape[1])

    law(Net(body))


def test_a_layer_whose_result_only_gives_a_size_still_counts():
    law(Net(lambda net, x: net.b(net.a(x) / net.a(x).shape[1])))


def test_copy_couples_its_two_tensors():
    def body(net, x):
        y = net.a(x)
        y.copy_(net.c(x))
        return net.b(y)

    analysis = fxprune.analyze(net := Net(body, c=nn.Conv2d(3, 6, 1)), X)
    assert analysis.group("a") is analysis.group("c.weight")
    law(net)


def test_copy_into_a_slice_couples_it():
    def body(net, x):
        y = net.a(x)
        y[:, :2].copy_(net.c(x))
        return net.b(y)

    law(Net(body, c=nn.Conv2d(3, 2, 1)))


# A network that fails on the example input


@pytest.mark.parametrize("name", ["data", "real"])
def test_attributes_that_are_the_tensor_itself(name):
    net = Net(lambda net, x: net.b(getattr(net.a(x), name)))
    if fxprune.analyze(net, X).groups:
        law(net)


@pytest.mark.parametrize("name", ["max", "min", "median"])
def test_values_of_a_reduction_by_name(name):
    net = Net(lambda net, x: net.fc(getattr(net.a(x).flatten(2), name)(dim=-1).values))
    if fxprune.analyze(net, X).groups:
        law(net)


@pytest.mark.parametrize(
    ("pad", "keep"), [((0, 0, 0, 0, -2, 0), [2, 3, 4, 5]), ((0, 0, 0, 0, 0, -2), [0, 1, 2, 3])]
)
def test_a_crop_of_exactly_the_channels_that_go(pad, keep):
    law(Net(lambda net, x: net.c(F.pad(net.a(x), pad)), c=nn.Conv2d(4, 4, 1)), {"a": keep})


def test_broadcast_to_follows_the_cut():
    def body(net, x):
        y = net.a(x)
        gate = net.c(y.mean((2, 3), keepdim=True))
        return net.b(y * torch.broadcast_to(gate, (x.shape[0], 6, x.shape[2], x.shape[3])))

    law(Net(body, c=nn.Conv2d(6, 6, 1)))


def test_one_unflatten_for_two_widths():
    def body(net, x):
        y, z = net.split(net.a(x)).sum(1), net.split(net.c(x)).sum(1)
        return net.d(y) + net.e(z)

    parts = {"split": nn.Unflatten(1, (2, -1)), "c": nn.Conv2d(3, 10, 1)}
    law(Net(body, **parts, d=nn.Conv2d(3, 4, 1), e=nn.Conv2d(5, 4, 1)), {"a": [0, 2, 3, 5]})


def test_an_input_named_after_the_other_arguments():
    law(Net(lambda net, x: net.fc(torch.mean(dim=(2, 3), input=net.a(x)))))


def test_a_bias_that_is_a_plain_attribute():
    net = Net(lambda net, x: net.b(net.a(x)))
    bias = net.a.bias.detach()
    del net.a.bias
    net.a.bias = bias
    if fxprune.analyze(net, X).groups:
        law(net)


# A network that fails at other sizes than the example's


@pytest.mark.parametrize(
    "unflatten",
    [
        lambda y, x: y.unflatten(2, (x.shape[2], x.shape[3])),
        lambda y, x: torch.unflatten(y, 2, (x.shape[2], x.shape[3])),
    ],
)
def test_unflatten_of_positions_keeps_its_sizes_open(unflatten):
    law(Net(lambda net, x: net.b(unflatten(net.a(x).flatten(2), x))))


def test_an_unflatten_layer_keeps_its_open_size():
    law(Net(lambda net, x: net.b(net.split(net.a(x)).flatten(3)), split=nn.Unflatten(3, (-1, 1))))


@pytest.mark.parametrize("sizes", [lambda x: (x.shape[0], 6), lambda x: (x.shape[0], -1)])
def test_unflatten_of_a_batch_merged_with_channels(sizes):
    law(Net(lambda net, x: net.b(net.a(x).flatten(0, 1).unflatten(0, sizes(x)))))


@pytest.mark.parametrize("part", [lambda y: y.chunk(2, dim=-1)[0], lambda y: y.narrow(-1, 1, 3)])
def test_a_negative_axis_stays_negative_behind_a_squeezed_batch_of_one(part):
    def body(net, x):
        return net.c(part(net.a(x).mean((2, 3), keepdim=True).squeeze()))

    law(Net(body, c=nn.Linear(3, 4)))


def test_chunks_of_channels_flattened_with_positions():
    def body(net, x):
        p, q = net.a(x).flatten(1).chunk(2, 1)
        return net.c((p * q).view(x.shape[0], 3, x.shape[2], x.shape[3]))

    net = Net(body, c=nn.Conv2d(3, 4, 1))
    if fxprune.analyze(net, X).groups:
        law(net, {"a": [0, 2, 3, 5]})


def test_a_slice_of_channels_flattened_with_positions():
    def body(net, x):
        _, _, h, w = x.shape
        return net.c(net.a(x).flatten(1)[:, : 3 * h * w].view(x.shape[0], 3, h, w))

    net = Net(body, c=nn.Conv2d(3, 4, 1))
    if fxprune.analyze(net, X).groups:
        law(net)


def test_the_length_of_a_batch_merged_with_channels():
    def body(net, x):
        b, c, h, w = (y := net.a(x)).shape
        y = F.avg_pool2d(y.view(b * c, 1, h, w), 3, 1, 1)
        return net.b(y.view(y.shape[0] // c, c, h, w))

    law(Net(body))


# Errors of Python where a network should be cut or its channels freeze


def test_groups_read_off_the_shape():
    def body(net, x):
        y = net.a(x)
        return net.b(F.conv2d(y, net.blur, stride=2, groups=y.shape[1]))

    law(Net(body, blur=torch.ones(6, 1, 3, 3)))


@pytest.mark.parametrize(
    "spread",
    [
        lambda y: y.var((2, 3), False, True),
        lambda y: y.std(False),
        lambda y: y.var(True),
        lambda y: y.sum([]),
    ],
)
def test_reductions_with_other_orders_of_arguments(spread):
    def body(net, x):
        y = net.a(x)
        return net.b(y + spread(y))

    net = Net(body)
    if fxprune.analyze(net, X).groups:
        law(net)


def test_to_the_type_of_another_tensor():
    def body(net, x):
        y = net.a(x)
        return net.b(y * net.scale.to(y))

    net = Net(body, scale=torch.ones(6, 1, 1))
    if fxprune.analyze(net, X).groups:
        law(net)


@pytest.mark.parametrize(
    "move",
    [
        lambda y: torch.squeeze(input=y.unsqueeze(2), dim=2),
        lambda y: torch.reshape(input=y, shape=(y.shape[0], 6, y.shape[2], -1)),
        lambda y: torch.cat([(p := torch.chunk(input=y, chunks=2, dim=1))[1], p[0]], 1),
        lambda y: torch.cat([(p := torch.tensor_split(y, sections=2, dim=1))[1], p[0]], 1),
        lambda y: torch.narrow(input=y, dim=1, start=0, length=6),
    ],
)
def test_arguments_by_name(move):
    def body(net, x):
        return net.b(move(net.a(x)))

    try:
        net = Net(body)
        fxprune.analyze(net, X)
    except fxprune.TraceError:
        return
    law(net)


@pytest.mark.parametrize(
    "move",
    [
        lambda y: y.squeeze_(-1).squeeze_(-1),
        lambda y: (y.squeeze_(-1), y.squeeze_(-1), y)[-1],
    ],
)
def test_movement_in_place(move):
    net = Net(lambda net, x: net.fc(move(net.a(x).mean((2, 3), keepdim=True))))
    try:
        groups = fxprune.analyze(net, X).groups
    except fxprune.FxPruneError:
        return
    if groups:
        law(net)
