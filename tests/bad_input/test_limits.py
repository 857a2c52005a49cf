"""The ends of the scale: nothing to prune says why, and pruning hard leaves every layer something."""

import pytest
from refusals import X, check_law, compile_refused, conv, l1
from torch import nn

import fxprune
from fxprune import PlanError


def test_a_model_of_frozen_channels_lists_the_reasons():
    model = nn.Sequential(conv(3, 8), nn.LocalResponseNorm(3), conv(8, 4))
    compile_refused(model, PlanError, "nothing can be pruned", "where: Sequential",
                    "1: `LocalResponseNorm` has no parameter of its own", "outputs of the model",
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


# Pruning hard


class Grouped(nn.Module):
    """conv -> grouped conv -> conv; depth-wise where `groups` is the width."""

    def __init__(self, groups: int, width: int = 12):
        super().__init__()
        self.a, self.g, self.b = conv(3, width), conv(width, width, groups=groups), conv(width, 4)

    def forward(self, x):
        return self.b(self.g(self.a(x).relu()).relu())


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("ratio", [0.4, 0.7, 0.999])
def test_groups_stay_balanced_and_nothing_vanishes(groups, ratio):
    pruned = check_law(Grouped(groups), X, ratio=ratio)
    g = pruned.g
    assert g.in_channels % g.groups == g.out_channels % g.groups == 0
    assert g.weight.shape == (g.out_channels, g.in_channels // g.groups, 3, 3)
    assert min(g.in_channels, g.out_channels, pruned.a.out_channels) >= 1


@pytest.mark.parametrize("ratio", [0.9, 0.999])
def test_at_least_one_channel_stays_and_the_report_counts_it(ratio):
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 2), nn.ReLU(), conv(2, 6), conv(6, 4))
    pruned = check_law(model, X, ratio=ratio)
    assert [(g.name, g.before, g.after) for g in pruned.report.groups] == [
        ("0", 8, 1),
        ("2", 2, 1),
        ("4", 6, 1),
    ]


@pytest.mark.parametrize(("align", "kept"), [(1, (4, 3)), (2, (4, 2)), (4, (4, 4)), (8, (8, 6))])
def test_an_align_keeps_a_multiple_or_the_whole_width(align, kept):
    model = nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 6), nn.ReLU(), conv(6, 4))
    pruned = fxprune.compile(model, X, method=l1(0.5), align=align, progress=False)
    assert (pruned.get_submodule("0").out_channels, pruned.get_submodule("2").out_channels) == kept
    left_whole = [n.node for n in pruned.report.frozen if "align" in n.why]
    assert left_whole == (["0, 2"] if align == 8 else [])


def test_a_budget_below_the_last_channels_is_impossible_and_says_what_remains():
    error = compile_refused(Grouped(12), PlanError, "the budget cannot be reached", budget=0.001)
    assert "may remain" in str(error)
    smallest = fxprune.compile(Grouped(12), X, method=l1(0.999), progress=False).plan.metrics
    share = smallest["macs_after"] / smallest["macs_before"]
    assert fxprune.compile(Grouped(12), X, budget=share * 1.01, progress=False).plan.slices
