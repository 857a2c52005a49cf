"""`compile` with `fit=`, `repair=`, `evaluate=`: the stages in one call, and what is refused."""

import copy

import pytest
import torch
from oracle import relative_error
from torch import nn

import fxprune
from fxprune import data, zoo
from fxprune.fit import accuracy

L1 = fxprune.methods.L1
RECIPE = fxprune.Recipe(epochs=1, lr=0.05)


@pytest.fixture(scope="module")
def loaders():
    return data.digits(batch_size=128)


def net():
    torch.manual_seed(0)
    return zoo.resnet20(in_channels=1, width=8)


def test_every_stage_stands_in_the_report(loaders):
    train, test = loaders
    model = net()
    before = copy.deepcopy(model.state_dict())
    pruned = fxprune.compile(
        model, data=train, evaluate=test, repair="bn", fit=RECIPE, progress=False
    )
    stages = pruned.report.stages
    assert list(stages) == ["before", "after the cut", "recalibrated", "fine-tuned"]
    assert stages["before"] == accuracy(model, test)
    assert stages["fine-tuned"] == accuracy(pruned, test)
    assert stages["fine-tuned"] > stages["recalibrated"]
    assert pruned.plan.weights == "changed"
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_each_step_has_its_stages(loaders):
    train, test = loaders
    pruned = fxprune.compile(
        net(), method=L1(steps=2), data=train, evaluate=test, fit=RECIPE, progress=False
    )
    assert list(pruned.report.stages) == [
        "before",
        "after the cut, step 1 of 2",
        "fine-tuned, step 1 of 2",
        "after the cut, step 2 of 2",
        "fine-tuned, step 2 of 2",
    ]


def test_a_recipe_is_the_trainer_on_the_pruned_network(loaders):
    train, _ = data.digits(batch_size=128, seed=3)
    inside = fxprune.compile(net(), data=train, fit=RECIPE, progress=False)
    train, _ = data.digits(batch_size=128, seed=3)
    outside = fxprune.compile(net(), next(iter(train))[0], progress=False)
    train, _ = data.digits(batch_size=128, seed=3)
    next(iter(train))  # `data` gives the example input first
    fxprune.fit.train(outside, train, RECIPE, progress=False)
    for key, value in inside.state_dict().items():
        assert torch.equal(value, outside.state_dict()[key]), key


@pytest.mark.parametrize("training", [True, False])
def test_modes_are_as_before(loaders, training):
    def fit(network):
        network.train(not training)

    model = net().train(training)
    pruned = fxprune.compile(model, data=loaders[0], fit=fit, repair="bn", progress=False)
    assert all(m.training is training for m in pruned.modules())


def test_folding_comes_after_training(loaders, tmp_path):
    train, test = loaders
    options = {"data": list(train), "repair": "bn", "progress": False}
    seen = []
    folded = fxprune.compile(
        net(),
        fit=lambda network: seen.append(
            any(isinstance(m, nn.BatchNorm2d) for m in network.modules())
        ),
        fold=True,
        **options,
    )
    assert seen == [True]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    assert folded.plan.weights == "changed"
    plain = fxprune.compile(net(), **options)
    x = next(iter(test))[0]
    assert relative_error(plain.eval()(x), folded.eval()(x)) <= 1e-5
    fxprune.save(folded, tmp_path / "net.safetensors")
    again = fxprune.load(tmp_path / "net.safetensors", net())
    assert torch.equal(again.eval()(x), folded.eval()(x))


def test_a_network_trained_inside_is_saved_as_it_is(loaders, tmp_path):
    train, test = loaders
    pruned = fxprune.compile(net(), data=train, fit=RECIPE, progress=False)
    fxprune.save(pruned, tmp_path / "net.safetensors")
    again = fxprune.load(tmp_path / "net.safetensors", net())
    assert again.plan.weights == "changed"
    x = next(iter(test))[0]
    assert torch.equal(again.eval()(x), pruned.eval()(x))


def test_what_training_needs():
    x = torch.randn(1, 1, 8, 8)
    with pytest.raises(fxprune.OptionError, match=r"fit=Recipe\(...\) needs data"):
        fxprune.compile(net(), x, fit=RECIPE)
    with pytest.raises(fxprune.OptionTypeError, match=r"fxprune.Recipe, or a callable"):
        fxprune.compile(net(), x, fit="adam")
    with pytest.raises(fxprune.OptionTypeError, match="evaluate is 'accuracy'"):
        fxprune.compile(net(), x, evaluate="accuracy")


def test_an_error_while_training_leaves_the_model_alone(loaders):
    model = net()
    before = copy.deepcopy(model.state_dict())

    def fail(network):
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fxprune.compile(model, data=loaders[0], fit=fail, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
