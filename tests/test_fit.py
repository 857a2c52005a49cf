"""The trainer: it learns, repeats itself, restores what it must, and says what is wrong."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from fxprune.errors import FxPruneError, OptionError, OptionTypeError
from fxprune.fit import Recipe, accuracy, train


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
