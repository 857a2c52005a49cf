"""The oracles against cases small enough to do by hand."""

import pytest
import torch
from blocks import Chain, Layer, Tied, randomise
from oracle import flops, masked, relative_error, sliced_state
from torch import Tensor, nn


def entry(tensor: str, dim: int, role: str, size: int, keep: list[int]) -> dict[str, object]:
    return {"tensor": tensor, "dim": dim, "role": role, "size": size, "keep": keep}


def plan(*slices: dict[str, object]) -> dict[str, object]:
    return {"slices": list(slices)}


def numbered(*shape: int) -> Tensor:
    """1, 2, 3, ... so that every entry is known and none is zero."""
    return torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)


def filled(module: nn.Module, weight: Tensor) -> nn.Module:
    module.weight = nn.Parameter(weight)
    return module


def conv_pair() -> nn.Sequential:
    """conv -> norm -> conv, values all distinct."""
    layers = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1)
    net = nn.Sequential(*layers).double().eval()
    randomise(net, 0)
    return net


CHAIN = plan(
    entry("0.weight", 0, "out", 4, [0, 2, 3]),
    entry("0.bias", 0, "out", 4, [0, 2, 3]),
    *(entry(f"1.{key}", 0, "out", 4, [0, 2, 3]) for key in ("weight", "bias")),
    *(entry(f"1.running_{key}", 0, "out", 4, [0, 2, 3]) for key in ("mean", "var")),
    entry("3.weight", 1, "in", 4, [0, 2, 3]),
)


def test_masked_zeroes_what_reads_and_nothing_else() -> None:
    net = conv_pair()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = masked(net, CHAIN).state_dict()
    assert state["3.weight"][:, 1].eq(0).all()
    assert torch.equal(state["3.weight"][:, [0, 2, 3]], before["3.weight"][:, [0, 2, 3]])
    for key in before.keys() - {"3.weight"}:
        assert torch.equal(state[key], before[key]), key
    for key, value in net.state_dict().items():  # the model itself is untouched
        assert torch.equal(value, before[key]), key


def test_masked_equals_sliced_on_a_chain() -> None:
    net = conv_pair()
    layers = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1)
    small = nn.Sequential(*layers).double().eval()
    small.load_state_dict(sliced_state(net, CHAIN))
    small[1].eps = net[1].eps
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64)
    assert relative_error(masked(net, CHAIN)(x), small(x)) < 1e-12
    assert relative_error(net(x), small(x)) > 1e-3


def test_sliced_state_keeps_the_rest_bit_for_bit() -> None:
    net = conv_pair()
    state = sliced_state(net, CHAIN)
    assert list(state) == list(net.state_dict())
    assert torch.equal(state["3.bias"], net[3].bias)
    assert torch.equal(state["1.num_batches_tracked"], net[1].num_batches_tracked)
    assert torch.equal(state["1.running_var"], net[1].running_var[[0, 2, 3]])
    assert state["3.bias"].data_ptr() != net[3].bias.data_ptr()


def test_linear_columns() -> None:
    net = filled(nn.Linear(4, 2, bias=False), numbered(2, 4))
    cut = plan(entry("weight", 1, "in", 4, [1, 3]))
    assert masked(net, cut).weight.tolist() == [[0, 2, 0, 4], [0, 6, 0, 8]]
    assert sliced_state(net, cut)["weight"].tolist() == [[2, 4], [6, 8]]


def test_bias_of_a_query_is_zeroed() -> None:
    net = filled(nn.Linear(2, 3), numbered(3, 2))
    cut = plan(entry("weight", 0, "in", 3, [0, 2]), entry("bias", 0, "in", 3, [0, 2]))
    assert masked(net, cut).weight.tolist() == [[1, 2], [0, 0], [5, 6]]
    assert masked(net, cut).bias[1] == 0


def test_transposed_convolution_reads_on_dim_0() -> None:
    net = filled(nn.ConvTranspose2d(3, 2, 1, bias=False), numbered(3, 2, 1, 1))
    cut = plan(entry("weight", 0, "in", 3, [0, 2]), entry("weight", 1, "out", 2, [1]))
    assert masked(net, cut).weight.flatten(1).tolist() == [[1, 2], [0, 0], [5, 6]]
    assert sliced_state(net, cut)["weight"].flatten(1).tolist() == [[2], [6]]


def test_grouped_input_slice_goes_to_the_rows_of_its_group() -> None:
    """6 inputs in 2 groups: rows 0-1 read the inputs 0-2, rows 2-3 the inputs 3-5."""
    net = filled(nn.Conv2d(6, 4, 1, groups=2, bias=False), numbered(4, 3, 1, 1))
    cut = plan(entry("weight", 1, "in", 6, [0, 2, 4, 5]))
    zeroed = [[1, 0, 3], [4, 0, 6], [0, 8, 9], [0, 11, 12]]
    assert masked(net, cut).weight.flatten(1).tolist() == zeroed
    assert sliced_state(net, cut)["weight"].flatten(1).tolist() == [
        [1, 3],
        [4, 6],
        [8, 9],
        [11, 12],
    ]
    both = plan(*cut["slices"], entry("weight", 0, "out", 4, [1, 2]))
    assert sliced_state(net, both)["weight"].flatten(1).tolist() == [[4, 6], [8, 9]]


def test_grouped_convolution_computes_the_same_either_way() -> None:
    net = nn.Conv2d(6, 4, 3, groups=2).double()
    randomise(net, 1)
    cut = plan(entry("weight", 1, "in", 6, [0, 2, 4, 5]))
    small = nn.Conv2d(4, 4, 3, groups=2).double()
    small.load_state_dict(sliced_state(net, cut))
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    assert relative_error(masked(net, cut)(x), small(x[:, [0, 2, 4, 5]])) < 1e-12


def test_whole_groups_are_cut_on_dim_0_alone() -> None:
    net = filled(nn.Conv2d(6, 6, 1, groups=3, bias=False), numbered(6, 2, 1, 1))
    cut = plan(entry("weight", 0, "out", 6, [0, 1, 4, 5]))
    assert torch.equal(masked(net, cut).weight, net.weight)
    assert torch.equal(sliced_state(net, cut)["weight"], net.weight[[0, 1, 4, 5]])


def test_whole_group_together_with_an_input_slice() -> None:
    """Of a removed group no inputs are kept; only the groups that stay have to agree."""
    net = filled(nn.Conv2d(6, 3, 1, groups=3, bias=False), numbered(3, 2, 1, 1))
    cut = plan(entry("weight", 0, "out", 3, [0, 2]), entry("weight", 1, "in", 6, [1, 4]))
    assert sliced_state(net, cut)["weight"].flatten(1).tolist() == [[2], [5]]


def test_grouped_transposed_output_slice() -> None:
    """[Ci, Co / g]: the outputs 0-2 come from the rows 0-1, the outputs 3-5 from the rows 2-3."""
    net = filled(nn.ConvTranspose2d(4, 6, 1, groups=2, bias=False), numbered(4, 3, 1, 1))
    cut = plan(entry("weight", 1, "out", 6, [0, 5]), entry("weight", 0, "in", 4, [0, 3]))
    assert masked(net, cut).weight.flatten(1)[[1, 2]].eq(0).all()
    assert sliced_state(net, cut)["weight"].flatten(1).tolist() == [[1], [12]]


def test_depthwise_is_cut_on_dim_0() -> None:
    net = filled(nn.Conv2d(3, 3, 1, groups=3, bias=False), numbered(3, 1, 1, 1))
    cut = plan(entry("weight", 0, "out", 3, [0, 2]))
    assert sliced_state(net, cut)["weight"].flatten().tolist() == [1, 3]


def test_tied_weights_are_followed_under_every_name() -> None:
    net = Chain([Tied(2, 2), Layer("Conv2d", 2, 2, 1)]).double()
    randomise(net, 0)
    cut = plan(entry("blocks.0.first.weight", 1, "in", 2, [1]))
    state = sliced_state(net, cut)
    weight = net.blocks[0].first.weight
    for name in ("first", "second"):
        assert torch.equal(state[f"blocks.0.{name}.weight"], weight[:, [1]])
    copy = masked(net, cut).blocks[0]
    assert copy.first.weight is copy.second.weight
    assert copy.second.weight[:, 0].eq(0).all()
    with pytest.raises(ValueError, match="not a first name"):
        sliced_state(net, plan(entry("blocks.0.second.weight", 1, "in", 2, [1])))


def test_grouping_zeroes_outside_rows_and_columns() -> None:
    net = filled(nn.Conv2d(4, 4, 1, bias=False), numbered(4, 4, 1, 1))
    groupings = [{"tensor": "weight", "rows": [[0, 3], [1, 2]], "cols": [[1, 2], [0, 1]]}]
    weight = masked(net, {"slices": [], "groupings": groupings}).weight.flatten(1)
    assert weight.tolist() == [[0, 2, 3, 0], [5, 6, 0, 0], [9, 10, 0, 0], [0, 14, 15, 0]]
    with pytest.raises(ValueError, match="slices only"):
        sliced_state(net, {"slices": [], "groupings": groupings})


@pytest.mark.parametrize(
    ("cut", "message"),
    [
        (entry("weight", 1, "in", 6, [0, 1, 3]), "different counts"),
        (entry("weight", 1, "in", 7, [0]), "does not fit"),
        (entry("weight", 0, "out", 8, [0]), "does not fit"),
        (entry("weight", 0, "out", 4, [1, 0]), "not ascending"),
        (entry("weight", 0, "out", 4, [4]), "not ascending"),
        (entry("scale", 0, "out", 4, [0]), "not a first name"),
    ],
)
def test_slices_that_do_not_fit_are_refused(cut: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sliced_state(nn.Conv2d(6, 4, 1, groups=2), plan(cut))


def test_relative_error_takes_the_worst_tensor() -> None:
    a = {"x": torch.tensor([1.0, -4.0]), "y": (torch.tensor([10.0]),)}
    b = {"x": torch.tensor([1.0, -3.0]), "y": (torch.tensor([11.0]),)}
    assert relative_error(a, b) == 0.25
    assert relative_error(a, a) == 0.0


def test_relative_error_never_hides_a_difference() -> None:
    zero, one, nan = torch.zeros(2), torch.ones(2), torch.tensor([1.0, float("nan")])
    assert relative_error(zero, zero) == 0.0
    assert relative_error(zero, one) == float("inf")
    assert relative_error(one, nan) == float("inf")
    assert relative_error(nan, one) == float("inf")
    with pytest.raises(ValueError, match="shapes"):
        relative_error(one, torch.ones(1, 2))
    with pytest.raises(ValueError, match="structures"):
        relative_error((one,), [one])


@pytest.mark.parametrize(
    ("layer", "macs"),
    [
        (nn.Conv2d(4, 6, 3, padding=1), 6 * 4 * 9 * 64),
        (nn.Conv2d(4, 6, 3, padding=1, groups=2), 6 * 2 * 9 * 64),
        (nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4), 4 * 9 * 16),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), 4 * 6 * 4 * 64),
        (nn.Sequential(nn.Flatten(), nn.Linear(256, 5)), 256 * 5),
        (nn.BatchNorm2d(4), 0),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_flops_are_macs_per_sample(layer: nn.Module, macs: int, batch: int) -> None:
    assert flops(layer, torch.randn(batch, 4, 8, 8)) == macs
