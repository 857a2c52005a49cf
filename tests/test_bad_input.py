"""Bad input: what is refused says what, where, why and what to do, and nothing is half-changed.

Every refusal runs under `untouched`, which compares the user's model bit by bit with what it was.
Odd models that are no mistake at all stand at the end: they prune, and the law holds.
"""

import contextlib
import copy
import json
import pickle
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracle import flops, masked, relative_error, sliced_state
from torch import Tensor, nn

import fxprune
from fxprune import (
    CheckpointError,
    FxPruneError,
    OptionError,
    OptionTypeError,
    PlanError,
    TraceError,
    UnsupportedOpError,
    VerifyError,
)

X = torch.randn(2, 3, 8, 6, generator=torch.Generator().manual_seed(1))


def conv(a: int, b: int, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(a, b, 3, padding=1, **kwargs)


def net() -> nn.Sequential:
    layers = [conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 6), nn.ReLU(), conv(6, 4)]
    return nn.Sequential(*layers)


class Residual(nn.Module):
    """stem -> two convolutions with a shortcut around them -> head."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.head = conv(3, 8), conv(8, 8), conv(8, 8), conv(8, 4)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head((x + self.b(self.a(x).relu())).relu())


class Between(nn.Module):
    """conv -> `between(self, x)` -> conv -> conv, with whatever attributes a test adds."""

    def __init__(self, between: Callable[[Any, Tensor], Any], width: int = 8, **attributes: Any):
        super().__init__()
        self.first, self.second, self.last = conv(3, 8), conv(width, 6), conv(6, 4)
        self.__dict__["between"] = between
        for name, value in attributes.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x):
        return self.last(self.second(self.between(self, self.first(x))).relu())


# The user's model, before and after


def bits(t: Tensor) -> Any:
    if t.is_meta:
        return tuple(t.shape)
    if t.layout is not torch.strided:
        t = t.to_dense()
    return t.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def facts(model: nn.Module) -> Any:
    """Everything about a model that a failed or finished call has to leave alone."""
    held = [*model.named_parameters(remove_duplicate=False)]
    held += [*model.named_buffers(remove_duplicate=False)]
    seen = []
    for name, m in model.named_modules(remove_duplicate=False):
        own = [(k, id(v)) for k, v in vars(m).items() if k != "training"]
        hooks = [
            [*map(id, d.values())]
            for k, d in vars(m).items()
            if k.endswith("_hooks") and isinstance(d, dict)
        ]
        parts = [(k, id(v)) for d in (m._parameters, m._buffers, m._modules) for k, v in d.items()]
        seen.append((name, type(m), m.training, own, hooks, parts, m._non_persistent_buffers_set))
    tensors = [
        (k, id(t), id(t.grad), t.dtype, t.stride(), t.requires_grad, t._version, bits(t))
        for k, t in held
    ]
    return copy.copy(seen), tensors


@contextlib.contextmanager
def untouched(*models: nn.Module) -> Iterator[None]:
    """Whatever happens inside, the models are afterwards what they were."""
    before = [facts(m) for m in models]
    random = torch.get_rng_state()
    yield
    assert [facts(m) for m in models] == before
    assert torch.equal(torch.get_rng_state(), random)


def refused(kind: type[FxPruneError], call: Callable[[], Any], *parts: str) -> FxPruneError:
    """The error of a call; it is of exactly that kind, says four facts, and holds all `parts`."""
    with pytest.raises(kind) as caught:
        call()
    error = caught.value
    assert type(error) is kind, error
    for part in parts:
        assert part in str(error), f"{part!r} not in:\n{error}"
    assert error.where, error
    assert error.why or error.fix, error
    return error


def compile_refused(
    model: nn.Module, kind: type[FxPruneError], *parts: str, x: Any = X, **options: Any
) -> FxPruneError:
    with untouched(model):
        return refused(kind, lambda: fxprune.compile(model, x, progress=False, **options), *parts)


def l1(ratio: float) -> Any:
    return fxprune.methods.L1(ratio=ratio)


def scrambled(model: nn.Module) -> nn.Module:
    """Float64, every element distinct, random statistics, eval mode."""
    model = model.double().eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, t in [*model.named_parameters(), *model.named_buffers()]:
            if t.is_floating_point():
                t.copy_(torch.randn(t.shape, generator=generator, dtype=torch.float64))
                if name.endswith("running_var"):
                    t.abs_().add_(0.5)
    return model


def check_stays(model: nn.Module, why: str, *inputs: Any) -> None:
    """Cutting would be wrong everywhere in this network: it is refused, and the reason named."""
    with untouched(model), pytest.raises(PlanError, match="nothing can be pruned") as e:
        fxprune.compile(model, inputs, progress=False)
    assert why in str(e.value)


def check_law(model: nn.Module, *inputs: Any, ratio: float = 0.5, more: Any = ()) -> Any:
    """Prune by ratio and by a random choice; both compute what the masked original computes."""
    model = scrambled(model)
    inputs = tuple(
        x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs
    )

    def draw(group: Any, weights: Any) -> Tensor:
        return torch.rand(len(group), generator=torch.Generator().manual_seed(len(group)))

    pruned = None
    for method, budget in ((draw, fxprune.Budget(params=0.8)), (l1(ratio), None)):
        with untouched(model):
            pruned = fxprune.compile(
                model, inputs, method=method, budget=budget, progress=False, verify=False
            )
        document = pruned.plan.to_dict()
        for xs in (inputs, *more):
            xs = xs if isinstance(xs, tuple) else (xs.double(),)
            with torch.no_grad():
                expected = masked(model, document)(*copy.deepcopy(xs))
                got = pruned(*copy.deepcopy(xs))
            assert relative_error(expected, got) <= 1e-9  # float64: rounding of reordered sums
        state, expected = pruned.state_dict(), sliced_state(model, document)
        assert set(state) <= set(expected)
        assert all(torch.equal(t, expected[k]) for k, t in state.items())
        assert document["metrics"]["params_after"] == sum(p.numel() for p in pruned.parameters())
        if len(inputs) == 1 and isinstance(inputs[0], Tensor):
            assert document["metrics"]["macs_after"] == flops(pruned, inputs[0])
    return pruned


def frozen(model: nn.Module, x: Any = X) -> str:
    with untouched(model):
        return "\n".join(f"{k}: {v}" for k, v in fxprune.analyze(model, x).frozen.items())


# The errors themselves


def test_kinds_of_errors():
    for kind in (TraceError, UnsupportedOpError, PlanError, CheckpointError, VerifyError,
                 OptionError, OptionTypeError, fxprune.DistributedMismatchError):  # fmt: skip
        assert issubclass(kind, FxPruneError)
    assert issubclass(OptionError, ValueError)
    assert issubclass(OptionTypeError, TypeError)
    assert issubclass(OptionError, PlanError)
    assert issubclass(OptionTypeError, PlanError)


@pytest.mark.parametrize(
    "kind", [TraceError, PlanError, OptionError, OptionTypeError, CheckpointError]
)
def test_errors_survive_pickle_and_copy(kind):
    error = kind("what", where="here", why="because", fix="do that")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is kind
        assert (again.what, again.where, again.why, again.fix) == (
            "what",
            "here",
            "because",
            "do that",
        )
        assert str(again) == "what\n  where: here\n  why:   because\n  fix:   do that"


# Options


@pytest.mark.parametrize(
    "budget", [0, 0.0, -0.1, 1.01, 2, float("nan"), float("inf"), -float("inf")]
)
def test_budgets_out_of_range(budget):
    compile_refused(net(), OptionError, f"budget is {budget}", "0.0 < budget <= 1.0", budget=budget)
    for name in ("macs", "params"):
        error = refused(
            OptionError, partial(fxprune.Budget, **{name: budget}), f"budget {name} is {budget}"
        )
        assert isinstance(error, ValueError)


@pytest.mark.parametrize("budget", [True, False, "0.5", "half", [0.5], (0.5,), {"macs": 0.5}, 1j])
def test_budgets_of_wrong_type(budget):
    error = compile_refused(
        net(), OptionTypeError, f"budget is {budget!r}", "number", budget=budget
    )
    assert isinstance(error, TypeError)


def test_an_empty_budget():
    refused(OptionError, fxprune.Budget, "an empty budget", "Budget(macs=0.5)")


def test_a_budget_of_everything_cuts_nothing():
    model = net()
    with untouched(model):
        pruned = fxprune.compile(model, X, budget=1.0, progress=False)
    assert pruned.plan.slices == ()
    torch.testing.assert_close(pruned.eval()(X), copy.deepcopy(model).eval()(X))


def test_a_budget_that_cannot_be_reached_says_what_can():
    compile_refused(net(), PlanError, "the budget cannot be reached", "may remain", "raise the budget",
                    budget=1e-4)  # fmt: skip


@pytest.mark.parametrize("ratio", [1.0, 1, -0.3, 1.5, float("nan"), float("inf")])
def test_ratios_out_of_range(ratio):
    error = refused(OptionError, lambda: l1(ratio), f"ratio is {ratio}", "0.0 <= ratio < 1.0")
    assert error.where == "ratio"


@pytest.mark.parametrize("ratio", [True, "0.5", [0.5]])
def test_ratios_of_wrong_type(ratio):
    refused(OptionTypeError, lambda: l1(ratio), f"ratio is {ratio!r}", "number")


def test_an_order_that_does_not_exist():
    refused(OptionError, lambda: fxprune.methods.L1(order="random"), "order is 'random'", "largest")


@pytest.mark.parametrize("budget", [0.5, fxprune.Budget(params=0.5)])
def test_budget_and_ratio_together(budget):
    compile_refused(net(), OptionError, "both a budget and a ratio (0.3)", "drop one",
                    budget=budget, method=l1(0.3))  # fmt: skip


def test_a_ratio_of_zero_is_the_identity():
    pruned = fxprune.compile(net(), X, method=l1(0), progress=False)
    assert pruned.plan.slices == ()


def test_an_unknown_method_lists_the_known_ones_and_the_nearest():
    compile_refused(net(), OptionError, "there is no method 'l2'", "known methods:", "l1",
                    "did you mean 'l1'?", method="l2")  # fmt: skip
    compile_refused(
        net(), OptionError, "there is no method 'L1'", "did you mean 'l1'?", method="L1"
    )
    error = compile_refused(net(), OptionError, "there is no method ''", "l1", method="")
    assert "did you mean" not in str(error)


@pytest.mark.parametrize("method", [3, None, ["l1"], {"name": "l1"}, fxprune.methods.L1, object()])
def test_methods_of_wrong_type(method):
    compile_refused(net(), OptionTypeError, "method is", "a name, a config", "known names: ", method=method)  # fmt: skip


def test_a_callable_with_a_wrong_count_of_scores():
    compile_refused(net(), PlanError, "gave 3 scores for the 8 channels of group `0`",
                    "one finite score per channel", method=lambda g, w: torch.zeros(3))  # fmt: skip


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_callable_with_scores_that_are_not_finite(bad):
    def scores(group, weights):
        return torch.full((len(group),), bad)

    compile_refused(net(), PlanError, "not finite", "group `0`", method=scores)


@pytest.mark.parametrize("value", ["text", None, object()])
def test_a_callable_that_returns_no_scores(value):
    compile_refused(net(), PlanError, "failed on group `0`", method=lambda g, w: value)


def test_a_callable_that_raises_keeps_its_own_traceback():
    def scores(group, weights):
        raise RuntimeError("my own mistake")

    error = compile_refused(net(), PlanError, "failed on group `0`: my own mistake", method=scores)
    assert isinstance(error.__cause__, RuntimeError)


def test_a_callable_with_a_wrong_signature():
    compile_refused(net(), PlanError, "failed on group `0`", method=lambda: 0)


def test_a_callable_may_return_lists_numpy_or_gradients():
    for scores in (
        lambda g, w: list(range(len(g))),
        lambda g, w: w[0].detach().abs().flatten(1).sum(1).numpy(),
        lambda g, w: w[0].abs().flatten(1).sum(1).requires_grad_(),
    ):
        assert (
            fxprune.compile(net(), X, method=scores, progress=False).plan.method["name"] == "custom"
        )


def test_a_callable_cannot_change_the_users_weights():
    def scores(group, weights):
        for w in weights:
            w.zero_()
        return torch.arange(len(group))

    model = net()
    with untouched(model), contextlib.suppress(FxPruneError):
        fxprune.compile(model, X, method=scores, progress=False)


@pytest.mark.parametrize("align", [0, -1])
def test_aligns_out_of_range(align):
    compile_refused(net(), OptionError, f"align is {align}", "at least 1", align=align)


@pytest.mark.parametrize("align", [1.5, True, "8", None, 8.0])
def test_aligns_of_wrong_type(align):
    compile_refused(net(), OptionTypeError, f"align is {align!r}", "whole number", align=align)


def test_an_align_wider_than_every_layer_leaves_nothing_to_do():
    compile_refused(net(), PlanError, "the budget cannot be reached", "align", align=64)


@pytest.mark.parametrize("scope", [None, 3, ["0", 3], {"0": 1}, nn.ReLU()])
def test_scopes_of_wrong_type(scope):
    compile_refused(net(), OptionTypeError, "scope is", '"all", "free"', scope=scope)


def test_a_scope_pattern_that_matches_nothing():
    compile_refused(net(), PlanError, "the pattern 'layer1.*' in scope matches nothing", "0, 3",
                    "fnmatch", scope=["0", "layer1.*"])  # fmt: skip
    compile_refused(net(), PlanError, "the pattern 'ALL' in scope matches nothing", scope="ALL")


@pytest.mark.parametrize("scope", [[], ""])
def test_an_empty_scope(scope):
    compile_refused(net(), PlanError, "scope", scope=scope)


def test_a_free_scope_that_leaves_nothing():
    class Coupled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.head = conv(3, 8), conv(3, 8), conv(8, 4)

        def forward(self, x):
            return self.head(self.a(x) + self.b(x))

    compile_refused(
        Coupled(), PlanError, "nothing can be pruned", "scope='free'", "1 groups", scope="free"
    )
    assert fxprune.compile(Coupled(), X, progress=False).plan.slices


def test_a_free_scope_leaves_coupled_channels_alone():
    pruned = fxprune.compile(Residual(), X, scope="free", method=l1(0.5), progress=False)
    assert pruned.stem.out_channels == pruned.b.out_channels == 8
    assert pruned.a.out_channels == 4


@pytest.mark.parametrize("ignore", [3, None, {"0": 1}, True])
def test_ignores_of_wrong_type(ignore):
    compile_refused(net(), OptionTypeError, "ignore is", "filter_fn(module, name)", ignore=ignore)


def test_an_ignore_that_holds_no_strings():
    compile_refused(
        net(), OptionTypeError, "ignore holds 3", "patterns are strings", ignore=["0", 3]
    )


def test_an_ignore_pattern_that_matches_nothing():
    compile_refused(net(), PlanError, "the pattern 'head' in ignore matches nothing", "for example",
                    ignore=["0", "head"])  # fmt: skip


def test_ignoring_everything():
    compile_refused(net(), PlanError, "nothing can be pruned", "ignore='*'", ignore="*")
    compile_refused(net(), PlanError, "nothing can be pruned", ignore=lambda m, name: False)


@pytest.mark.parametrize(
    "ignore", ["0", "0.weight", ["0"], ("0*",), {"0"}, lambda m, name: name != "0"]
)
def test_what_is_ignored_keeps_its_outputs(ignore):
    pruned = fxprune.compile(net(), X, ignore=ignore, method=l1(0.5), progress=False)
    assert (pruned.get_submodule("0").out_channels, pruned.get_submodule("3").out_channels) == (
        8,
        3,
    )


def test_a_filter_function_that_raises():
    def broken(module, name):
        raise ZeroDivisionError("mine")

    model = net()
    with untouched(model), pytest.raises((FxPruneError, ZeroDivisionError), match="mine"):
        fxprune.compile(model, X, ignore=broken, progress=False)


@pytest.mark.parametrize("seed", [True, 0.5, "1", None])
def test_seeds_of_wrong_type(seed):
    compile_refused(net(), OptionTypeError, f"seed is {seed!r}", "whole number", seed=seed)


def test_unknown_repairs():
    for repair in ("batchnorm", 3, True):
        error = compile_refused(net(), OptionError, f"repair is {repair!r}", '"bn"', repair=repair)
        assert error.where == "repair"


def test_a_repair_without_data():
    compile_refused(net(), OptionError, 'repair="bn" needs data', "pass data=", repair="bn")


def test_a_trainer_for_a_method_that_does_not_train():
    compile_refused(
        net(), OptionError, "'l1' is a one-shot method", "drop fit", fit=lambda pruner: None
    )


@pytest.mark.parametrize("evaluate", [3, "accuracy"])
def test_evaluators_of_wrong_type(evaluate):
    compile_refused(net(), OptionTypeError, "evaluate", evaluate=evaluate)


def test_an_evaluator_that_raises_leaves_the_model_alone():
    def broken(model):
        model.eval()
        raise RuntimeError("no data")

    model = net().train()
    with (
        untouched(copy.deepcopy(model)),
        pytest.raises((FxPruneError, RuntimeError), match="no data"),
    ):
        fxprune.compile(model, X, evaluate=broken, progress=False)


def test_options_are_checked_before_the_model():
    class Never(nn.Module):
        def forward(self, x):
            raise AssertionError("it was run")

    for options in ({"budget": 2}, {"method": "l3"}, {"align": 0}, {"repair": "x"}, {"seed": 0.5}):
        refused(OptionError if "seed" not in options else OptionTypeError,
                lambda: fxprune.compile(Never(), X, **options))  # fmt: skip # noqa: B023


# Weights that cannot be ranked


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite(bad, dtype):
    model = net().to(dtype)
    with torch.no_grad():
        model[3].weight[1, 2] = bad
    compile_refused(model, PlanError, "`3.weight` has 9 values that are NaN or infinite", "parameter 3.weight",
                    x=X.to(dtype))  # fmt: skip


def test_infinities_that_cancel_are_found():
    model = net()
    with torch.no_grad():
        model[5].bias[0], model[5].bias[1] = float("inf"), -float("inf")
    compile_refused(model, PlanError, "`5.bias` has 2 values")


def test_large_finite_weights_are_not_mistaken_for_infinite():
    model = net()
    with torch.no_grad():
        model[0].weight.fill_(1e37)
    assert fxprune.compile(model, X, progress=False, verify=False).plan.slices
    model = net().half()
    with torch.no_grad():
        model[0].weight.fill_(6e4)
    assert fxprune.compile(model, X.half(), progress=False, verify=False).plan.slices


def test_statistics_that_are_not_finite():
    model = net()
    model[1].running_mean[2] = float("nan")
    compile_refused(model, PlanError, "1.running_mean")


def test_nan_in_a_parameter_that_is_not_used_does_no_harm():
    model = net()
    model.unused = nn.Parameter(torch.full((3,), float("nan")))
    assert fxprune.compile(model, X, progress=False).plan.slices


def test_meta_weights_are_planned_by_hand():
    model = net().to("meta")
    compile_refused(model, PlanError, "meta device", "holds no values", "analyze(model).plan")
    for x in (X, X.to("meta")):
        with untouched(model):
            plan = fxprune.analyze(model, x).plan({"0": [0, 3, 5]})
            pruned = fxprune.apply(model, plan, x)
        assert pruned.get_submodule("0").weight.shape == (3, 3, 3, 3)
        assert {t.device.type for t in pruned.state_dict().values()} == {"meta"}


def test_a_file_fills_a_meta_model(tmp_path):
    model = net().eval()
    pruned = fxprune.compile(model, X, progress=False)
    fxprune.save(pruned, tmp_path / "net.safetensors")
    with torch.device("meta"):
        empty = net().eval()
    loaded = fxprune.load(tmp_path / "net.safetensors", empty)
    torch.testing.assert_close(loaded(X), pruned(X), rtol=0, atol=0)


def test_meta_networks_cannot_be_saved(tmp_path):
    model = net().to("meta")
    pruned = fxprune.apply(model, fxprune.analyze(model, X).plan({"0": [1]}), X)
    refused(CheckpointError, lambda: fxprune.save(pruned, tmp_path / "net.safetensors"), "meta")
    assert [*tmp_path.iterdir()] == []


# Nothing to prune


def test_a_model_of_frozen_channels_lists_the_reasons():
    model = nn.Sequential(conv(3, 8), nn.GroupNorm(2, 8), conv(8, 4))
    compile_refused(model, PlanError, "nothing can be pruned", "where: Sequential",
                    "1: `GroupNorm` computes with several channels at once", "outputs of the model",
                    "print(fxprune.analyze(model))")  # fmt: skip


@pytest.mark.parametrize(
    "model", [nn.Identity(), nn.Sequential(), nn.Sequential(nn.ReLU()), conv(3, 4)]
)
def test_models_without_channels(model):
    compile_refused(model, PlanError, "nothing can be pruned", "where: ", "why: ")


def test_a_model_that_returns_a_constant():
    class Constant(nn.Module):
        def forward(self, x):
            return 3

    compile_refused(Constant(), PlanError, "nothing can be pruned")


# Hooks


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


# What must stay as it was: flags, ties, formats


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

    check_stays(Tied(), "is computed, not a parameter", torch.randn(3, 4))


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

    check_stays(Product(), "no rule for `matmul`", torch.randn(3, 4))


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


# Weights that are no plain tensors


def test_complex_weights_are_frozen():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 6, dtype=torch.complex64)
            self.c, self.d = nn.Linear(6, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.d(self.c(self.b(self.a(x).to(torch.complex64)).abs()))

    model = Complex()
    assert "`b.weight` is complex" in frozen(model, torch.randn(2, 4))
    x = torch.randn(2, 4)
    with untouched(model):
        pruned = fxprune.compile(model, x, method=l1(0.5), progress=False)
    assert (pruned.a.out_features, pruned.b.out_features, pruned.c.out_features) == (8, 6, 2)


def test_sparse_weights_are_frozen():
    class Sparse(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.c, self.d = nn.Linear(4, 8), nn.Linear(6, 5), nn.Linear(5, 2)
            self.w = nn.Parameter(torch.eye(8)[:6].to_sparse())

        def forward(self, x):
            return self.d(self.c(torch.sparse.mm(self.w, self.a(x).t()).t()))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = Sparse()
        pruned = fxprune.compile(model, torch.randn(2, 4), method=l1(0.5), progress=False)
    assert (pruned.a.out_features, pruned.c.out_features) == (8, 2)
    assert pruned.w.layout is torch.sparse_coo


def test_old_weight_norm_is_frozen_with_the_reason():
    model = net()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(model[3])
    text = frozen(model)
    assert "3: " in text
    assert "remove_weight_norm" in text
    with untouched(model), pytest.raises(PlanError, match="remove_weight_norm"):
        fxprune.compile(model, X, progress=False)


def test_old_spectral_norm_is_frozen_with_the_reason():
    model = net()
    nn.utils.spectral_norm(model[3])
    assert "remove_spectral_norm" in frozen(model)


@pytest.mark.parametrize(
    "norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm]
)
def test_parametrized_layers_are_frozen_with_the_remedy(norm):
    model = nn.Sequential(
        conv(3, 8), nn.ReLU(), conv(8, 8), nn.ReLU(), conv(8, 6), conv(6, 4)
    ).eval()
    norm(model[2])
    text = frozen(model)
    assert "`2` is parametrized" in text
    assert "remove_parametrizations" in text
    with untouched(model):
        pruned = fxprune.compile(model, X, method=l1(0.5), progress=False)
    assert pruned.get_submodule("4").out_channels == 3
    assert relative_error(masked(model, pruned.plan.to_dict())(X), pruned(X)) < 1e-5
    nn.utils.parametrize.remove_parametrizations(model[2], "weight")
    assert "2" in [g.name for g in fxprune.analyze(model, X).groups]


def test_pruning_masks_of_torch_are_frozen_with_the_remedy():
    from torch.nn.utils import prune

    model = net()
    prune.l1_unstructured(model[3], "weight", 0.5)
    assert "`3" in frozen(model)
    compile_refused(model, PlanError, "nothing can be pruned", "`3")


def test_lazy_modules_must_see_an_input_first():
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.LazyConv2d(4, 3))
    with pytest.raises(TraceError) as e:
        fxprune.compile(model, X, progress=False)
    assert "`0.weight` has no shape yet" in str(e.value)
    assert "run the model once" in str(e.value)
    assert nn.parameter.is_lazy(model[0].weight)
    model(X)
    assert fxprune.compile(model, X, progress=False).plan.slices


# What cannot be traced


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
    assert Path(file).name == "test_bad_input.py"
    assert Path(file).read_text().splitlines()[int(line) - 1].strip() == "if x.sum() > 0:"


@pytest.mark.parametrize("mode", [True, False])
def test_a_branch_on_data_leaves_the_mode_alone(mode):
    model = nn.Sequential(Branches(), nn.ReLU()).train(mode)
    compile_refused(model, TraceError, "if x.sum() > 0:")


def test_a_forward_that_raises_names_the_line():
    class Broken(nn.Module):
        def forward(self, x):
            raise ZeroDivisionError("mine")

    compile_refused(Broken(), TraceError, "cannot be traced: mine", "test_bad_input.py", 'raise ZeroDivisionError("mine")')  # fmt: skip


def test_a_loop_over_a_tensor():
    class Loop(nn.Module):
        def forward(self, x):
            return torch.stack([row.relu() for row in x])

    compile_refused(Loop(), TraceError, "test_bad_input.py", "for row in x")


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
                        "node sigmoid", "test_bad_input.py", "self.training")  # fmt: skip


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
    model = nn.Sequential(nn.GRU(4, 8, batch_first=True))
    x = torch.randn(2, 3, 4)
    compile_refused(model, PlanError, "nothing can be pruned", "GRU", x=x)


# Buffers, attributes, unused parameters


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


# The check of the result


def test_a_wrong_cut_is_never_returned(monkeypatch):
    from fxprune import surgery

    honest = surgery.cut_tensor

    def reversed_rows(t, slices, *rest):
        slices = tuple(slices)
        out = honest(t, slices, *rest)
        return out.flip(0) if any(s.dim == 0 for s in slices) else out

    monkeypatch.setattr(surgery, "cut_tensor", reversed_rows)
    model = net()
    compile_refused(model, VerifyError, "differs from the masked original", "nothing is returned")
    assert fxprune.compile(model, X, verify=False, progress=False).plan.slices


def test_a_crash_of_the_result_is_an_error_of_ours(monkeypatch):
    from fxprune import surgery

    honest = surgery.cut_tensor
    monkeypatch.setattr(
        surgery, "cut_tensor", lambda t, s, *rest: honest(t, [c for c in s if c.dim == 0], *rest)
    )
    compile_refused(net(), VerifyError, "pruned network")


def test_an_output_that_is_not_finite_says_so():
    class Log(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = conv(3, 8), conv(8, 4)

        def forward(self, x):
            return self.b(self.a(x)).abs().neg().log()

    compile_refused(Log(), VerifyError, "NaN or infinity", "verify=False")
    assert fxprune.compile(Log(), X, verify=False, progress=False).plan.slices


# Plans made by hand


@pytest.mark.parametrize(
    ("keep", "kind", "parts"),
    [
        ({"conv9": [0]}, PlanError, ("no prunable group is called `conv9`", "the first ones are 0, 3", "analyze(model)")),
        ({"0": [8]}, PlanError, ("keep['0'] holds 8", "8 channels, 0 to 7")),
        ({"0": [-1]}, PlanError, ("keep['0'] holds -1", "8 channels")),
        ({"0": [1, 1]}, PlanError, ("keep['0'] holds 1 twice",)),
        ({"0": []}, PlanError, ("keep['0'] is empty", "at least one channel")),
        ({"0": [0.5]}, OptionTypeError, ("keep['0'] holds 0.5", "integers")),
        ({"0": [True, False]}, OptionTypeError, ("holds True", "integers")),
        ({"0": ["1"]}, OptionTypeError, ("holds '1'", "integers")),
        ({"0": 3}, OptionTypeError, ("keep['0']", "list")),
        ({"0": None}, OptionTypeError, ("keep['0']", "list")),
        ({"5": [0, 1]}, PlanError, ("channel 2 of `5` cannot be removed", "outputs of the model")),
        ({"0": [0, 1], "1": [1, 2]}, PlanError, ("disagree", "one entry per coupled group")),
        ([("0", [1])], OptionTypeError, ("keep is list", "map names to indices")),
        ({"2": [1]}, PlanError, ("no prunable group is called `2`",)),
    ],
)  # fmt: skip
def test_plans_by_hand_that_are_refused(keep, kind, parts):
    model = net()
    analysis = fxprune.analyze(model, X)
    with untouched(model):
        refused(kind, lambda: analysis.plan(keep), *parts)


def test_plans_by_hand_expand_couplings():
    plan = fxprune.analyze(Residual(), X).plan({"b": [0, 2, 5]})
    cut = {(s.tensor, s.dim): s.keep for s in plan.slices}
    assert cut["stem.weight", 0] == cut["b.weight", 0] == cut["head.weight", 1] == (0, 2, 5)
    assert cut["a.weight", 1] == (0, 2, 5)
    assert ("a.weight", 0) not in cut


def test_plans_by_hand_take_any_sequence_of_integers():
    analysis = fxprune.analyze(net(), X)
    wanted = analysis.plan({"0": [0, 2, 5]})
    for indices in ((5, 0, 2), torch.tensor([0, 2, 5]), torch.tensor([0, 2, 5]).numpy(), {0, 2, 5}):
        assert analysis.plan({"0": indices}).to_json() == wanted.to_json()


def test_a_plan_that_tears_a_coupled_pair():
    model = nn.Sequential(
        conv(3, 8), nn.ChannelShuffle(2), nn.Conv2d(8, 8, 1, groups=2), conv(8, 4)
    )
    analysis = fxprune.analyze(model, X)
    refused(PlanError, lambda: analysis.plan({"0.weight": [0, 1, 2, 3, 4, 5, 6]}), "are coupled: keep both or neither")  # fmt: skip


# Plans for something else


def edited(plan: Any, edit: Callable[[dict[str, Any]], Any]) -> Any:
    document = json.loads(plan.to_json())
    edit(document)
    return fxprune.Plan.from_json(json.dumps(document))


@pytest.fixture
def plan() -> Any:
    return fxprune.compile(net(), X, method=l1(0.5), progress=False).plan


def apply_refused(model: nn.Module, plan: Any, kind: type[FxPruneError], *parts: str) -> None:
    with untouched(model):
        refused(kind, lambda: fxprune.apply(model, plan, X), *parts)


def test_a_plan_of_another_architecture_names_what_differs(plan):
    wider = nn.Sequential(
        conv(3, 12), nn.BatchNorm2d(12), nn.ReLU(), conv(12, 6), nn.ReLU(), conv(6, 4)
    )
    apply_refused(wider, plan, PlanError, "another architecture than this Sequential",
                  "0.weight (shape (12, 3, 3, 3), the plan cuts 8)", "before any pruning")  # fmt: skip
    apply_refused(Residual(), plan, PlanError, "0.weight (missing)")
    deeper = nn.Sequential(*net(), conv(4, 4))
    apply_refused(deeper, plan, PlanError, "another architecture", "6.weight")


def test_a_plan_on_its_own_result(plan):
    pruned = fxprune.apply(net(), plan, X)
    apply_refused(pruned, plan, PlanError, "another architecture", "before any pruning")


@pytest.mark.parametrize("value", ["plan.json", {"slices": []}, None])
def test_plans_of_wrong_type(value):
    apply_refused(net(), value, OptionTypeError, "plan is a", "Plan.from_json")


def test_mask_refuses_what_apply_refuses(plan):
    for model in (Residual(), nn.Sequential(conv(3, 12), nn.BatchNorm2d(12))):
        with untouched(model):
            refused(PlanError, lambda: fxprune.mask(model, plan), "the plan cuts `0.")  # noqa: B023
    refused(OptionTypeError, lambda: fxprune.mask(net(), "plan.json"), "plan is a")
    refused(OptionTypeError, lambda: fxprune.mask("model", plan), "model is a")


def test_an_incomplete_plan(plan):
    for tensor in ("0.bias", "1.running_mean", "3.weight"):
        part = edited(plan, lambda d: d.update(slices=[s for s in d["slices"] if (s["tensor"], s["dim"]) != (tensor, 1 if tensor == "3.weight" else 0)]))  # fmt: skip # noqa: B023
        apply_refused(
            net(), part, PlanError, f"the plan is incomplete: `{tensor}`", "analyze(model).plan"
        )


def test_a_plan_that_cuts_half_of_a_pair():
    analysis = fxprune.analyze(Residual(), X)
    whole = analysis.plan({"b": [0, 2, 5]})
    half = edited(whole, lambda d: d.update(slices=[s for s in d["slices"] if not s["tensor"].startswith("stem")]))  # fmt: skip
    apply_refused(Residual(), half, PlanError, "incomplete", "stem.weight", "coupled")


def test_a_plan_whose_slices_disagree(plan):
    def shift(d):
        (entry,) = [s for s in d["slices"] if (s["tensor"], s["dim"]) == ("3.weight", 1)]
        entry["keep"] = [i for i in range(8) if i not in entry["keep"]]

    apply_refused(net(), edited(plan, shift), PlanError, "the plan")


def test_a_plan_that_removes_outputs(plan):
    def more(d):
        d["slices"] += [{"tensor": f"5.{t}", "dim": 0, "role": "out", "size": 4, "keep": [0, 1]} for t in ("weight", "bias")]  # fmt: skip

    apply_refused(net(), edited(plan, more), PlanError, "channel 2 of `5.weight` cannot be removed", "outputs of the model")  # fmt: skip


def test_a_plan_that_cuts_what_is_no_channel(plan):
    def kernel(d):
        d["slices"].append({"tensor": "0.weight", "dim": 2, "role": "in", "size": 3, "keep": [0]})

    apply_refused(
        net(), edited(plan, kernel), PlanError, "`0.weight` along dimension 2", "not prunable"
    )


def test_a_plan_with_wrong_roles(plan):
    def swap(d):
        d["slices"][0]["role"] = "in" if d["slices"][0]["role"] == "out" else "out"

    apply_refused(net(), edited(plan, swap), PlanError, "the plan cuts `0.weight`")


@pytest.mark.parametrize("keep", [[0, 8], [3, 1], [1, 1], [], [-1], [0.5], [True]])
def test_plans_with_bad_indices_are_not_read(plan, keep):
    with pytest.raises(PlanError, match=r"slices\[0\].keep"):
        edited(plan, lambda d: d["slices"][0].update(keep=keep))


def test_a_plan_made_without_the_parser_is_checked_too(plan):
    from dataclasses import replace

    bad = replace(plan, slices=(replace(plan.slices[0], keep=(0, 99)), *plan.slices[1:]))
    apply_refused(net(), bad, PlanError, "0.weight")


def test_a_plan_with_groupings_or_compactors_says_which_version(plan):
    def grouping(d):
        d["slices"], d["groupings"] = [], [{"tensor": "3.weight", "rows": [[0, 1, 2], [3, 4, 5]], "cols": [[0, 1], [2, 3]]}]  # fmt: skip

    apply_refused(
        net(), edited(plan, grouping), UnsupportedOpError, "groups convolutions", "fxprune 0.1.0"
    )


@pytest.mark.parametrize(("layer", "norm"), [("3", "1"), ("0", "7"), ("9", "1")])
def test_a_plan_that_folds_what_is_not_there(plan, layer, norm):
    folds = [{"conv": layer, "bn": norm, "compactor": False}]
    other = edited(plan, lambda d: d.update(folds=folds))
    apply_refused(
        net(), other, UnsupportedOpError, f"the plan folds `{norm}`", "no convolution feeds it"
    )


def test_a_plan_for_weights_that_changed_says_so(plan):
    from dataclasses import replace

    pruned = fxprune.apply(net(), replace(plan, weights="changed"), X)
    assert any("sliced, not loaded" in note for note in pruned.report.notes)


# Files


@pytest.fixture
def saved(tmp_path) -> Path:
    fxprune.save(fxprune.compile(net().eval(), X, progress=False), tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


def load_refused(path: Any, kind: type[FxPruneError], *parts: str, model: Any = None) -> None:
    model = model or net()
    with untouched(model):
        refused(kind, lambda: fxprune.load(path, model), *parts)


def test_files_that_are_missing(tmp_path):
    load_refused(tmp_path / "none.safetensors", CheckpointError, "none.safetensors", "no such file")
    load_refused(tmp_path, CheckpointError, "directory")
    load_refused("", CheckpointError, "not a path")
    load_refused(3.5, CheckpointError, "not a path")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.9999])
def test_truncated_files(saved, share):
    data = saved.read_bytes()
    saved.write_bytes(data[: int(share * len(data))])
    load_refused(saved, CheckpointError, "net.safetensors")


def test_flipped_bits_are_always_noticed(saved):
    data = saved.read_bytes()
    for at in range(0, len(data), max(1, len(data) // 40)):
        changed = bytearray(data)
        changed[at] ^= 1 << (at % 8)
        saved.write_bytes(bytes(changed))
        load_refused(saved, CheckpointError, "net.safetensors")


def test_foreign_files(tmp_path):
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    load_refused(tmp_path / "foreign.safetensors", CheckpointError, "fxprune")
    torch.save(net().state_dict(), tmp_path / "net.pt")
    load_refused(tmp_path / "net.pt", CheckpointError, "net.pt")
    (tmp_path / "text.safetensors").write_text("hello, this is no file of tensors at all")
    load_refused(tmp_path / "text.safetensors", CheckpointError, "text.safetensors")


def test_a_file_of_ours_without_a_plan(tmp_path):
    from fxprune.checkpoint import write_tensors

    write_tensors(tmp_path / "other.safetensors", {"weight": torch.zeros(3)}, {"step": 3})
    load_refused(
        tmp_path / "other.safetensors", CheckpointError, "holds no valid plan", "fxprune.save"
    )


def test_files_of_another_architecture(saved):
    load_refused(saved, PlanError, "another architecture", "0.weight (missing)", model=Residual())


def test_a_file_whose_tensors_do_not_fit_its_plan(saved, tmp_path):
    from fxprune.checkpoint import read_tensors, write_tensors

    header, tensors = read_tensors(saved)
    for edit in ({"0.bias": torch.zeros(1)}, {"extra": torch.zeros(1)}, {"0.bias": None}):
        changed = {k: t for k, t in {**tensors, **edit}.items() if t is not None}
        write_tensors(tmp_path / "edited.safetensors", changed, header)
        load_refused(
            tmp_path / "edited.safetensors", CheckpointError, "does not fit", next(iter(edit))
        )


def test_a_bad_input_spec_in_a_file(saved, tmp_path):
    from fxprune.checkpoint import read_tensors, write_tensors

    header, tensors = read_tensors(saved)
    for spec in ({"shape": [-1, 3], "dtype": "float32"}, {"shape": "all", "dtype": "float32"}, {"shape": [1], "dtype": "nn"},
                 {"shape": [1], "dtype": "float32", "more": 1}, {"shape": [True], "dtype": "float32"}, {"shape": [1], "dtype": "quint8"}, [], 3, None):  # fmt: skip
        write_tensors(tmp_path / "edited.safetensors", tensors, {**header, "inputs": [spec]})
        load_refused(tmp_path / "edited.safetensors", CheckpointError, "holds no valid plan")


def test_an_input_spec_of_a_petabyte_is_not_allocated(saved, tmp_path):
    from fxprune.checkpoint import read_tensors, write_tensors

    header, tensors = read_tensors(saved)
    spec = {"shape": [1 << 20, 3, 1 << 14, 1 << 14], "dtype": "float32"}
    write_tensors(tmp_path / "edited.safetensors", tensors, {**header, "inputs": [spec]})
    load_refused(tmp_path / "edited.safetensors", CheckpointError, "input")


def test_the_dtype_comes_from_the_file(saved):
    for dtype in (torch.float64, torch.float16):
        model = net().to(dtype)
        with untouched(model):
            loaded = fxprune.load(saved, model)
        assert {p.dtype for p in loaded.parameters()} == {torch.float32}
        assert loaded.eval()(X).dtype == torch.float32


def test_flags_and_modes_come_from_the_model(saved):
    model = net().train()
    model[0].weight.requires_grad_(False)
    loaded = fxprune.load(saved, model)
    assert not loaded.get_submodule("0").weight.requires_grad
    assert loaded.get_submodule("3").weight.requires_grad
    assert loaded.training


def test_what_cannot_be_saved(tmp_path):
    for value in (net(), net().state_dict(), None, "net"):
        refused(OptionTypeError, lambda: fxprune.save(value, tmp_path / "x.safetensors"), "save was given a")  # fmt: skip # noqa: B023
    pruned = fxprune.compile(net(), X, progress=False)
    for path in (tmp_path / "none" / "x.safetensors", tmp_path, 3, ""):
        refused(CheckpointError, lambda: fxprune.save(pruned, path))  # noqa: B023
    assert [*tmp_path.iterdir()] == []


def test_a_failed_save_keeps_the_old_file(saved, monkeypatch):
    import os

    def full(*args):
        raise OSError(28, "No space left on device")

    before = saved.read_bytes()
    pruned = fxprune.compile(net(), X, budget=0.3, progress=False)
    monkeypatch.setattr(os, "replace", full)
    refused(
        CheckpointError, lambda: fxprune.save(pruned, saved), "No space left", "bytes are needed"
    )
    monkeypatch.undo()
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


# Calls in a row


def test_pruning_a_pruned_network_leaves_it_alone():
    first = fxprune.compile(net().eval(), X, method=l1(0.25), progress=False)
    with untouched(first):
        second = fxprune.compile(first, X, method=l1(0.5), progress=False)
    assert second.get_submodule("0").out_channels < first.get_submodule("0").out_channels < 8
    again = fxprune.apply(net(), second.plan, X)
    assert {k: t.shape for k, t in again.state_dict().items()} == {
        k: t.shape for k, t in second.state_dict().items()
    }


def test_after_a_refusal_the_same_model_prunes():
    model = net()
    handle = model.register_forward_hook(lambda *a: None)
    compile_refused(model, TraceError, "hooks")
    handle.remove()
    assert fxprune.compile(model, X, progress=False).plan.slices


# Odd models that are no mistake


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
