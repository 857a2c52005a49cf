"""Hooks: those that tracing would lose are refused or named, those of layers stay and freeze."""

import pytest
from oracle import masked, relative_error
from refusals import X, compile_refused, conv, frozen, l1, net, untouched
from torch import nn

import fxprune
from fxprune import TraceError


@pytest.mark.parametrize(
    "register",
    ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"],
)
def test_hooks_that_tracing_would_lose(register):
    model = nn.Sequential(nn.Sequential(conv(3, 8), nn.ReLU()), conv(8, 4))
    handle = getattr(model[0], register)(lambda *a: None)
    compile_refused(
        model, TraceError, "hooks that tracing would lose, on 0", "module 0", "handle.remove()"
    )
    handle.remove()
    getattr(model, register)(lambda *a: None)
    compile_refused(model, TraceError, "on Sequential", "register them again")


def test_full_backward_pre_hooks_would_be_lost_too():
    model = nn.Sequential(nn.Sequential(conv(3, 8), nn.ReLU()), conv(8, 4))
    model[0].register_full_backward_pre_hook(lambda *a: None)
    compile_refused(model, TraceError, "hooks that tracing would lose, on 0")


def test_hooks_on_a_layer_stay_and_freeze_its_channels():
    calls = []
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 6), conv(6, 4))
    model.eval()[2].register_forward_hook(lambda m, args, out: calls.append(1) or out.cumsum(1))
    assert "2: `2` has hooks that may change what it computes" in frozen(model)
    with untouched(model):
        pruned = fxprune.compile(model, X, method=l1(0.5), progress=False)
    assert [pruned.get_submodule(n).out_channels for n in ("0", "2", "4")] == [8, 8, 3]
    calls.clear()
    assert relative_error(masked(model, pruned.plan.to_dict())(X), pruned(X)) < 1e-5  # float32
    assert len(calls) == 2


@pytest.mark.parametrize("register", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_tensors_stay_behind_and_are_named(register):
    model = net()
    getattr(model[0].weight, register)(lambda *a: None)
    with untouched(model):
        pruned = fxprune.compile(model, X, progress=False)
    assert any(
        note.startswith("hooks of tensors stay with the original, on 0.weight: register them again")
        for note in pruned.report.notes
    )


def test_hooks_of_state_dict_stay_behind_and_are_named():
    for register in (
        "register_state_dict_post_hook",
        "register_state_dict_pre_hook",
        "register_load_state_dict_pre_hook",
        "register_load_state_dict_post_hook",
    ):
        model = nn.Sequential(nn.Sequential(conv(3, 8), nn.ReLU()), conv(8, 4))
        getattr(model[0], register)(lambda *a: None)
        with untouched(model):
            notes = fxprune.compile(model, X, progress=False).report.notes
        assert any("hooks of state_dict stay with the original, on 0" in n for n in notes), register
    assert not any("hooks" in n for n in fxprune.compile(net(), X, progress=False).report.notes)
