"""What cannot be traced names the user's line, and what to do about it."""

import contextlib
import copy
import pickle
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from refusals import Between, X, check_law, compile_refused, conv, l1, net, untouched
from torch import Tensor, nn

import fxprune
from fxprune import FxPruneError, PlanError, TraceError
from fxprune.rules import opaque


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 4)

    def forward(self, x):
        x = self.a(x)
        if x.sum() > 0:
            x = x.relu()
        return self.b(x)


def test_a_branch_on_data_names_the_line():
    error = compile_refused(Branches(), TraceError, "Branches cannot be traced", "if x.sum() > 0:",
                            "control flow", "fix:")  # fmt: skip
    file, line, _ = error.where.split(":", 2)
    assert Path(file).name == "test_tracing.py"
    assert Path(file).read_text().splitlines()[int(line) - 1].strip() == "if x.sum() > 0:"


@pytest.mark.parametrize("mode", [True, False])
def test_a_branch_on_data_leaves_the_mode_alone(mode):
    model = nn.Sequential(Branches(), nn.ReLU()).train(mode)
    compile_refused(model, TraceError, "if x.sum() > 0:")


@torch.fx.wrap
def relu_if_positive(x):
    return x.relu() if x.sum() > 0 else x


class Wrapped(Branches):
    """The same branch in a function that is not traced into."""

    def forward(self, x):
        return self.b(relu_if_positive(self.a(x)))


class Positive(nn.Module):
    def forward(self, x):
        return x.relu() if x.sum() > 0 else x


@fxprune.register_rule(Positive)
def keep_whole(flow, node):
    return opaque(flow, node, "it branches on its data")


class Decided(nn.Module):
    """The branch hangs on an argument with a default."""

    def __init__(self):
        super().__init__()
        self.a, self.b = conv(3, 8), conv(8, 4)

    def forward(self, x, relu=None):
        x = self.a(x)
        if relu is not None and relu.any():
            x = x.relu()
        return self.b(x)


def test_the_remedies_that_the_message_names_help(tmp_path):
    error = compile_refused(nn.Sequential(conv(3, 3), Branches()), TraceError)
    for remedy in ("torch.fx.wrap", "fxprune.register_rule", "an argument with a default", "model.backbone"):  # fmt: skip
        assert remedy in error.fix
    around = [conv(3, 8), conv(8, 3)], [conv(4, 6), conv(6, 2)]
    for inner, why in (
        (Wrapped(), "fxprune has no rule for `relu_if_positive`"),
        (nn.Sequential(conv(3, 8), Positive(), conv(8, 4)), "it branches on its data"),
    ):
        model = nn.Sequential(*around[0], inner, *around[1]).eval()
        with untouched(model):
            pruned = fxprune.compile(model, X, method=l1(0.5), progress=False)
        assert [n for n in pruned.report.frozen if why in n.why]
        assert pruned.get_submodule("0").out_channels == 4
        assert pruned.get_submodule("3").out_channels == 3
        fxprune.save(pruned, tmp_path / "net.safetensors")
        loaded = fxprune.load(tmp_path / "net.safetensors", model)
        for again in (copy.deepcopy(pruned), pickle.loads(pickle.dumps(pruned)), loaded):
            assert torch.equal(again(X), pruned(X))
    pruned = fxprune.compile(Decided(), X, method=l1(0.5), progress=False)
    assert "keep their defaults: relu=None" in pruned.report.notes[0]
    part = fxprune.compile(nn.Sequential(net(), Branches())[0], X, progress=False)
    assert part.plan.slices


def test_a_forward_that_raises_names_the_line():
    class Broken(nn.Module):
        def forward(self, x):
            raise ZeroDivisionError("mine")

    compile_refused(Broken(), TraceError, "cannot be traced: mine", "test_tracing.py", 'raise ZeroDivisionError("mine")')  # fmt: skip


def test_a_loop_over_a_tensor_holds_for_its_length():
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(3, 8), conv(8, 4)

        def forward(self, x):
            return self.b(torch.stack([row.relu() for row in self.a(x)]))

    pruned = fxprune.compile(Loop().eval(), X, progress=False)
    assert pruned(X).shape == (2, 4, 8, 6)
    with pytest.raises(AssertionError, match="takes another way"):
        pruned(torch.cat([X, X]))


def test_a_module_that_computes_different_things_in_training():
    class Modes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(3, 8), conv(8, 4)

        def forward(self, x):
            x = self.a(x)
            x = x.relu() if self.training else x.sigmoid()
            return self.b(x)

    for mode in (True, False):
        compile_refused(Modes().train(mode), TraceError, "different things in train and eval mode",
                        "node sigmoid", "test_tracing.py", "self.training")  # fmt: skip


def test_a_scale_that_differs_between_modes():
    class Modes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(3, 8), conv(8, 4)

        def forward(self, x):
            return self.b(self.a(x) * (2.0 if self.training else 1.0))

    compile_refused(Modes(), TraceError, "different things in train and eval mode")


def test_outputs_of_different_structure():
    class Modes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(3, 8), conv(8, 4)

        def forward(self, x):
            h = self.a(x)
            y = self.b(h)
            return y if self.training else (y, h)

    compile_refused(Modes(), TraceError, "returns different things in train and eval mode")


def test_an_auxiliary_head_is_dropped_with_a_note():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.aux = conv(3, 8), conv(8, 4), nn.Sequential(conv(8, 2))

        def forward(self, x):
            h = self.a(x)
            return (self.b(h), self.aux(h)) if self.training else self.b(h)

    model = Auxiliary()
    with untouched(model):
        pruned = fxprune.compile(model, X, progress=False)
    assert "branches that exist only in training were dropped: aux" in pruned.report.notes
    assert not hasattr(pruned, "aux")
    assert pruned.train()(X).shape == (2, 4, 8, 6)


def test_dropout_follows_the_mode_afterwards():
    class Drops(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(3, 8), conv(8, 4)

        def forward(self, x):
            return self.b(F.dropout(self.a(x), p=0.5, training=self.training))

    for mode in (True, False):
        model = Drops().train(mode)
        with untouched(model):
            pruned = fxprune.compile(model, X, progress=False)
        assert torch.equal(pruned.eval()(X), pruned(X))
        assert not torch.equal(pruned.train()(X), pruned(X))
        twin = copy.deepcopy(pruned).eval()
        assert torch.equal(twin(X), pruned.eval()(X))


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(8, 1, 1),
        lambda: torch.full((1, 8, 1, 1), 0.5),
        lambda: torch.tensor(2.0),
        lambda: torch.arange(8.0).view(8, 1, 1),
    ],
)
def test_constants_made_in_forward(make):
    model = Between(lambda m, h: h * make().to(h.dtype))
    check_law(model, X)


def test_noise_made_in_forward_is_not_frozen_in_silence():
    model = Between(lambda m, h: h * torch.rand(8, 1, 1))
    compile_refused(model, TraceError, "differ")


def flipped(x: Tensor) -> Tensor:
    return x.flip(1)


@pytest.mark.parametrize("where", ["", "1"])
@pytest.mark.parametrize("verify", [True, False])
def test_a_forward_that_was_replaced_on_the_instance(where, verify):
    model = net()
    model.get_submodule(where).forward = flipped
    with untouched(model), pytest.raises(FxPruneError, match="forward"):
        fxprune.compile(model, X, progress=False, verify=verify, method=l1(0.5))


class Stores(nn.Module):
    """Its forward leaves things behind on the module."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.calls = conv(3, 8), conv(8, 4), 0
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.last = self.a(x)
        return self.b(self.last)


def test_a_forward_that_stores_things_leaves_nothing_behind():
    model = Stores()
    with untouched(model):
        pruned = fxprune.compile(model, X, progress=False)
    assert pruned(X).shape == (2, 4, 8, 6)
    assert not hasattr(model, "last")


def test_a_forward_that_changes_a_buffer_is_noticed():
    class Counts(Stores):
        def forward(self, x):
            self.steps += 1
            return self.b(self.a(x))

    model = Counts()
    with untouched(model), contextlib.suppress(TraceError):
        fxprune.compile(model, X, progress=False)
    assert model.steps == 0


@pytest.mark.parametrize("context", [torch.no_grad, partial(torch.autocast, "cpu", torch.bfloat16)])
def test_contexts_inside_forward_are_not_dropped_in_silence(context):
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(3, 8), conv(8, 4)

        def forward(self, x):
            with context():
                x = self.a(x)
            return self.b(x.float())

    model = Inside()
    name = "no_grad" if context is torch.no_grad else "autocast"
    with untouched(model):
        try:
            notes = fxprune.compile(model, X, progress=False).report.notes
        except FxPruneError as error:
            notes = [str(error)]
    assert any(name in note for note in notes)


def test_an_opaque_layer_is_named_when_nothing_can_be_pruned():
    model = nn.Sequential(nn.GRUCell(4, 8))
    compile_refused(model, PlanError, "nothing can be pruned", "GRUCell", x=torch.randn(2, 4))
