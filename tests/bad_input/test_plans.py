"""Plans made by hand, edited, or for something else: each is checked against the model."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from refusals import Residual, X, conv, l1, net, refused, untouched
from torch import nn

import fxprune
from fxprune import FxPruneError, OptionTypeError, PlanError, UnsupportedOpError

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


@pytest.mark.parametrize(("dim", "size"), [(2, 6), (1, 10), (1, 6 * 10**9), (4, 3)])
def test_a_mask_needs_the_dimension_that_the_plan_names(dim, size):
    """Only dimension 1 of a grouped weight may be shorter than what the plan says of it."""
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 2, 1)).eval()  # [4, 2, 3, 3]
    plan = fxprune.compile(net, torch.randn(1, 4, 8, 8), budget=0.5, progress=False).plan
    cut = replace(plan.slices[0], tensor="0.weight", dim=dim, role="in", size=size, keep=(0,))
    with pytest.raises(fxprune.PlanError, match=f"of size {size} along dimension {dim}"):
        fxprune.mask(net, replace(plan, slices=(cut,)))
