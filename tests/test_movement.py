"""Operations that move, select, create and measure: the law for each, in a small network of its own.

Every network is `stem` (3 -> width channels), the operation, and `head`, so that the operation
meets channels that can be cut; the table says how many choices must be left, or why none are.
"""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
import torchvision
from blocks import randomise
from oracle import masked, relative_error, sliced_state
from test_law import BOUND, random_plan
from torch import nn

import fxprune


class Case(nn.Module):
    """stem, then `body(self, y)`, then a head that reads whatever channels come out."""

    def __init__(self, body, width, out, head, layers):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.body = body
        for name, layer in layers.items():
            if isinstance(layer, torch.Tensor):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)
        self.head = nn.Conv2d(out, 4, 1) if head == "conv" else nn.Linear(out, 4)

    def forward(self, x):
        return self.head(self.body(self, F.relu(self.stem(x))))

    def inputs(self):
        g = torch.Generator().manual_seed(3)
        return [torch.randn(n, 3, s, s, generator=g).double() for n, s in ((2, 8), (3, 12))]


def case(body, width=8, out=None, head="conv", **layers):
    net = Case(body, width, out or width, head, layers).double().eval()
    randomise(net, 0)
    return net


def obeys(net, seeds=3):
    """The law for random plans, at two batch and spatial sizes; the analysis."""
    xs = net.inputs()
    analysis = fxprune.analyze(net, xs[0])
    assert analysis.groups, analysis.frozen
    removed = 0
    for seed in range(seeds):
        plan = random_plan(analysis, seed, 0.5)
        pruned = fxprune.apply(net, fxprune.Plan.from_json(plan.to_json()), xs[0])
        reference = masked(net, plan.to_dict())
        expected = sliced_state(net, plan.to_dict())
        for name, t in pruned.state_dict().items():
            assert torch.equal(t, expected[name]), name
        for x in xs:
            assert relative_error(reference(x), pruned(x)) <= BOUND
        removed += len(plan.slices)
    assert removed
    return analysis


def tokens(y):
    return y.flatten(2).transpose(1, 2)


ROLLED = torch.tensor([3, 0, 0, 5, 7, 2])

# name -> (network, choices in the group of `stem`)
MOVES = {
    "roll positions": (lambda: case(lambda m, y: y.roll((1, -2), (2, 3))), 8),
    "roll channels": (lambda: case(lambda m, y: torch.roll(y, 3, 1)), 8),
    "roll both": (lambda: case(lambda m, y: torch.roll(y, (3, 1), (1, -1))), 8),
    "flip channels": (lambda: case(lambda m, y: y.flip(1)), 8),
    "flip both": (lambda: case(lambda m, y: torch.flip(y, (1, 3))), 8),
    "fliplr": (lambda: case(lambda m, y: torch.fliplr(y)), 8),
    "rot90": (lambda: case(lambda m, y: torch.rot90(y, 1, (2, 3))), 8),
    "rot90 of channels": (lambda: case(lambda m, y: torch.rot90(tokens(y), 2, (1, 2)), head="linear"), 8),
    "list index": (lambda: case(lambda m, y: y[:, [2, 0, 1, 5]], out=4), 8),
    "buffer index": (lambda: case(lambda m, y: y[:, m.at], out=6, at=ROLLED), 8),
    "buffer index of both": (lambda: case(lambda m, y: y[:, m.at, 1:], out=6, at=ROLLED), 8),
    "computed index": (lambda: case(lambda m, y: y[:, m.at.view(-1)], out=6, at=ROLLED.view(2, 3)), 8),
    "stepped": (lambda: case(lambda m, y: y[:, 1::2, ::2], out=4), 8),
    "stepped apart": (lambda: case(lambda m, y: torch.cat([y[:, ::2], y[:, 1::2]], 1)), 8),
    "index_select": (lambda: case(lambda m, y: torch.index_select(y, 1, m.at), out=6, at=ROLLED), 8),
    "index of positions": (lambda: case(lambda m, y: y[..., m.at], at=ROLLED), 8),
    "index of positions by the input": (
        lambda: case(lambda m, y: y[:, :, :, m.one(y).mean((0, 1, 2)).argsort()], one=nn.Conv2d(8, 1, 1)), 8),
    "one of the channels": (lambda: case(lambda m, y: y * y[:, 3:4] + y[:, 2].unsqueeze(1)), 6),
    "select": (lambda: case(lambda m, y: y + y.select(1, -1).unsqueeze(1)), 7),
    "select a position": (lambda: case(lambda m, y: tokens(y)[:, 0], head="linear"), 8),
    "repeat_interleave": (lambda: case(lambda m, y: y.repeat_interleave(2, 1), out=16), 8),
    "repeat_interleave counts": (
        lambda: case(lambda m, y: y.repeat_interleave(m.n, 1), out=12, n=torch.tensor([1, 2] * 4)), 8),
    "repeat": (lambda: case(lambda m, y: y.repeat(1, 2, 1, 1), out=16), 8),
    "tile": (lambda: case(lambda m, y: y.tile(2, 1, 1), out=16), 8),
    "glu": (lambda: case(lambda m, y: F.glu(y, 1), out=4), 4),
    "GLU": (lambda: case(lambda m, y: m.glu(tokens(y)), out=4, head="linear", glu=nn.GLU()), 4),
    "glu of positions": (lambda: case(lambda m, y: F.glu(y, 2)), 8),
    "own gate": (
        lambda: case(lambda m, y: (lambda a, b: a * torch.sigmoid(b))(*[y.chunk(2, 1)[i] for i in (0, 1)]), out=4), 4),
    "qkv by unbind": (lambda: case(_unbound, 24, 8, "linear"), 4),
    "qkv by number": (lambda: case(_numbered, 24, 8, "linear"), 4),
    "stack": (lambda: case(lambda m, y: torch.stack([y, y.sin()], 2).flatten(1, 2), out=16), 8),
    "tensor_split": (
        lambda: case(lambda m, y: torch.cat(list(reversed([torch.tensor_split(y, (3, 5), 1)[i] for i in range(3)])), 1)), 8),
    "split of a size": (
        lambda: case(lambda m, y: torch.cat([y.split(y.shape[1] // 2, 1)[i] for i in (1, 0)], 1)), 8),
    "narrow": (lambda: case(lambda m, y: y.narrow(1, 2, 5), out=5), 8),
    "pad by reflection": (lambda: case(lambda m, y: F.pad(y, (1, 2, 1, 0), mode="reflect")), 8),
    "pad channels": (lambda: case(lambda m, y: F.pad(y, (0, 0, 1, 1, 2, 3)), out=13), 8),
    "crop channels": (lambda: case(lambda m, y: F.pad(y, (0, 0, 0, 0, -2, -1)), out=5), 8),
    "pad by a size": (
        lambda: case(lambda m, y: F.pad(y, (0, y.shape[2] % 5, 0, 0, 0, 12 - y.size(1))), out=12), 8),
    "expand_as": (lambda: case(lambda m, y: y * y[:, :1].expand_as(y).exp().neg().exp()), 7),
    "expand to a number": (
        lambda: case(lambda m, y: y * m.one(y).expand(-1, 8, -1, -1), one=nn.Conv2d(8, 1, 1)), 8),
    "expand to a size": (
        lambda: case(lambda m, y: y * m.one(y).expand(-1, y.shape[1], -1, -1), one=nn.Conv2d(8, 1, 1)), 8),
    "expand to a shape": (
        lambda: case(lambda m, y: y * m.one(y).expand(y.shape), one=nn.Conv2d(8, 1, 1)), 8),
    "repeat to a size": (
        lambda: case(lambda m, y: y + m.one(y).repeat(1, y.shape[1], 1, 1), one=nn.Conv2d(8, 1, 1)), 8),
    "view_as": (lambda: case(lambda m, y: y.flatten(2).view_as(y)), 8),
    "unflatten": (lambda: case(lambda m, y: y.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)), 8),
    "movedim": (lambda: case(lambda m, y: y.movedim(1, -1).movedim(-1, 1)), 8),
    "swapaxes": (lambda: case(lambda m, y: tokens(y).swapaxes(1, 2).mT, head="linear"), 8),
    "squeeze": (lambda: case(lambda m, y: y.mean((2, 3), keepdim=True).squeeze(-1).squeeze(-1), head="linear"), 8),
    "sizes of a slice": (
        lambda: case(lambda m, y: y.reshape(y.shape[:2] + (-1,)).reshape(y.size())), 8),  # noqa: RUF005
    "numel": (lambda: case(lambda m, y: y.view(y.numel() // y.shape[1] // y[0, 0].numel(), 8, -1)
                           .view(y.shape) / y.numel() ** 0.5), 7),
    "shape used whole": (lambda: case(lambda m, y: y + torch.ones(y.shape, dtype=y.dtype)), 8),
    "zeros": (
        lambda: case(lambda m, y: torch.cat([y, torch.zeros(y.shape[0], 4, *[y.shape[i] for i in (2, 3)], dtype=y.dtype)], 1), out=12), 8),
    "new_full": (lambda: case(lambda m, y: y * y.new_full((1, y.shape[1], 1, 1), 3.0)), 8),
    "new_ones of a number": (lambda: case(lambda m, y: y - y.new_ones(8).view(-1, 1, 1)), 8),
    "like": (lambda: case(lambda m, y: y + torch.full_like(y, 0.5) * torch.ones_like(y)), 8),
    "mask of positions": (
        lambda: case(lambda m, y: y.masked_fill(y.new_ones(y.shape[-2:]).triu().bool(), 0.1)), 8),
    "unfold": (lambda: case(lambda m, y: m.mix(F.unfold(y, 3, padding=1)).unsqueeze(-1), out=8,
                            mix=nn.Conv1d(72, 8, 1)), 8),
    "fold": (lambda: case(lambda m, y: F.fold(m.wide(y.flatten(2)), (y.shape[2] + 2, y.shape[3] + 2), 3), out=2,
                          wide=nn.Conv1d(8, 18, 1)), 8),
    "windows": (lambda: case(lambda m, y: y.unfold(2, 4, 2).mean(-1)), 8),
    "unpool": (lambda: case(_unpooled, pool=nn.MaxPool2d(2, return_indices=True), back=nn.MaxUnpool2d(2)), 8),
    "functional unpool": (
        lambda: case(lambda m, y: (lambda r: F.max_unpool2d(r[0], r[1], 2))(F.max_pool2d(y, 2, return_indices=True))), 8),
    "grid_sample": (
        lambda: case(lambda m, y: F.grid_sample(y, F.affine_grid(m.theta[None].expand(y.shape[0], -1, -1), y.shape, False), align_corners=False),
                     theta=torch.tensor([[0.5, 0.1, 0.2], [0.3, 0.7, -0.1]])), 8),
    "roi_align": (
        lambda: case(lambda m, y: torchvision.ops.roi_align(y, m.boxes, 2), boxes=torch.tensor([[0, 1, 1, 5, 6.0]])), 8),
    "interpolate": (lambda: case(lambda m, y: F.interpolate(F.max_pool2d(y, 2), y.shape[2:]) + y), 8),
    "interpolate by factor": (lambda: case(lambda m, y: F.interpolate(y, scale_factor=2, mode="bilinear")), 8),
    "interpolate tokens": (
        lambda: case(lambda m, y: F.interpolate(y.flatten(2), scale_factor=2, mode="linear").mT, head="linear"), 8),
    "sort positions": (lambda: case(lambda m, y: y.sort(-1).values + torch.sort(y, dim=2)[0]), 8),
    "topk positions": (lambda: case(lambda m, y: y.flatten(2).topk(3, -1)[0].unsqueeze(2)), 8),
    "cumsum of positions": (lambda: case(lambda m, y: y.cumsum(2)), 8),
    "argmax of positions": (lambda: case(lambda m, y: y * y.argmax(3, keepdim=True)), 8),
    "gather": (lambda: case(lambda m, y: y.gather(2, y.argsort(2))), 8),
    "gather tokens": (
        lambda: case(lambda m, y: (lambda t, at: t.gather(1, at.unsqueeze(-1).expand(-1, -1, t.shape[-1])))(
            tokens(y), tokens(m.one(y))[..., 0].argsort(-1)[:, :5]), head="linear", one=nn.Conv2d(8, 1, 1)), 8),
    "mixed with positions": (
        lambda: case(lambda m, y: y.unflatten(1, (2, 4)).transpose(2, 4).reshape(y.shape)), 2),
    "mixed with another axis": (
        lambda: case(lambda m, y: y.mean(3).unflatten(1, (2, 4)).permute(0, 3, 1, 2).flatten(2), head="linear"), 4),
    "zeroed part": (lambda: case(_zeroed), 8),
    "assigned part": (lambda: case(_assigned), 4),
    "assigned constant": (lambda: case(_assigned_constant), 8),
    "assigned into zeros": (lambda: case(_into_zeros, out=12), 8),
    "changed part": (lambda: case(_changed), 8),
}  # fmt: skip


def _heads(y):
    b, _, h, w = y.shape
    return y.flatten(2).mT.reshape(b, h * w, 3, 4, 2).permute(2, 0, 3, 1, 4)


def _attend(q, k, v):
    out = F.relu(q) * k.sigmoid() + v
    return out.transpose(1, 2).flatten(2)


def _unbound(m, y):
    q, k, v = (_heads(y).unbind(0)[i] for i in range(3))
    return _attend(q, k, v)


def _numbered(m, y):
    qkv = _heads(y)
    return _attend(qkv[0], qkv[1], qkv[2])


def _unpooled(m, y):
    out = m.pool(y)
    return m.back(out[0], out[1])


def _zeroed(m, y):
    y = y.clone()
    y[:, 2:4].zero_()
    y[:, :, 1:3].fill_(0.3)
    return y


def _assigned(m, y):
    y = y.clone()
    y[:, :4, 1:] = y[:, 4:, :-1]
    return y


def _assigned_constant(m, y):
    y = y.clone()
    y[:, 2:5] = 0.7
    y[..., 0] = 1
    return y


def _into_zeros(m, y):
    wide = y.new_zeros(y.shape[0], 12, y.shape[2], y.shape[3])
    wide[:, 2:10] = y
    return wide


def _changed(m, y):
    y = y.clone()
    y[:, 2:5] += 1
    y[:, 1:3].mul_(3)
    return y


@pytest.mark.parametrize("name", MOVES)
def test_movement_obeys_the_law(name):
    build, choices = MOVES[name]
    analysis = obeys(build())
    assert len(analysis.group("stem")) == choices


# Shuffles


def shuffled(m, y, groups):
    b, c, h, w = y.shape
    return y.view(b, groups, c // groups, h, w).transpose(1, 2).reshape(b, c, h, w)


SHUFFLES = {
    "view": lambda m, y: shuffled(m, y, 3),
    "stacked": lambda m, y: shuffled(m, F.relu(shuffled(m, y, 3)), 4),
    "stacked three times": lambda m, y: shuffled(m, shuffled(m, shuffled(m, y, 2), 4), 6),
    "constants": lambda m, y: y.reshape(-1, 4, 3, *[y.shape[i] for i in (2, 3)])
    .permute(0, 2, 1, 3, 4).contiguous().flatten(1, 2) * 2,
    "unflatten": lambda m, y: y.unflatten(1, (2, 6)).transpose(1, 2).flatten(1, 2),
    "module": lambda m, y: m.shuffle(F.relu(m.shuffle(y) - 1)),
    "function": lambda m, y: F.channel_shuffle(F.channel_shuffle(y, 3), 4),
    "after a split": lambda m, y: shuffled(m, torch.cat([m.body2(y[:, :6]), y[:, 6:]], 1), 2),
    "tokens": lambda m, y: tokens(y).unflatten(2, (3, 4)).mT.flatten(2).mT.unflatten(2, y.shape[2:]),
}  # fmt: skip


@pytest.mark.parametrize("name", SHUFFLES)
def test_shuffles_obey_the_law_and_couple_nothing(name):
    net = case(SHUFFLES[name], 12, shuffle=nn.ChannelShuffle(3), body2=nn.Conv2d(6, 6, 1))
    analysis = obeys(net, seeds=5)
    assert len(analysis.group("stem")) == 12
    assert not [why for node, why in analysis.frozen.items() if node != "output"]


def test_a_shuffle_that_stays_rectangular_stays_a_view():
    net = case(SHUFFLES["view"], 12)
    x = net.inputs()[0]
    analysis = fxprune.analyze(net, x)
    for keep, targets in (([0, 2, 4, 6, 8, 10], 0), ([0, 1, 2, 5, 11], 1)):
        pruned = fxprune.apply(net, analysis.plan({"stem": keep}), x)
        picks = [n for n in pruned.graph.nodes if n.target is torch.index_select]
        views = [n for n in pruned.graph.nodes if n.target in ("view", "reshape", "transpose")]
        assert (len(picks), bool(views)) == (targets, not targets)
        assert relative_error(masked(net, pruned.plan.to_dict())(x), pruned(x)) <= BOUND


def test_a_shuffle_whose_middle_is_read_elsewhere_stays_rectangular():
    def read(m, y):
        middle = y.unflatten(1, (3, 4)).transpose(1, 2)
        return middle.flatten(1, 2) + middle.mean((1, 2)).unsqueeze(1)

    net = case(lambda m, y: y.unflatten(1, (3, 4)).transpose(1, 2).sin().flatten(1, 2), 12)
    assert len(obeys(net).group("stem")) < 12
    net = case(read, 12)
    assert not fxprune.analyze(net, net.inputs()[0]).groups


def test_a_pruned_shuffle_can_be_pruned_again():
    net = case(SHUFFLES["stacked"], 12)
    x = net.inputs()[0]
    once = fxprune.apply(net, fxprune.analyze(net, x).plan({"stem": [0, 1, 2, 5, 7, 11]}), x)
    twice = fxprune.compile(once, x, budget=0.6)
    again = fxprune.apply(net, twice.plan, x)
    assert len(twice.plan.keep("stem.weight", 0)) < 6
    assert torch.equal(twice(x), again(x))


def test_indices_follow_the_network_to_pickles_files_and_other_dtypes(tmp_path):
    net = case(SHUFFLES["stacked"], 12)
    x = net.inputs()[0]
    pruned = fxprune.compile(net, x, budget=0.6)
    assert not [key for key in pruned.state_dict() if "index" in key]
    for other in (copy.deepcopy(pruned), pickle.loads(pickle.dumps(pruned))):
        assert torch.equal(other(x), pruned(x))
    fxprune.save(pruned, tmp_path / "net.safetensors")
    loaded = fxprune.load(tmp_path / "net.safetensors", case(SHUFFLES["stacked"], 12))
    assert torch.equal(loaded(x), pruned(x))
    assert torch.export.export(pruned, (x,)).module()(x).equal(pruned(x))


# What freezes says why

FREEZES = {
    "sort": (lambda m, y: y.sort(1).values, "`sort` runs over the channels"),
    "topk": (lambda m, y: y.topk(8, 1)[0], "`topk` runs over the channels"),
    "cumsum": (lambda m, y: y.cumsum(1), "`cumsum` runs over the channels"),
    "argmax": (lambda m, y: y * y.argmax(1, keepdim=True), "`argmax` runs over the channels"),
    "index by the input": (
        lambda m, y: y[:, y.mean((0, 2, 3)).argsort()], "an index that is not constant"),
    "mask": (lambda m, y: y[:, m.mask], "an index that is a mask"),
    "unbind": (lambda m, y: torch.stack(list(reversed([y.unbind(1)[i] for i in range(8)])), 1), "`unbind` picks single"),
    "scatter": (lambda m, y: y.scatter(1, torch.zeros_like(y).long(), 1.0), "no rule for `scatter`"),
    "gather": (lambda m, y: y.gather(1, torch.zeros_like(y).long()), "`gather` picks among"),
    "reflected channels": (
        lambda m, y: F.pad(y.mT.flatten(2).mT, (2, 2), mode="reflect")[..., 2:-2].mT.view(y.shape), "copies of channels"),
    "windows of channels": (lambda m, y: y.unfold(1, 1, 1)[..., 0], "windows over the channels"),
    "interpolated tokens": (
        lambda m, y: F.interpolate(y.flatten(2).mT, 8, mode="linear").mT.view(y.shape), "mixes positions of channels"),
    "bits": (lambda m, y: y.view(torch.int64).view(torch.float64), "read as another type"),
    "flat roll": (lambda m, y: y.roll(1), "mixes all of them"),
    "triangle": (lambda m, y: y.transpose(1, 3).triu().transpose(1, 3), "by row and column"),
    "places to look at": (
        lambda m, y: F.grid_sample(y, m.two(y).movedim(1, -1), align_corners=True), "places for `grid_sample`"),
}  # fmt: skip


@pytest.mark.parametrize("name", FREEZES)
def test_what_cannot_be_cut_says_why_and_where(name):
    body, why = FREEZES[name]
    net = case(body, mask=torch.tensor([True] * 8), two=nn.Conv2d(8, 2, 1))
    analysis = fxprune.analyze(net, net.inputs()[0])
    reasons = [text for node, text in analysis.frozen.items() if node != "output"]
    assert any(why in text and "test_movement.py:" in text for text in reasons), analysis.frozen
    if analysis.groups:
        obeys(net, seeds=1)


def test_a_made_constant_that_is_read_elsewhere_stays():
    def made(m, y):
        ones = y.new_ones(8)
        return y * ones.view(-1, 1, 1) + torch.renorm(ones[None], 2, 0, 1.0).sum()

    net = case(made)
    analysis = fxprune.analyze(net, net.inputs()[0])
    assert not analysis.groups
    assert any("read as a whole" in why for why in analysis.frozen.values())
