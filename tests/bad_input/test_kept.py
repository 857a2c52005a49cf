"""What must stay as it was: flags, modes, ties, dtypes, memory formats."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from refusals import Between, X, check_law, check_stays, conv, frozen, l1, net, scrambled, untouched
from torch import Tensor, nn

import fxprune
from fxprune import PlanError


def test_frozen_parameters_stay_frozen():
    model = net()
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    with untouched(model):
        pruned = fxprune.compile(model, X, progress=False)
    flags = {k: p.requires_grad for k, p in pruned.named_parameters()}
    assert flags == {k: p.requires_grad for k, p in model.named_parameters()}
    assert all(p.is_leaf and p.grad is None for p in pruned.parameters())


def test_nothing_is_shared_with_the_original():
    model = net()
    pruned = fxprune.compile(model, X, method=l1(0), progress=False)
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    assert own.isdisjoint(t.untyped_storage().data_ptr() for t in pruned.state_dict().values())


def test_gradients_of_the_original_stay_its_own():
    model = net()
    model(X).sum().backward()
    with untouched(model):
        pruned = fxprune.compile(model, X, progress=False)
    assert all(p.grad is None for p in pruned.parameters())


def test_modes_are_kept_module_by_module():
    model = net().train()
    model[1].eval()
    with untouched(model):
        pruned = fxprune.compile(model, X, progress=False)
    assert {
        k: m.training for k, m in pruned.named_modules() if k in dict(model.named_modules())
    } == {k: m.training for k, m in model.named_modules()}


def test_shared_weights_are_cut_once_and_stay_tied():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = conv(3, 8), conv(8, 8), conv(8, 8), conv(8, 4)
            self.c.weight = self.b.weight
            self.d2 = self.d

        def forward(self, x):
            return self.d2(self.c(self.b(self.a(x)).relu()).relu())

    pruned = check_law(Shared(), X)
    assert pruned.c.weight is pruned.b.weight
    assert pruned.b.weight.shape[:2] == (4, 4)
    assert [s.tensor for s in pruned.plan.slices].count("c.weight") == 0


@pytest.mark.parametrize("tie", ["bias", "norm"])
def test_shared_vectors_are_cut_once_and_stay_tied(tie):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d = conv(3, 8), conv(3, 8), conv(8, 4), conv(8, 4)
            self.n, self.m = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
            if tie == "bias":
                self.b.bias = self.a.bias
            else:
                self.m = self.n

        def forward(self, x):
            return self.c(self.n(self.a(x)).relu()) + self.d(self.m(self.b(x)).relu())

    pruned = check_law(Shared(), X)
    assert pruned.a.out_channels == pruned.b.out_channels == 4
    assert pruned.b.bias is pruned.a.bias if tie == "bias" else pruned.n.num_features == 4


def test_a_tied_embedding_is_whole_or_cut_as_one():
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.up, self.down = nn.Embedding(10, 8), nn.Linear(8, 16), nn.Linear(16, 8)
            self.head = nn.Linear(8, 10, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.down(self.up(self.embed(x)).relu()))

    check_law(Language(), torch.arange(6).view(2, 3))


def test_an_attention_that_shares_a_layer():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.attention.out_proj = self.b

        def forward(self, x):
            h = self.a(x)
            return self.c(self.b(self.attention(h, h, h)[0]))

    model = scrambled(Shared())
    with contextlib.suppress(PlanError):  # nothing left to prune is a fair answer
        pruned = fxprune.compile(model, torch.randn(2, 3, 4).double(), verify=False, progress=False)
        pruned(torch.randn(2, 3, 4).double())


def autoencoder(x: Tensor, w: Tensor) -> Tensor:
    return F.conv_transpose2d(F.conv2d(x, w, padding=1).relu(), w, padding=1)


def test_a_weight_that_makes_and_reads_the_same_channels():
    check_law(Between(lambda m, h: autoencoder(h, m.w), w=nn.Parameter(torch.randn(8, 8, 3, 3))), X)


def test_a_weight_used_transposed_elsewhere():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.c(F.linear(self.b(self.a(x).relu()), self.b.weight.t()))

    check_stays(Tied(), "in two ways that do not fit together", torch.randn(3, 4))


@pytest.mark.parametrize(
    "read",
    [
        lambda w: w.abs().sum(),
        lambda w: w.norm(),
        lambda w: w.view(-1).sum(),
        lambda w: w.mean(0).sum(),
        lambda w: torch.stack([w, w]).sum(),
        lambda w: w.t().sum(),
        lambda w: w[0].sum(),
        lambda w: w.detach().pow(2).sum(),
    ],
)
def test_a_weight_that_is_also_read_as_a_number(read):
    class Penalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.c(self.b(self.a(x).relu())) * read(self.b.weight)

    check_stays(Penalised(), "`b.weight` is read as a whole", torch.randn(3, 4))


def test_a_weight_multiplied_from_the_right():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x):
            return self.c(self.b(self.a(x)) @ self.b.weight)

    check_stays(Product(), "in two ways that do not fit together", torch.randn(3, 4))


def test_a_weight_that_is_returned():
    class Returned(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.c(self.b(self.a(x).relu())), self.b.weight

    check_stays(Returned(), "outputs of the model keep their channels", torch.randn(3, 4))


def test_parameters_that_share_a_part_of_their_memory_are_frozen():
    model = net()
    both = torch.randn(12, 3, 3, 3)
    model[0].weight = nn.Parameter(both[:8])
    model.other = nn.Parameter(both[4:])
    assert "`0.weight` shares memory with a part of `other`" in frozen(model)
    pruned = fxprune.compile(model, X, method=l1(0.5), progress=False)
    assert pruned.get_submodule("0").out_channels == 8
    assert pruned.get_submodule("3").out_channels == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_are_kept(dtype):
    model = net().to(dtype)
    with untouched(model):
        pruned = fxprune.compile(model, X.to(dtype), progress=False)
    assert {p.dtype for p in pruned.parameters()} == {dtype}
    assert pruned.report.verified
    scores = fxprune.compile(net().float(), X, progress=False)
    assert scores.report.verified


def test_half_weights_choose_the_channels_of_their_float_values():
    model = net().half()
    plan = fxprune.compile(model, X.half(), method=l1(0.5), progress=False).plan
    assert plan.slices == fxprune.compile(copy.deepcopy(model).float(), X, method=l1(0.5), progress=False).plan.slices  # fmt: skip


def test_memory_formats_are_kept():
    model = net().to(memory_format=torch.channels_last)
    with untouched(model):
        pruned = fxprune.compile(model, X.to(memory_format=torch.channels_last), method=l1(0.5), progress=False)  # fmt: skip
    for name in ("0", "3", "5"):
        weight = pruned.get_submodule(name).weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert not weight.is_contiguous()
    model = nn.Sequential(nn.Conv3d(2, 8, 3), nn.ReLU(), nn.Conv3d(8, 4, 3))
    model = model.to(memory_format=torch.channels_last_3d)
    pruned = fxprune.compile(model, torch.randn(1, 2, 6, 6, 6), method=l1(0.5), progress=False)
    assert pruned.get_submodule("2").weight.is_contiguous(memory_format=torch.channels_last_3d)


def test_weights_with_other_strides():
    model = scrambled(net())
    model[3].weight = nn.Parameter(
        model[3].weight.detach().transpose(0, 1).contiguous().transpose(0, 1)
    )
    check_law(model, X)
