"""The trainer: it learns, repeats itself, restores what it must, and says what is wrong."""

from __future__ import annotations

import copy
import gc
import math
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from fxprune.errors import FxPruneError, OptionError, OptionTypeError
from fxprune.fit import Recipe, accuracies, accuracy, train


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _batches(n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 16, 5, generator=g)
    return [(part, (part[:, 0] > 0).long()) for part in x]


def _net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 2)
    )


def _state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def _same(a, b):
    return all(torch.equal(a[k], b[k]) for k in a)


def test_it_learns_and_reports_every_epoch():
    model, seen = _net(), []
    losses = train(
        model,
        _batches(),
        Recipe(epochs=15, lr=0.1),
        progress=False,
        on_epoch=lambda n, loss: seen.append((n, loss)),
    )
    assert seen == list(enumerate(losses, 1))
    assert losses[-1] < 0.5 * losses[0]
    assert accuracy(model, _batches(seed=1)) > 0.85


def test_same_seed_same_weights_and_the_random_state_is_left_alone():
    a, b, c = _net(), _net(), _net()
    torch.manual_seed(7)
    train(a, _batches(), Recipe(epochs=2), progress=False)
    left = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(left, torch.rand(3))
    train(b, _batches(), Recipe(epochs=2), progress=True)
    assert _same(a.state_dict(), b.state_dict())
    train(c, _batches(), Recipe(epochs=2, seed=1), progress=False)
    assert not _same(a.state_dict(), c.state_dict())  # another dropout


def test_modes_come_back_module_by_module():
    model = _net().eval()
    model[0].train()
    before = [m.training for m in model.modules()]
    train(model, _batches(), Recipe(epochs=1), progress=False)
    accuracy(model, _batches())
    assert [m.training for m in model.modules()] == before


def test_accuracy_counts_in_eval_mode():
    model = nn.Sequential(nn.Identity(), nn.Dropout(1.0))
    x = torch.eye(4)
    assert accuracy(model, [(x, torch.tensor([0, 1, 2, 0])), (x[:1], torch.tensor([0]))]) == 0.8


def test_frozen_parameters_stay():
    model = _net()
    model[0].requires_grad_(False)
    before = model[0].weight.clone()
    train(model, _batches(), Recipe(epochs=1), progress=False)
    assert torch.equal(model[0].weight, before)
    assert all(p.grad is None for p in model.parameters())


def test_a_diverging_run_says_so_and_leaves_the_model():
    model = _net()
    before = _state(model)
    with pytest.raises(FxPruneError, match="the loss became") as caught:
        train(model, _batches(), Recipe(epochs=50, lr=1e30), progress=False)
    assert "smaller learning rate" in str(caught.value)
    assert _same(model.state_dict(), before)
    bad = [(torch.full((4, 5), math.nan), torch.zeros(4, dtype=torch.int64))]
    with pytest.raises(FxPruneError, match="epoch 1, at or before step 1"):
        train(model, bad, Recipe(epochs=1), progress=False)
    assert _same(model.state_dict(), before)


def test_an_error_in_a_callback_leaves_the_model():
    def fail(epoch, loss):
        raise RuntimeError("mine")

    model = _net()
    before = _state(model)
    with pytest.raises(RuntimeError, match="mine"):
        train(model, _batches(), Recipe(epochs=1), progress=False, on_epoch=fail)
    assert _same(model.state_dict(), before)


def test_empty_and_exhausted_loaders():
    for use in (
        lambda x: train(_net(), x, Recipe(), progress=False),
        lambda x: accuracy(_net(), x),
    ):
        with pytest.raises(OptionError, match="the loader is empty"):
            use([])
    with pytest.raises(OptionError, match="nothing in epoch 2") as caught:
        train(_net(), iter(_batches()), Recipe(epochs=2), progress=False)
    assert "generator" in str(caught.value)


def test_batches_of_another_kind():
    x = torch.randn(4, 5)
    for batch in (x, (x,), {"x": x}, (x, [0, 1, 0, 1])):
        with pytest.raises(OptionTypeError, match="pair of tensors"):
            accuracy(_net(), [batch])


def test_nothing_to_train():
    with pytest.raises(OptionError, match="nothing to train"):
        train(_net().requires_grad_(False), _batches(), Recipe(), progress=False)


def test_schedules():
    r = Recipe(epochs=10, lr=1.0)
    assert r.learning_rate(0) == 1.0
    assert r.learning_rate(5) == pytest.approx(0.5)
    assert r.learning_rate(10) == pytest.approx(0.0)
    r = Recipe(epochs=10, lr=1.0, warmup=2)
    assert r.learning_rate(1) == 0.5
    assert r.learning_rate(2) == 1.0
    assert r.learning_rate(6) == pytest.approx(0.5)
    r = Recipe(epochs=8, lr=1.0, schedule="step")
    assert [r.learning_rate(e) for e in (3.9, 4, 6)] == pytest.approx([1, 0.1, 0.01])
    assert Recipe(epochs=8, lr=0.3, schedule="constant").learning_rate(7) == 0.3


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": -1},
        {"epochs": 1.5},
        {"lr": 0.0},
        {"lr": math.nan},
        {"momentum": 1.0},
        {"weight_decay": -1.0},
        {"schedule": "cos"},
        {"label_smoothing": 1.0},
        {"milestones": (2.0,)},
        {"clip_norm": 0.0},
        {"warmup": -1.0},
        {"gamma": 0.0},
        {"seed": 0.5},
        {"seed": 2**70},
        {"lr": "0.1"},
        {"lr": True},
        {"momentum": None},
        {"milestones": 0.5},
        {"amp": "fp32"},
        {"channels_last": 1},
    ],
)
def test_recipe_refuses(bad):
    (name,) = bad
    with pytest.raises(OptionError, match=name):
        Recipe(**bad)


def test_clipping_and_no_momentum():
    model = _net()
    start = copy.deepcopy(model)
    recipe = Recipe(
        epochs=1, lr=1.0, momentum=0.0, weight_decay=0.0, schedule="constant", clip_norm=1e-3
    )
    train(model, _batches(1), recipe, progress=False)
    moved = sum(
        (a - b).square().sum() for a, b in zip(model.parameters(), start.parameters(), strict=True)
    )
    assert 0 < moved.sqrt().item() <= 1.001e-3


# ---- what the loader draws from ------------------------------------------------------------------


class Noisy:
    """A loader whose inputs come from every global random state."""

    def __iter__(self):
        for _ in range(3):
            noise = torch.rand(8, 5) + random.random() + float(np.random.rand())
            yield noise, torch.arange(8) % 2


def test_every_global_random_state_is_seeded_and_given_back():
    a, b = _net(), _net()
    random.seed(1), np.random.seed(1)
    wanted = random.random(), np.random.rand()
    for model in (a, b):
        random.seed(1), np.random.seed(1)
        train(model, Noisy(), Recipe(epochs=1, seed=-3), progress=False)
        assert (random.random(), np.random.rand()) == wanted
    assert _same(a.state_dict(), b.state_dict())


class Broken(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise RuntimeError("the picture is torn")


def test_a_workers_traceback_arrives(monkeypatch):
    monkeypatch.setattr(
        "torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2
    )  # its wait at the end
    model = _net()
    before = _state(model)
    with pytest.raises(RuntimeError, match="the picture is torn") as caught:
        train(model, DataLoader(Broken(), num_workers=1), Recipe(epochs=1), progress=False)
    assert "__getitem__" in str(caught.value)  # the traceback of the other process
    assert _same(model.state_dict(), before)
    del caught
    gc.collect()  # the loader's worker goes with the traceback


# ---- batches -------------------------------------------------------------------------------------


def test_a_rest_of_one_sample_is_left_out():
    whole = _batches(2)
    rest = [*whole, (torch.full((1, 5), 1e9), torch.zeros(1, dtype=torch.int64))]
    recipe = Recipe(epochs=1, schedule="constant")
    a, b = _net(), _net()
    assert train(a, whole, recipe, progress=False) == train(b, rest, recipe, progress=False)
    assert _same(a.state_dict(), b.state_dict())
    # Without batch norms, one sample is as good as any.
    plain = nn.Linear(5, 2)
    loss = train(plain, [*whole, (torch.ones(1, 5), torch.ones(1).long())], recipe, progress=False)
    assert loss != train(copy.deepcopy(plain), whole, recipe, progress=False)


def test_batches_of_one_and_batch_norms():
    batches = [(torch.randn(1, 5), torch.zeros(1, dtype=torch.int64))] * 3
    with pytest.raises(OptionError, match="one sample cannot train a batch norm") as caught:
        train(_net(), batches, Recipe(epochs=1), progress=False)
    assert "drop_last" in str(caught.value)
    # Spread over pixels, one image has a variance.
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.LazyLinear(2))
    images = [(torch.randn(1, 1, 6, 6), torch.zeros(1, dtype=torch.int64))] * 3
    net(images[0][0])
    train(net, images, Recipe(epochs=1, lr=1e-3), progress=False)


@pytest.mark.parametrize(
    "y",
    [
        torch.zeros(4, dtype=torch.int32),
        torch.zeros(4, 2),
        torch.zeros(4, 1, dtype=torch.int64),
        torch.zeros(3, dtype=torch.int64),
    ],
    ids=["int32", "one-hot", "column", "too few"],
)
def test_targets_of_another_kind(y):
    for use in (accuracy, lambda m, b: train(m, b, Recipe(epochs=1), progress=False)):
        with pytest.raises(OptionTypeError, match=r"must be int64 \[N\]"):
            use(_net(), [(torch.randn(4, 5), y)])


def test_an_empty_batch():
    with pytest.raises(OptionTypeError, match=r"N >= 1"):
        accuracy(_net(), [(torch.randn(0, 5), torch.zeros(0, dtype=torch.int64))])


@pytest.mark.parametrize("bad", [2, -1])
def test_targets_out_of_range(bad):
    batches = [(torch.randn(3, 5), torch.tensor([0, 1, bad]))]
    with pytest.raises(OptionError, match="the targets run from") as caught:
        train(_net(), batches, Recipe(epochs=1), progress=False)
    assert "classes 0 to 1" in str(caught.value)


class Two(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


def test_outputs_of_another_kind():
    with pytest.raises(OptionTypeError, match="must give logits") as caught:
        train(Two(5, 2), _batches(), Recipe(epochs=1), progress=False)
    assert "a tuple" in str(caught.value)
    with pytest.raises(OptionTypeError, match=r"\[16\]"):
        accuracy(nn.Sequential(nn.Linear(5, 1), nn.Flatten(0)), _batches())


def test_arguments_of_another_kind():
    for change in (
        {"model": 3},
        {"recipe": {"epochs": 1}},
        {"loader": 3},
        {"loader": torch.randn(3, 5)},
        {"evaluate": 3},
        {"evaluate": iter(_batches())},
    ):
        (name,) = change
        asked = {"model": _net(), "loader": _batches(), "recipe": Recipe(epochs=1)} | change
        with pytest.raises(OptionTypeError, match=name):
            train(**asked, progress=False)
    with pytest.raises(OptionError, match='True, False or "log"'):
        train(_net(), _batches(), Recipe(epochs=1), progress="bar")


def test_loaders_and_lists():
    x, y = (torch.cat(parts) for parts in zip(*_batches(), strict=True))
    # Its own generator: else it would draw from the state that dropout draws from.
    loader = DataLoader(TensorDataset(x, y), batch_size=16, generator=torch.Generator())
    a, b = _net(), _net()
    recipe = Recipe(epochs=2)
    assert train(a, loader, recipe, progress=False) == train(b, _batches(), recipe, progress=False)
    assert _same(a.state_dict(), b.state_dict())
    assert accuracy(a, loader) == accuracy(b, _batches())


def test_a_loader_without_a_length_is_warmed_up_too():
    class Endless:
        def __iter__(self):
            return iter(_batches())

    model = _net()
    before = _state(model)
    train(model, Endless(), Recipe(epochs=1, warmup=1), progress=False)
    assert not _same({"0.weight": model[0].weight}, before)


# ---- scores --------------------------------------------------------------------------------------


def test_several_topk_in_one_pass():
    logits = torch.tensor([[0.1, 0.5, 0.3, 0.2], [0.9, 0.0, 0.2, 0.1]])
    batches = [(logits, torch.tensor([2, 1])), (logits[:1], torch.tensor([1]))]
    assert accuracies(nn.Identity(), batches, (1, 2, 4)) == (1 / 3, 2 / 3, 1.0)
    assert accuracy(nn.Identity(), batches, topk=2) == 2 / 3
    with pytest.raises(OptionError, match="no top-5 of 4 classes"):
        accuracies(nn.Identity(), batches)
    for bad in ((), (0,), (1.5,)):
        with pytest.raises(OptionError, match="topk"):
            accuracies(nn.Identity(), batches, bad)


def test_scores_after_every_epoch():
    model, test, seen = _net(), _batches(2, seed=1), []

    def score(network):
        assert not network.training
        seen.append(accuracy(network, test))
        return seen[-1]

    a = train(model, _batches(), Recipe(epochs=3), progress=False, evaluate=score)
    b = train(_net(), _batches(), Recipe(epochs=3), progress=False, evaluate=test)
    assert a == b
    assert a.scores == b.scores == seen
    assert seen[-1] == accuracy(model, test)
    assert train(_net(), _batches(), Recipe(epochs=1), progress=False).scores == []


# ---- precision and layout ------------------------------------------------------------------------


def test_bf16_learns_with_float32_weights():
    model = _net()
    losses = train(model, _batches(), Recipe(epochs=15, amp="bf16"), progress=False)
    assert losses[-1] < 0.5 * losses[0]
    assert losses != train(_net(), _batches(), Recipe(epochs=15), progress=False)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_fp16_needs_a_gpu():
    with pytest.raises(OptionError, match='amp="fp16" does not train on cpu') as caught:
        train(_net(), _batches(), Recipe(amp="fp16"), progress=False)
    assert 'amp="bf16"' in str(caught.value)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU: fp16 scales gradients there"
)
def test_fp16_on_a_gpu(tmp_path):
    recipe = Recipe(epochs=15, amp="fp16", clip_norm=1.0)
    model = _net().cuda()
    losses = train(model, _batches(), recipe, progress=False, checkpoint=tmp_path / "a.safetensors")
    assert losses[-1] < 0.5 * losses[0]
    assert accuracy(model, _batches()) > 0.85


def test_float64_stays_float64():
    batches = [(x.double(), y) for x, y in _batches()]
    model = _net().double()
    train(model, batches, Recipe(epochs=1), progress=False)
    assert all(p.dtype == torch.float64 for p in model.parameters())


class Pictures(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.two = nn.Conv2d(8, 8, 3).to(memory_format=torch.channels_last)
        self.linear = nn.Linear(8, 2)
        self.formats = []

    def forward(self, x):
        self.formats.append(x.is_contiguous(memory_format=torch.channels_last))
        x = self.two(self.bn(self.one(x)).relu())
        return self.linear(x.mean((2, 3)))


def _pictures():
    g = torch.Generator().manual_seed(0)
    return [(torch.randn(8, 3, 9, 9, generator=g), torch.arange(8) % 2) for _ in range(3)]


def test_channels_last_is_the_same_training_and_leaves_the_layout():
    a, b = Pictures(), Pictures()
    where = {k: (p.data_ptr(), p.stride()) for k, p in b.named_parameters()}
    train(a, _pictures(), Recipe(epochs=2), progress=False)
    train(b, _pictures(), Recipe(epochs=2, channels_last=True), progress=False)
    assert all(b.formats)
    assert not any(a.formats)
    assert {k: (p.data_ptr(), p.stride()) for k, p in b.named_parameters()} == where
    for key, value in a.state_dict().items():  # other kernels: rounding, grown by two epochs
        torch.testing.assert_close(b.state_dict()[key], value, rtol=1e-3, atol=1e-4)


def test_channels_last_and_an_error():
    model = Pictures()
    before, where = _state(model), {k: p.data_ptr() for k, p in model.named_parameters()}
    bad = [*_pictures(), (torch.full((8, 3, 9, 9), math.inf), torch.arange(8) % 2)]
    with pytest.raises(FxPruneError, match="the loss became nan"):
        train(model, bad, Recipe(epochs=1, channels_last=True), progress=False)
    assert _same(model.state_dict(), before)
    assert {k: p.data_ptr() for k, p in model.named_parameters()} == where


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_inputs_are_cast_to_the_floats_of_the_model(dtype):
    model = _net().to(dtype)
    losses = train(model, _batches(), Recipe(epochs=5, lr=0.1), progress=False)
    assert losses[-1] < losses[0]
    assert model[0].weight.dtype == dtype
    assert accuracy(model, _batches(seed=1)) > 0.5


def test_inputs_that_are_no_floats_or_fit_some_layer_stay():
    class Embeds(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.fc = nn.Embedding(5, 3).double(), nn.Linear(3, 2)

        def forward(self, x):
            seen.append(x.dtype)
            return self.fc(x if x.is_floating_point() else self.words(x).float())

    seen, y = [], torch.tensor([0, 1])
    for x in (torch.tensor([1, 2]), torch.zeros(2, 3)):
        accuracy(Embeds(), [(x, y)])
    assert seen == [torch.int64, torch.float32]
