"""Buffers, attributes and unused parameters: cut, kept, or named in the report."""

import copy
import pickle

import torch
from refusals import Between, Residual, X, check_law, compile_refused, conv, l1, net, untouched
from torch import nn

import fxprune
from fxprune import UnsupportedOpError


def test_buffers_of_channels_are_cut_persistent_or_not():
    model = Between(lambda m, h: (h * m.scale + m.shift[:, None, None]) * m.parameter,
                    scale=torch.randn(1, 8, 1, 1), shift=torch.randn(8),
                    parameter=nn.Parameter(torch.randn(8, 1, 1)))  # fmt: skip
    model.register_buffer("shift", torch.randn(8).double(), persistent=False)
    pruned = check_law(model, X)
    assert pruned.scale.shape == (1, 4, 1, 1)
    assert pruned.shift.shape == (4,)
    assert pruned.parameter.shape == (4, 1, 1)
    assert "shift" not in pruned.state_dict()
    assert isinstance(pruned.parameter, nn.Parameter)
    assert "shift" not in [s.tensor for s in pruned.plan.slices]
    assert copy.deepcopy(pruned).shift.shape == (4,)
    assert "shift" not in copy.deepcopy(pruned).state_dict()


def test_buffers_that_are_not_persistent_survive_save_and_load(tmp_path):
    model = Between(lambda m, h: h * m.scale)
    model.register_buffer("scale", torch.randn(8, 1, 1), persistent=False)
    pruned = fxprune.compile(model.eval(), X, progress=False)
    fxprune.save(pruned, tmp_path / "net.safetensors")
    torch.testing.assert_close(
        fxprune.load(tmp_path / "net.safetensors", model)(X), pruned(X), rtol=0, atol=0
    )


def test_tensors_that_are_plain_attributes_are_cut_too():
    model = Between(lambda m, h: h * m.scale)
    model.scale = torch.randn(8, 1, 1).double()
    pruned = check_law(model, X)
    assert pruned.scale.shape == (4, 1, 1)


def test_unused_parameters_are_left_out_and_named():
    model = Residual()
    model.spare = nn.Linear(4, 2)
    model.unused = nn.Parameter(torch.zeros(3))
    with untouched(model):
        pruned = fxprune.compile(model, X, progress=False)
    assert not {"spare.weight", "unused"} & set(pruned.state_dict())
    for name in ("spare", "unused"):
        assert any(name in note for note in pruned.report.notes)


def test_a_buffer_that_no_rule_reaches_is_named():
    model = net()
    model.register_buffer("statistics", torch.zeros(8))
    pruned = fxprune.compile(model, X, progress=False)
    assert any("statistics" in note for note in pruned.report.notes)


def test_attributes_of_the_users_class_come_along():
    class Mine(nn.Sequential):
        pass

    model = Mine(*net())
    model.classes, model.config = ["cat", "dog"], {"lr": 0.1}
    model.callback, model.generator = (lambda: None), (i for i in range(3))
    model.cache, model.frozen_copy = torch.zeros(3), [nn.ReLU()]
    with untouched(model):
        pruned = fxprune.compile(model, X, verify=False, progress=False)
    assert pruned.classes == ["cat", "dog"]
    assert pruned.classes is not model.classes
    assert pruned.config == {"lr": 0.1}
    (note,) = [
        n for n in pruned.report.notes if n.startswith("attributes that could not be carried over")
    ]
    assert note.endswith(": cache, callback, frozen_copy, generator")
    again = pickle.loads(pickle.dumps(pruned))
    assert again.classes == ["cat", "dog"]
    assert copy.deepcopy(pruned).config == {"lr": 0.1}


def test_layers_that_cannot_be_copied():
    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(3, 8), conv(8, 4)
            self.lock = None

        def forward(self, x):
            return self.b(self.a(x))

        def __deepcopy__(self, memo):
            raise RuntimeError("not me")

    model = Holds()
    compile_refused(model, UnsupportedOpError, "Holds cannot be copied: not me", "copy.deepcopy")
    assert fxprune.compile(model, X, verify=False, progress=False).plan.slices
    model = net()
    model[4].generator = (i for i in range(3))
    compile_refused(model, UnsupportedOpError, "cannot be copied", "copy.deepcopy", verify=False)


def test_counters_of_batches_are_untouched():
    model = net()
    model[1].num_batches_tracked.fill_(7)
    pruned = fxprune.compile(model, X, method=l1(0.5), progress=False)
    assert pruned.get_submodule("1").num_batches_tracked == 7
    assert "1.num_batches_tracked" in pruned.state_dict()
    assert "1.num_batches_tracked" not in [s.tensor for s in pruned.plan.slices]
