"""Options: a value that makes no sense is refused before the model is touched."""

import contextlib
import copy
from functools import partial

import pytest
import torch
from refusals import Residual, X, compile_refused, conv, l1, net, refused, untouched
from torch import nn

import fxprune
from fxprune import FxPruneError, OptionError, OptionTypeError, PlanError


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
    refused(
        OptionError, lambda: fxprune.methods.L1(order="fastest"), "order is 'fastest'", "largest"
    )


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


@pytest.mark.parametrize("fit", [3, "sgd", {"epochs": 3}])
def test_trainers_of_wrong_type(fit):
    compile_refused(net(), OptionTypeError, f"fit is {fit!r}", "Recipe", fit=fit)


def test_a_recipe_without_data():
    recipe = fxprune.Recipe(epochs=1, lr=0.1)
    compile_refused(net(), OptionError, "needs data", fit=recipe)


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
