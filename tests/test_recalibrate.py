"""Recalibration: batch norms get the mean statistics of the data, and nothing else changes."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxprune


class Net(nn.Module):
    """A norm before and after dropout, one without statistics, one frozen in eval mode."""

    def __init__(self):
        super().__init__()
        self.bn0 = nn.BatchNorm2d(3, momentum=0.3)
        self.conv = nn.Conv2d(3, 6, 3)
        self.drop = nn.Dropout(0.5)
        self.bn1 = nn.BatchNorm2d(6, momentum=None)
        self.plain = nn.BatchNorm2d(6, track_running_stats=False)
        self.head = nn.Linear(6, 4)
        self.bn2 = nn.BatchNorm1d(4, affine=False)

    def forward(self, x):
        x = self.bn1(self.drop(self.conv(self.bn0(x)).relu()))
        return self.bn2(self.head(self.plain(x).mean((2, 3))))


def network():
    return Net().double().eval()


def batches(*sizes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, 8, 8, generator=g, dtype=torch.float64) * (i + 1) + i for i, n in enumerate(sizes)]  # fmt: skip


def norms(net):
    return {n: m for n, m in net.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def expected_statistics(net, data):
    """Mean over batches of what enters each norm, by hand; norms use their batch, dropout nothing."""
    sums = {n: [0.0, 0.0] for n in ("bn0", "bn1", "bn2")}
    for x in data:
        seen = {"bn0": x}
        y = _normal(x) * _vector(net.bn0.weight) + _vector(net.bn0.bias)
        seen["bn1"] = y = net.conv(y).relu()
        y = _normal(y) * _vector(net.bn1.weight) + _vector(net.bn1.bias)
        y = _normal(y) * _vector(net.plain.weight) + _vector(net.plain.bias)
        seen["bn2"] = net.head(y.mean((2, 3)))
        for name, v in seen.items():
            dims = [d for d in range(v.dim()) if d != 1]
            sums[name][0] += v.mean(dims) / len(data)
            sums[name][1] += v.var(dims, unbiased=True) / len(data)
    return sums


def _vector(t):
    return t[:, None, None]


def _normal(x):
    mean = x.mean((0, 2, 3), keepdim=True)
    return (x - mean) / (x.var((0, 2, 3), keepdim=True, unbiased=False) + 1e-5).sqrt()


@torch.no_grad()
def test_statistics_are_the_mean_over_batches():
    net, data = network(), batches(4, 6, 3)
    new = fxprune.recalibrate(net, data)
    for name, (mean, var) in expected_statistics(net, data).items():
        norm = new.get_submodule(name)
        torch.testing.assert_close(norm.running_mean, mean, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(norm.running_var, var, rtol=1e-10, atol=1e-12)
        assert norm.num_batches_tracked == 3
    assert new.plain.running_mean is None


@torch.no_grad()
def test_earlier_statistics_are_forgotten():
    net = network()
    other = copy.deepcopy(net)
    for norm in (other.bn0, other.bn1, other.bn2):
        norm.running_mean.fill_(float("nan"))
        norm.running_var.fill_(float("inf"))
    a, b = (fxprune.recalibrate(n, batches(4, 4)).state_dict() for n in (net, other))
    assert all(torch.equal(a[k], b[k]) for k in a)


class Counting(nn.Module):
    """Remembers the sizes of the batches that pass, and whether layers were in training."""

    def __init__(self):
        super().__init__()
        self.bn, self.drop, self.sizes = nn.BatchNorm2d(3), nn.Dropout(0.5), []

    def forward(self, x):
        assert not torch.is_grad_enabled()
        assert self.bn.training
        assert not self.training
        assert not self.drop.training
        Counting.seen.append(len(x))
        return self.drop(self.bn(x))


@pytest.mark.parametrize(
    ("samples", "seen"),
    [(1024, [4, 6, 3]), (13, [4, 6, 3]), (10, [4, 6]), (8, [4, 4]), (4, [4]), (3, [3])],
)
def test_samples_are_counted_exactly(samples, seen):
    Counting.seen = []
    fxprune.recalibrate(Counting().double().eval(), batches(4, 6, 3), samples=samples)
    assert Counting.seen == seen


def test_no_batch_is_read_beyond_the_samples():
    def endless():
        yield from batches(4, 4)
        raise AssertionError("a third batch was asked for")

    fxprune.recalibrate(network(), endless(), samples=8)


@pytest.mark.parametrize("kind", [lambda x: x, lambda x: (x, torch.zeros(len(x))), lambda x: [x], lambda x: (x, 0, "meta")])  # fmt: skip
def test_batches_are_tensors_or_tuples(kind):
    net = network()
    expected = fxprune.recalibrate(net, batches(4, 4)).state_dict()
    got = fxprune.recalibrate(net, [kind(x) for x in batches(4, 4)]).state_dict()
    assert all(torch.equal(got[k], expected[k]) for k in expected)


def test_loaders_and_generators_work():
    x = torch.cat(batches(4, 4))
    data = torch.utils.data.TensorDataset(x, torch.arange(8))
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    a = fxprune.recalibrate(network(), loader)
    b = fxprune.recalibrate(network(), (x for x in batches(4, 4)))
    for norm in (a.bn0, b.bn0):
        assert norm.num_batches_tracked == 2
        torch.testing.assert_close(norm.running_mean, x.mean((0, 2, 3)))  # batches of one size


def test_the_argument_is_untouched_and_modes_come_back():
    net = network().train()
    net.bn1.eval()
    net.drop.eval()
    net.conv.weight.requires_grad_(False)
    before = copy.deepcopy(net)
    new = fxprune.recalibrate(net, batches(4, 6))
    for a in (net, new):
        assert [m.training for m in a.modules()] == [m.training for m in before.modules()]
        assert [n.momentum for n in norms(a).values()] == [
            n.momentum for n in norms(before).values()
        ]
        assert [p.requires_grad for p in a.parameters()] == [p.requires_grad for p in before.parameters()]  # fmt: skip
        assert all(p.grad is None for p in a.parameters())
    for key, t in before.state_dict().items():
        assert torch.equal(net.state_dict()[key], t), key
        is_statistic = key.endswith(("running_mean", "running_var", "num_batches_tracked"))
        assert torch.equal(new.state_dict()[key], t) == (not is_statistic), key
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in new.parameters()}


def test_nothing_is_left_half_done_by_a_failing_loader():
    net = network().train()
    before = copy.deepcopy(net)

    def broken():
        yield batches(4)[0]
        raise RuntimeError("disk gone")

    with pytest.raises(RuntimeError, match="disk gone"):
        fxprune.recalibrate(net, broken())
    assert [m.training for m in net.modules()] == [m.training for m in before.modules()]
    assert all(torch.equal(t, before.state_dict()[k]) for k, t in net.state_dict().items())


def test_a_rest_of_one_sample_is_no_error():
    """Batch norms over vectors cannot take the statistics of a single sample."""
    new = fxprune.recalibrate(network(), batches(4, 4), samples=5)
    assert all(torch.isfinite(t).all() for t in new.state_dict().values())
    assert all(torch.isfinite(t).all() for t in fxprune.recalibrate(network(), batches(4, 1)).state_dict().values())  # fmt: skip


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize("loader", [[], iter(()), [torch.zeros(0, 3, 8, 8, dtype=torch.float64)]])
def test_an_empty_loader(loader):
    with pytest.raises(fxprune.OptionError, match="gave no batch") as caught:
        fxprune.recalibrate(network(), loader)
    assert "where: loader" in str(caught.value)
    assert "generator" in str(caught.value)


@pytest.mark.parametrize("batch", [{"x": torch.zeros(2, 3, 8, 8)}, "image", (), ("image", 1), 3])
def test_batches_of_another_type(batch):
    with pytest.raises(fxprune.OptionTypeError, match="where the input should be") as caught:
        fxprune.recalibrate(network(), [batch])
    assert "(input, target)" in str(caught.value)


@pytest.mark.parametrize("loader", [3, None, network])
def test_a_loader_that_is_none(loader):
    with pytest.raises(fxprune.OptionTypeError):
        fxprune.recalibrate(network(), loader)


@pytest.mark.parametrize(("samples", "error"), [(0, fxprune.OptionError), (-1, fxprune.OptionError), (1.5, fxprune.OptionTypeError), (True, fxprune.OptionTypeError)])  # fmt: skip
def test_bad_samples(samples, error):
    with pytest.raises(error, match="samples is"):
        fxprune.recalibrate(network(), batches(4), samples=samples)


def test_a_model_that_is_none():
    with pytest.raises(fxprune.OptionTypeError):
        fxprune.recalibrate("model", batches(4))


# ---- pruned networks ----------------------------------------------------------------------------


def small():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)
    )
    return net.double().eval()


def test_a_pruned_network_says_that_its_weights_changed(tmp_path):
    net, data = small(), batches(4, 6)
    pruned = fxprune.compile(net, data[0], progress=False)
    new = fxprune.recalibrate(pruned, data, samples=7)
    assert isinstance(new, fxprune.PrunedModule)
    assert (pruned.plan.weights, new.plan.weights) == ("cut", "changed")
    assert new.plan.slices == pruned.plan.slices
    assert any("7 samples" in n for n in new.report.notes)
    assert not any("samples" in n for n in pruned.report.notes)
    fxprune.save(new, tmp_path / "net.safetensors")
    loaded = fxprune.load(tmp_path / "net.safetensors", net)
    assert loaded.plan.weights == "changed"
    assert torch.equal(loaded(data[0]), new(data[0]))


def test_repair_is_recalibration():
    net, data = small(), [(x, torch.zeros(len(x))) for x in batches(4, 6)]
    repaired = fxprune.compile(net, data=data, repair="bn", progress=False)
    by_hand = fxprune.recalibrate(fxprune.compile(net, data[0][0], progress=False), data)
    assert repaired.plan.weights == "changed"
    for key, t in by_hand.state_dict().items():
        assert torch.equal(repaired.state_dict()[key], t), key


def test_a_network_without_norms_stays_as_it_is():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3)).double().eval()
    pruned = fxprune.compile(net, batches(2)[0], progress=False)
    new = fxprune.recalibrate(pruned, batches(4))
    assert new is not pruned
    assert new.plan.weights == "cut"
    for key, t in pruned.state_dict().items():
        assert torch.equal(new.state_dict()[key], t), key
    folded = fxprune.compile(small(), batches(2)[0], fold=True, progress=False)
    assert fxprune.recalibrate(folded, batches(4)).plan.weights == "cut"


def test_recalibration_mends_what_pruning_shifts():
    net, data = small().train(), batches(16, 16, 16)
    for norm in norms(net).values():
        norm.momentum = None  # the mean over the batches: what training converges to
    with torch.no_grad():
        for x in data:
            net(x)
    pruned = fxprune.compile(net.eval(), data[0], budget=0.5, progress=False)
    mended = fxprune.recalibrate(pruned, data)
    with torch.no_grad():
        x = torch.cat(data)
        outputs = {n: m(x).mean((0, 2, 3)) for n, m in {"net": net, "pruned": pruned, "mended": mended}.items()}  # fmt: skip
    gap = F.mse_loss(outputs["mended"], outputs["net"])
    assert gap < 0.1 * F.mse_loss(outputs["pruned"], outputs["net"])
