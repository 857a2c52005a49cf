"""Odd models that are no mistake: they prune, and the law holds."""

import contextlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from refusals import Between, X, check_law, conv, l1, net, untouched
from torch import Tensor, nn

import fxprune
from fxprune import FxPruneError


@pytest.mark.parametrize("name", ["für", "0", "a-b c", "[b]x[/b]", "x'y", "a" * 300, "self"])
def test_names_that_are_no_identifiers(name):
    check_law(Between(lambda m, h: m.parts[name](h), parts=nn.ModuleDict({name: conv(8, 8)})), X)


@pytest.mark.parametrize("name", ["class", "None", 'x"y', "x\ny", "x\\y", "lambda"])
def test_names_that_generated_code_cannot_hold(name):
    holder = Between(lambda m, h: m.parts[name](h), parts=nn.ModuleDict({name: conv(8, 8)}))
    with untouched(holder):
        try:
            fxprune.compile(holder, X, progress=False)
        except FxPruneError as error:
            assert name in str(error) or repr(name) in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    "name", ["graph", "plan", "report", "origin", "code", "meta", "recompile", "_graph"]
)
def test_names_that_a_pruned_network_uses_itself(name):
    holder = Between(lambda m, h: getattr(m, name)(h), **{name: conv(8, 8)})
    with untouched(holder):
        try:
            fxprune.compile(holder, X, progress=False)
        except FxPruneError as error:
            assert f"`{name}`" in str(error)  # noqa: PT017


@pytest.mark.parametrize("name", ["graph", "plan", "report", "origin", "code", "meta"])
def test_plain_attributes_that_a_pruned_network_uses_itself(name):
    model = Between(lambda m, h: h)
    setattr(model, name, "mine")
    with untouched(model):
        pruned = fxprune.compile(model, X, progress=False)
    assert isinstance(pruned.plan, fxprune.Plan)
    assert isinstance(pruned.graph, torch.fx.Graph)
    assert any(name in note for note in pruned.report.notes)


def test_several_inputs_and_structured_outputs():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = conv(3, 8), conv(2, 8), conv(8, 4), conv(8, 5)

        def forward(self, x, y, scale=2.0, *, flag=False):
            h = self.a(x) + self.b(y)
            h = h.relu() if flag else h
            return {"out": self.c(h) * scale, "more": [self.d(h)]}

    check_law(Several(), X, torch.randn(2, 2, 8, 6))


def test_outputs_that_are_no_tensors():
    class Structured(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(3, 8), conv(8, 4)

        def forward(self, x):
            return [self.b(self.a(x)), (None, 3, "text")], {"x": x}

    model = Structured()
    with untouched(model):
        pruned = fxprune.compile(model, X, progress=False)
    (y, rest), same = pruned(X)
    assert (y.shape, rest) == ((2, 4, 8, 6), (None, 3, "text"))
    assert same["x"] is X


def test_a_module_called_twice_on_two_sizes():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = conv(3, 8), conv(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            h = F.max_pool2d(self.b(self.a(x)).relu(), 2)
            return self.head(self.b(h).relu().mean((2, 3)))

    check_law(Twice(), X, more=(torch.randn(1, 3, 12, 4),))


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 3)), torch.randn(2, 3, 9)),
        (nn.Sequential(nn.Conv3d(3, 8, 2), nn.BatchNorm3d(8), nn.ReLU(), nn.Conv3d(8, 4, 2)), torch.randn(2, 3, 4, 5, 4)),
        (nn.Sequential(nn.ConvTranspose2d(3, 8, 3, 2, 1, 1), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2)), X),
        (nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(5, 3)),
        (nn.Sequential(conv(3, 8), nn.BatchNorm2d(8, affine=False), nn.ReLU(), conv(8, 4)), X),
        (nn.Sequential(conv(3, 8), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(), conv(8, 4)), X),
        (nn.Sequential(conv(3, 8), nn.BatchNorm2d(8, affine=False, track_running_stats=False), conv(8, 4)), X),
        (nn.Sequential(conv(3, 8), nn.InstanceNorm2d(8), nn.PReLU(8), conv(8, 4)), X),
        (nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 1), nn.ReLU(), conv(1, 8), conv(8, 1)), X),
        (nn.Sequential(conv(3, 8), nn.ReLU(inplace=True), conv(8, 4)), X),
    ],
)  # fmt: skip
def test_ranks_and_norms(model, x):
    check_law(model, x)


def test_inputs_without_a_batch():
    check_law(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4)), X[0])
    check_law(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(1, 3))


FLATTENS = [
    lambda h: h.view(h.size(0), -1),
    lambda h: h.view(-1, 6 * 8 * 6),
    lambda h: h.reshape(h.shape[0], h.shape[1] * h.shape[2] * h.shape[3]),
    lambda h: torch.flatten(h, start_dim=-3),
    lambda h: h.flatten(2).transpose(1, 2).flatten(1),
    lambda h: h.permute(0, 2, 3, 1).reshape(h.size(0), -1),
    lambda h: h.view(h.size(0), 2, -1, h.size(2), h.size(3)).flatten(1),
    lambda h: h.unflatten(1, (2, 3)).flatten(1),
]


@pytest.mark.parametrize("flatten", FLATTENS)
@pytest.mark.parametrize("batch", [1, 3])
def test_flattening_images_that_are_not_square(flatten, batch):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = conv(3, 8), conv(8, 6), nn.Linear(6 * 8 * 6, 2)

        def forward(self, x):
            return self.head(flatten(self.b(self.a(x)).relu()))

    x = torch.randn(batch, 3, 8, 6)
    check_law(Flat(), x, more=(torch.randn(2, 3, 8, 6),))


@pytest.mark.parametrize(
    "squeeze",
    [
        lambda h: h.squeeze(),
        lambda h: h.squeeze(-1).squeeze(-1),
        lambda h: torch.squeeze(h, (2, 3)),
        lambda h: h[:, :, 0, 0],
        lambda h: h[..., 0, 0],
        lambda h: h.view(-1, 8),
        lambda h: h.mean([-1, -2]),
    ],
)
@pytest.mark.parametrize("ratio", [0.5, 0.99])
def test_squeezing_pooled_images(squeeze, ratio):
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = conv(3, 8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.c(self.b(squeeze(F.adaptive_avg_pool2d(self.a(x), 1))))

    check_law(Pooled(), X, ratio=ratio, more=(torch.randn(3, 3, 5, 9),))


def in_place(m: Any, h: Tensor) -> Tensor:
    h += m.other(h)
    h.relu_()
    h *= 2
    F.relu(h, inplace=True)
    h[:, :4].mul_(0.5)
    return h


BETWEENS: dict[str, Any] = {
    "in place": (in_place, 8),
    "chunk in place": (lambda m, h: (h.chunk(2, 1)[0].mul_(2), h)[1], 8),
    "pad negative": (lambda m, h: F.pad(h, (1, -1, 0, 0, -2, 3)), 9),
    "pad only negative": (lambda m, h: F.pad(h, (0, 0, 0, 0, -3, -1)), 4),
    "maxout": (lambda m, h: h.view(h.size(0), 2, 4, h.size(2), h.size(3)).amax(1), 4),
    "slices": (lambda m, h: torch.cat([h[:, -3:], h[:, 1:2], h[:, 2:100]], 1), 10),
    "size as a number": (lambda m, h: h / h.shape[1] ** 0.5 + h.size(1), 8),
    "outer sum": (lambda m, h: (h.unsqueeze(1) + h.unsqueeze(2)).sum(1), 8),
    "outer product": (lambda m, h: (h.unsqueeze(1) * h.unsqueeze(2)).flatten(1, 2), 64),
    "repeat": (lambda m, h: torch.cat([h.repeat(1, 2, 1, 1), torch.tile(h, (1, 2, 1, 1))], 1), 32),
    "stack": (lambda m, h: torch.stack([h, h.relu()], 2).flatten(1, 2), 16),
    "flip": (lambda m, h: h.flip(1) + torch.roll(h, 1, 1), 8),
    "softmax": (lambda m, h: h.softmax(1) + h.argmax(1, keepdim=True), 8),
    "index": (lambda m, h: h[:, [0, 2, 5]] + h[:, ::3] + h[:, 1:2], 3),
    "shape whole": (lambda m, h: h + h.new_zeros(h.shape), 8),
    "bmm": (lambda m, h: torch.bmm(h.flatten(2).transpose(1, 2), h.flatten(2)).view(h.size(0), 48, 8, 6), 48),
    "spatial gate": (lambda m, h: h * m.other(h)[:, :1].sigmoid(), 8),
    "excitation": (lambda m, h: h * m.other(h.mean((2, 3), keepdim=True)).sigmoid(), 8),
    "empty slice": (lambda m, h: torch.cat([h[:, 3:3], h], 1), 8),
    "empty part": (lambda m, h: torch.cat([h, h.new_zeros(h.size(0), 0, 8, 6)], 1), 8),
}  # fmt: skip


@pytest.mark.parametrize("name", BETWEENS)
def test_operations_between_two_layers(name):
    between, width = BETWEENS[name]
    check_law(Between(between, width, other=conv(8, 8)), X)


def test_parameter_lists():
    check_law(
        Between(
            lambda m, h: h * m.scales[0] + m.scales[1] * m.more["g"][:, None, None],
            scales=nn.ParameterList([torch.randn(8, 1, 1), torch.randn(1)]),
            more=nn.ParameterDict({"g": torch.randn(8)}),
        ),
        X,
    )


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Linear(0, 6), nn.Linear(6, 2)), nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 0))]
)  # fmt: skip
def test_layers_of_size_zero(model):
    x = torch.randn(2, model[0].in_features)
    with untouched(model), contextlib.suppress(FxPruneError):
        fxprune.compile(model, x, progress=False, method=l1(0.5))


def test_an_empty_batch_is_refused_or_pruned():
    model = net().eval()
    with untouched(model), contextlib.suppress(FxPruneError):
        pruned = fxprune.compile(model, X[:0], progress=False)
        assert pruned.plan.metrics["macs_before"] > 0
