"""Norms over channels: a pruned network takes their statistics over the channels that it has.

Every network is cut at random, by several ratios, and compared in float64 with two masked
originals: `fxprune.mask`, and the one of `oracle`, whose formulas are its own.
"""

import copy
import pickle
import random
from collections.abc import Callable

import pytest
import torch
from blocks import randomise
from oracle import masked, relative_error, sliced_state
from timm import layers as timm_layers
from timm.layers import grn, norm
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.convnext import LayerNorm2d

import fxprune
from fxprune.cost import Cost
from fxprune.groups import Analysis
from fxprune.planning import write_plan

BOUND = 1e-9
RATIOS = (0.3, 0.5, 0.6, 0.75, 0.9)


def thinned(analysis: Analysis, ratio: float, seed: int) -> fxprune.Plan:
    """A plan that removes `ratio` of every group, drawn at random."""
    rng = random.Random(seed)
    keep = analysis.everything()
    for group in analysis.groups:
        gone = rng.sample(group.classes.tolist(), min(int(ratio * len(group)), len(group) - 1))
        keep[gone] = False
    for piece in analysis.pieces:
        if not keep[piece].any():
            keep[rng.choice(piece.tolist())] = True
    return write_plan(analysis, keep, Cost.of(analysis), method={"name": "random"})


def prepared(net: nn.Module) -> nn.Module:
    """The network in float64 and eval mode, all of its values distinct."""
    net = net.double().eval()
    randomise(net, 0)
    return net


def assert_law(
    net: nn.Module, x: Tensor, ratio: float, seed: int = 0, analysis: Analysis | None = None
) -> fxprune.PrunedModule:
    """Cut and compare, for the example's batch size and another one."""
    analysis = analysis or fxprune.analyze(net, x)
    assert analysis.groups, analysis.frozen
    plan = thinned(analysis, ratio, seed)
    assert plan.slices
    pruned = fxprune.apply(net, fxprune.Plan.from_json(plan.to_json()), x)
    other = torch.rand(3, *x.shape[1:], generator=torch.Generator().manual_seed(1)).to(x) - 0.4
    one, two = fxprune.mask(net, plan), masked(net, plan.to_dict())
    for y in (x, other):
        assert relative_error(one(y), pruned(y)) <= BOUND
        assert relative_error(two(y), pruned(y)) <= BOUND
    expected = sliced_state(net, plan.to_dict())
    for name, t in pruned.state_dict().items():
        assert torch.equal(t, expected[name]), name
    return pruned


def images(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).double()


class Residual(nn.Module):
    """Convolutions with a norm on the stream, and one inside the branch."""

    def __init__(self, width: int, make: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = make(width)
        self.conv = nn.Conv2d(width, 2 * width, 1)
        self.inner = make(2 * width)
        self.back = nn.Conv2d(2 * width, width, 3, padding=1)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.back(F.gelu(self.inner(self.conv(self.norm(x)))))
        return self.head(x.mean((2, 3)))


IMAGE_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer_norm_2d": LayerNorm2d,
    "timm_layer_norm_2d": norm.LayerNorm2d,
    "timm_layer_norm_exp_2d": norm.LayerNormExp2d,
    "timm_layer_norm_act_2d": timm_layers.norm_act.LayerNormAct2d,
    "timm_rms_norm_2d": norm.RmsNorm2d,
    "timm_simple_norm_2d": norm.SimpleNorm2d,
    "timm_group_norm_1": norm.GroupNorm1,
    "timm_group_norm": lambda c: norm.GroupNorm(c, 4),
    "timm_group_norm_act": lambda c: timm_layers.GroupNormAct(c, 4),
    "timm_batch_norm_act": timm_layers.BatchNormAct2d,
    "timm_frozen_batch_norm_act": timm_layers.FrozenBatchNormAct2d,
    "timm_evo_norm_b0": timm_layers.EvoNorm2dB0,
    "timm_evo_norm_s0": lambda c: timm_layers.EvoNorm2dS0(c, 4),
    "timm_response_norm": lambda c: grn.GlobalResponseNorm(c, channels_last=False),
    "instance_norm": lambda c: nn.InstanceNorm2d(c, affine=True),
    "group_norm_1": lambda c: nn.GroupNorm(1, c),
    "group_norm_2": lambda c: nn.GroupNorm(2, c),
    "group_norm_6": lambda c: nn.GroupNorm(6, c),
    "group_norm_12": lambda c: nn.GroupNorm(12, c),
    "group_norm_each": lambda c: nn.GroupNorm(c, c),
    "group_norm_without_parameters": lambda c: nn.GroupNorm(6, c, affine=False),
    "layer_norm_of_maps": lambda c: nn.LayerNorm([c, 6, 6]),
}
SINGLE = {"timm_evo_norm_b0", "timm_evo_norm_s0"}  # they compute in float32, whatever comes in


@pytest.mark.parametrize("name", sorted(IMAGE_NORMS.keys() - SINGLE))
def test_norms_of_images(name: str) -> None:
    net, x = prepared(Residual(24, IMAGE_NORMS[name])), images(2, 3, 6, 6)
    analysis = fxprune.analyze(net, x)
    for seed, ratio in enumerate(RATIOS[::2]):
        assert_law(net, x, ratio, seed, analysis)


@pytest.mark.parametrize("name", sorted(SINGLE))
def test_norms_that_compute_in_single_precision(name: str) -> None:
    net, x = prepared(Residual(24, IMAGE_NORMS[name])), images(2, 3, 6, 6)
    plan = thinned(fxprune.analyze(net, x), 0.5, 0)
    pruned = fxprune.apply(net, plan, x)
    for reference in (fxprune.mask(net, plan), masked(net, plan.to_dict())):
        assert relative_error(reference(x), pruned(x)) <= 1e-6


class Mlp(nn.Module):
    def __init__(self, width: int, make: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm = make(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.inner = make(2 * width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.inner(self.up(self.norm(x)))))


class Tokens(nn.Module):
    """A stream of tokens: patches, blocks, a last norm, a head."""

    def __init__(self, width: int, make: Callable[[int], nn.Module], blocks: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 2, 2)
        self.blocks = nn.Sequential(*(Mlp(width, make) for _ in range(blocks)))
        self.norm = make(width)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


class Functional(nn.Module):
    """A norm written as a function of parameters."""

    def __init__(self, width: int, form: str) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        if self.form == "layer":
            return F.layer_norm(x, self.scale.shape, self.scale, self.shift, 1e-6)
        if self.form == "last axis":
            return F.layer_norm(x, x.shape[-1:], weight=self.scale)
        if self.form == "bias":
            return F.layer_norm(x, (x.size(-1),), bias=self.shift)
        if self.form == "torch":
            return torch.layer_norm(x, (x.size(-1),), self.scale, self.shift)
        if self.form == "rms":
            return F.rms_norm(x, [x.shape[-1]], self.scale)
        if self.form == "cast":
            return F.rms_norm(x, (x.shape[-1],), self.scale.to(x.dtype).type_as(x), 1e-6)
        maps = x.transpose(1, 2)
        groups = 1 if self.form == "group" else 8
        return F.group_norm(maps, groups, self.scale, self.shift).transpose(1, 2)


TOKEN_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer_norm": nn.LayerNorm,
    "layer_norm_without_bias": lambda c: nn.LayerNorm(c, bias=False),
    "rms_norm": nn.RMSNorm,
    "rms_norm_eps": lambda c: nn.RMSNorm(c, eps=1e-5),
    "timm_layer_norm": norm.LayerNorm,
    "timm_rms_norm": norm.RmsNorm,
    "timm_simple_norm": norm.SimpleNorm,
    **{
        f"functional_{form}": lambda c, form=form: Functional(c, form)
        for form in ("layer", "last axis", "bias", "torch", "rms", "cast", "group", "groups")
    },
}


@pytest.mark.parametrize("name", TOKEN_NORMS)
def test_norms_of_tokens(name: str) -> None:
    net, x = prepared(Tokens(24, TOKEN_NORMS[name])), images(2, 3, 6, 6)
    analysis = fxprune.analyze(net, x)
    for seed, ratio in enumerate(RATIOS[::2]):
        assert_law(net, x, ratio, seed, analysis)


@pytest.mark.parametrize("width", [96, 144, 192])
@pytest.mark.parametrize("ratio", RATIOS)
def test_widths_of_real_networks(width: int, ratio: float) -> None:
    """Kept indices of which a hash table changes the order."""
    pruned = assert_law(prepared(Tokens(width, nn.LayerNorm, 1)), images(2, 3, 4, 4), ratio)
    left = width - int(ratio * width)
    assert pruned.get_submodule("norm").normalized_shape == (left,)
    assert pruned.get_submodule("norm").weight.shape == (left,)


def test_sizes_follow_the_tensors() -> None:
    x = images(2, 3, 6, 6)
    for groups, left in ((1, 1), (2, 2), (6, 3), (12, 6)):
        net = prepared(Residual(24, lambda c, g=groups: nn.GroupNorm(g, c)))
        pruned = assert_law(net, x, 0.5)
        layer = pruned.get_submodule("norm")
        assert (layer.num_groups, layer.num_channels, len(layer.weight)) == (left, 12, 12)
        inner = pruned.get_submodule("inner")
        assert inner.num_channels == len(inner.weight) == 24


class Called(nn.Module):
    """Two layers behind one norm, called twice; the norm that `norm` makes."""

    def __init__(self, layer: nn.Module, width: int = 8) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, width, 1), nn.Conv2d(3, width, 1)
        self.norm = layer
        self.mix = nn.Conv2d(width, width, 1)
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(self.norm(self.one(x))) * self.norm(self.two(x))
        return self.head(y.mean((2, 3)))


@pytest.mark.parametrize("layer", [LayerNorm2d(8), nn.GroupNorm(2, 8), nn.GroupNorm(4, 8)])
def test_a_norm_that_is_called_twice(layer: nn.Module) -> None:
    net = prepared(Called(copy.deepcopy(layer)))
    for seed in range(4):
        assert_law(net, images(2, 3, 4, 4), 0.5, seed)


class Mixed(nn.Module):
    """A group norm over channels of which some come from outside and cannot be cut."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 9, 1)
        self.norm = nn.GroupNorm(groups, 12)
        self.head = nn.Conv2d(12, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.cat([x, self.conv(x)], 1)))


@pytest.mark.parametrize(("groups", "free"), [(1, 9), (2, 3), (4, 3), (3, 2), (6, 4), (12, 9)])
def test_groups_that_hold_what_cannot_be_cut(groups: int, free: int) -> None:
    net, x = prepared(Mixed(groups)), images(2, 3, 4, 4)
    assert sum(map(len, fxprune.analyze(net, x).groups)) == free
    for seed in range(3):
        assert_law(net, x, 0.5, seed)


class Joined(nn.Module):
    """A class token before the others: ids differ between positions, and channels are what counts."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.token = nn.Linear(4, 12), nn.Linear(4, 12)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.token(x[:, :1]), self.embed(x)], 1)
        return self.head(self.norm(y))


def test_positions_of_a_sequence_are_no_heads() -> None:
    net, x = prepared(Joined()), images(2, 5, 4)
    assert sum(map(len, fxprune.analyze(net, x).groups)) == 12
    assert_law(net, x, 0.5)


class Heads(nn.Module):
    """A norm over the width of each head: heads go as a whole, and its parameters stay."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 12)
        self.norm = layer
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.embed(x)
        y = self.norm(y.view(y.shape[0], y.shape[1], 4, 3))
        return self.head(y.flatten(2))


@pytest.mark.parametrize(
    "layer", [nn.LayerNorm(3), nn.RMSNorm(3), nn.LayerNorm(3, elementwise_affine=False)]
)
def test_a_norm_inside_heads_keeps_its_parameters(layer: nn.Module) -> None:
    net, x = prepared(Heads(copy.deepcopy(layer))), images(2, 5, 4)
    assert sum(map(len, fxprune.analyze(net, x).groups)) == 4
    pruned = assert_law(net, x, 0.5)
    assert pruned.get_submodule("embed").out_features == 6
    assert pruned.get_submodule("norm").normalized_shape == (3,)


class Attention(nn.Module):
    """Self-attention whose queries and keys are normalised over the width of a head."""

    def __init__(self, width: int, heads: int, unit: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, width), nn.Linear(width, 3)
        self.norm, self.qkv = nn.LayerNorm(width), nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = nn.LayerNorm(width // heads), nn.RMSNorm(width // heads)
        self.out, self.heads, self.unit = nn.Linear(width, width), heads, unit

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        b, n, c = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, n, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.unit:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        else:
            q, k = self.q_norm(q), self.k_norm(k)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.head(x + self.out(y.transpose(1, 2).reshape(b, n, -1)))


@pytest.mark.parametrize("unit", [False, True])
def test_norms_of_queries_and_keys(unit: bool) -> None:
    net, x = prepared(Attention(24, 4, unit)), images(2, 5, 4)
    assert {len(group) for group in fxprune.analyze(net, x).groups} == {24, 4}
    pruned = assert_law(net, x, 0.5)
    assert pruned.get_submodule("qkv").out_features == 36


def test_layers_of_torch_with_a_fast_path() -> None:
    """Under torch.no_grad an encoder layer passes its norms by; the mask may not."""
    layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
    net = nn.Sequential(
        nn.Linear(4, 12),
        nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        nn.Linear(12, 3),
    )
    net, x = prepared(net), images(2, 5, 4)
    analysis = fxprune.analyze(net, x)
    plan = thinned(analysis, 0.5, 0)
    assert any(s.tensor == "1.layers.0.norm1.weight" for s in plan.slices)
    pruned = fxprune.apply(net, plan, x)
    with torch.no_grad():
        assert relative_error(fxprune.mask(net, plan)(x), pruned(x)) <= BOUND
        assert relative_error(masked(net, plan.to_dict())(x), pruned(x)) <= BOUND


class Normalised(nn.Module):
    """A norm without parameters, as a layer or a function."""

    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.call(self.conv(x)))


def scaled(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[1:])


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (scaled, "`layer_norm` has no parameter of its own"),
        (nn.LayerNorm([8, 4, 4], elementwise_affine=False), "`LayerNorm` has no parameter"),
        (nn.GroupNorm(1, 8, affine=False), "`GroupNorm` has no parameter of its own"),
        (F.normalize, "`normalize` has no parameter of its own"),
        (nn.LocalResponseNorm(3), "`LocalResponseNorm` has no parameter of its own"),
        (
            timm_layers.GroupNormAct(8, 2, act_layer=nn.PReLU),
            "`act.weight` inside a `GroupNormAct`",
        ),
    ],
)
def test_why_a_norm_freezes(call: Callable[[Tensor], Tensor], said: str) -> None:
    net, x = prepared(Normalised(call)), images(2, 3, 4, 4)
    analysis = fxprune.analyze(net, x)
    assert not analysis.groups
    assert any(said in why for why in analysis.frozen.values()), analysis.frozen


class Point(nn.Module):
    """A norm of maps of one pixel."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 1), layer, nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x).mean((2, 3), keepdim=True)))


@pytest.mark.parametrize("layer", [nn.GroupNorm(1, 8), nn.GroupNorm(2, 8), norm.SimpleNorm2d(8)])
def test_a_norm_of_one_channel_has_no_statistics(layer: nn.Module) -> None:
    net, x = prepared(Point(copy.deepcopy(layer))), images(1, 3, 4, 4)
    pruned = assert_law(net, x, 0.9)
    assert pruned(x).isfinite().all()
    assert len(pruned.get_submodule("norm").weight) == (
        4 if layer.__dict__.get("num_groups") == 2 else 2
    )


class Computed(nn.Module):
    """The weight of a norm comes from the input."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.gain, self.head = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.layer_norm(self.embed(x), (8,), self.gain(x[0, 0])))


def test_why_a_norm_with_a_computed_weight_freezes() -> None:
    analysis = fxprune.analyze(prepared(Computed()), images(2, 5, 4))
    assert not analysis.groups
    assert "the weight of this `layer_norm` is computed" in analysis.frozen["layer_norm"]


class Shifted(nn.Module):
    """RMS norm whose weight is stored as the distance from one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), 1 + self.weight)


def test_the_mask_follows_a_weight_through_arithmetic() -> None:
    net, x = prepared(Tokens(12, Shifted)), images(2, 3, 4, 4)
    plan = thinned(fxprune.analyze(net, x), 0.5, 0)
    assert any(s.tensor == "norm.weight" for s in plan.slices)
    assert relative_error(fxprune.mask(net, plan)(x), fxprune.apply(net, plan, x)(x)) <= BOUND


@pytest.mark.parametrize("make", [nn.LayerNorm, norm.SimpleNorm, lambda c: Functional(c, "cast")])
def test_a_masked_network_is_a_network(make: Callable[[int], nn.Module]) -> None:
    """It can be copied, cast, called with other tensors, called in part; and is untouched by that."""
    net, x = prepared(Tokens(12, make)), images(2, 3, 4, 4)
    plan = thinned(fxprune.analyze(net, x), 0.5, 0)
    reference = fxprune.mask(net, plan)
    assert reference.state_dict().keys() == net.state_dict().keys()
    assert type(reference) is type(net)
    expected = reference(x)
    assert relative_error(expected, copy.deepcopy(reference)(x)) == 0
    changed = copy.deepcopy(reference)
    for p in changed.parameters():
        p.data += 1
    assert relative_error(expected, reference(x)) == 0
    tensors = {k: v.clone() for k, v in reference.state_dict().items()}
    assert relative_error(expected, torch.func.functional_call(changed, tensors, (x,))) == 0
    assert relative_error(expected, copy.deepcopy(reference).float()(x.float()).double()) < 1e-4
    blocks = reference.blocks(reference.patches(x).flatten(2).transpose(1, 2))
    assert relative_error(expected, reference.head(reference.norm(blocks).mean(1))) == 0


def test_a_masked_network_survives_pickle() -> None:
    net, x = prepared(Tokens(12, nn.LayerNorm)), images(2, 3, 4, 4)
    reference = fxprune.mask(net, thinned(fxprune.analyze(net, x), 0.5, 0))
    assert relative_error(reference(x), pickle.loads(pickle.dumps(reference))(x)) == 0


def test_an_error_inside_a_masked_network_leaves_no_trace() -> None:
    net, x = prepared(Tokens(12, nn.LayerNorm)), images(2, 3, 4, 4)
    reference = fxprune.mask(net, thinned(fxprune.analyze(net, x), 0.5, 0))
    expected = reference(x)
    with pytest.raises(RuntimeError):
        reference(x[:, :2])
    assert not torch.overrides._get_current_function_mode_stack()
    assert relative_error(expected, reference(x)) == 0


def test_training_after_a_cut() -> None:
    for make in (nn.LayerNorm, nn.RMSNorm, norm.SimpleNorm, lambda c: Functional(c, "groups")):
        net, x = prepared(Tokens(24, make)), images(2, 3, 4, 4)
        pruned = fxprune.apply(net, thinned(fxprune.analyze(net, x), 0.5, 0), x).train()
        pruned(x).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in pruned.parameters())


@pytest.mark.parametrize("make", [nn.LayerNorm, nn.RMSNorm])
def test_a_budget_is_verified_against_the_mask(make: Callable[[int], nn.Module]) -> None:
    net, x = prepared(Tokens(32, make)), images(2, 3, 4, 4)
    pruned = fxprune.compile(net, x, budget=0.4)
    assert pruned.plan.metrics["macs_after"] <= 0.4 * pruned.plan.metrics["macs_before"]
    assert relative_error(masked(net, pruned.plan.to_dict())(x), pruned(x)) <= BOUND


def test_a_second_cut_composes() -> None:
    for make in (nn.LayerNorm, lambda c: Functional(c, "groups")):
        net, x = prepared(Tokens(24, make)), images(2, 3, 4, 4)
        once = fxprune.compile(net, x, budget=0.6)
        twice = fxprune.compile(once, x, budget=0.5)
        assert relative_error(masked(net, twice.plan.to_dict())(x), twice(x)) <= BOUND
        assert relative_error(fxprune.mask(net, twice.plan)(x), twice(x)) <= BOUND


def test_groups_of_unequal_size_are_refused() -> None:
    net = prepared(Residual(8, lambda c: nn.GroupNorm(2, c)))
    keep = [0, 1, 2, 4]
    document = fxprune.analyze(net, images(2, 3, 4, 4)).plan({"stem": [0, 4]}).to_dict()
    for entry in document["slices"]:
        if entry["size"] == 8:
            entry["keep"] = keep
    reference = fxprune.mask(net, fxprune.Plan.from_dict(document))
    with pytest.raises(fxprune.PlanError, match=r"different numbers of channels: \[3, 1\]"):
        reference(images(2, 3, 4, 4))
