"""The sensitivity scan: the scores of single cuts, the cache, proposals, what is refused."""

import json
import math
import os

import pytest
import torch
from torch import nn

import fxprune
from fxprune import zoo
from fxprune.report import Curve, Point
from fxprune.sensitivity import RATIOS, Sensitivity, sensitivity

L1 = fxprune.methods.L1
X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 10, 3)
        self.b = nn.Conv2d(10, 6, 3)
        self.c = nn.Conv2d(6, 4, 3)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())


def net():
    torch.manual_seed(0)
    return Net().eval()


class Measure:
    """Minus the distance to the whole network's output; counts its calls."""

    def __init__(self, model):
        self.wanted = model(X).detach()
        self.calls = 0
        self.widths = []

    def __call__(self, model):
        self.calls += 1
        self.widths.append((len(model.a.weight), len(model.b.weight)))
        return -float((model(X) - self.wanted).norm().detach())


def test_each_point_is_one_group_cut_alone():
    model = net()
    measure = Measure(model)
    scan = sensitivity(model, X, evaluate=measure, progress=False)
    assert scan.baseline == 0
    assert [(c.name, c.channels, c.method) for c in scan.curves] == [
        ("a", 10, "l1 smallest"),
        ("b", 6, "l1 smallest"),
    ]
    assert measure.widths[0] == (10, 6)
    assert all(a == 10 or b == 6 for a, b in measure.widths)
    for curve in scan.curves:
        assert [p.ratio for p in curve.points] == list(RATIOS)
        for point in curve.points:
            pruned = fxprune.compile(
                model, X, method=L1(ratio={curve.name: point.ratio}), progress=False
            )
            assert point.kept == len(pruned.get_parameter(f"{curve.name}.weight"))
            assert point.score == pytest.approx(Measure(model)(pruned), rel=1e-5)


def test_equal_counts_are_scored_once():
    model = net()
    measure = Measure(model)
    scan = sensitivity(model, X, evaluate=measure, scope=["b"], progress=False)
    (curve,) = scan.curves
    kept = [p.kept for p in curve.points]
    assert kept == [5, 4, 4, 3, 3, 2, 1, 1, 1]
    assert measure.calls == 1 + len(set(kept))
    assert curve.points[1].score == curve.points[2].score


def test_several_methods_in_one_scan():
    model = net()
    with torch.no_grad():  # magnitudes that differ, in no order
        for conv in (model.a, model.b):
            size = 4.0 ** torch.randn(len(conv.weight))
            conv.weight.mul_(size[:, None, None, None])
            conv.bias.mul_(size)
    methods = [L1(order=o) for o in ("smallest", "random", "largest")]
    scan = sensitivity(model, X, evaluate=Measure(model), method=methods, progress=False)
    assert scan.methods == ("l1 smallest", "l1 random", "l1 largest")
    assert len(scan.curves) == 6
    mean = {m: sum(p.score for c in scan.curves for p in c.points if c.method == m) for m in scan.methods}  # fmt: skip
    assert mean["l1 smallest"] > mean["l1 random"] > mean["l1 largest"]


def test_the_model_is_not_modified():
    model = net().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sensitivity(model, X, evaluate=lambda m: 0.0, ratios=[0.5], progress=False)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ---- the cache ----------------------------------------------------------------------------------


def test_a_finished_scan_costs_one_evaluation(tmp_path):
    model, cache = net(), tmp_path / "scan.jsonl"
    first = sensitivity(model, X, evaluate=Measure(model), cache=cache, progress=False)
    measure = Measure(model)
    again = sensitivity(model, X, evaluate=measure, cache=cache, progress=False)
    assert again == first
    assert measure.calls == 1


def test_an_interrupted_scan_goes_on(tmp_path):
    model, cache = net(), tmp_path / "scan.jsonl"
    measure = Measure(model)

    def interrupted(m):
        if measure.calls == 7:
            raise KeyboardInterrupt
        return measure(m)

    with pytest.raises(KeyboardInterrupt):
        sensitivity(model, X, evaluate=interrupted, cache=cache, progress=False)
    with cache.open("a") as file:
        file.write('{"score": -1.0, "ke')  # a line torn by a crash
    rest = Measure(model)
    scan = sensitivity(model, X, evaluate=rest, cache=cache, progress=False)
    whole = Measure(model)
    assert scan == sensitivity(model, X, evaluate=whole, progress=False)
    assert rest.calls == whole.calls - 6
    last = Measure(model)
    assert sensitivity(model, X, evaluate=last, cache=cache, progress=False) == scan
    assert last.calls == 1


def test_the_cache_is_of_one_model_method_and_seed(tmp_path):
    model, cache = net(), tmp_path / "scan.jsonl"

    def calls(model, **options):
        measure = Measure(model)
        measure.wanted = net()(X).detach()
        sensitivity(
            model, X, evaluate=measure, cache=cache, ratios=[0.5], progress=False, **options
        )
        return measure.calls

    assert calls(model) == 3
    assert calls(model) == 1
    assert calls(model, method=L1(order="largest")) == 3
    assert calls(model, method=L1(order="random")) == 3
    assert calls(model, method=L1(order="random"), seed=1) == 3
    assert calls(model, method=L1(ratio=0.3)) == 1  # a ratio of its own does not matter
    with torch.no_grad():
        model.a.weight[0, 0, 0, 0] += 1e-3
    assert calls(model) == 3


def test_another_measure_is_noticed(tmp_path):
    model, cache = net(), tmp_path / "scan.jsonl"
    sensitivity(model, X, evaluate=lambda m: 0.9, cache=cache, ratios=[0.5], progress=False)
    with pytest.raises(fxprune.OptionError, match=r"scores 0.8, and 0.9 in the cache"):
        sensitivity(model, X, evaluate=lambda m: 0.8, cache=cache, ratios=[0.5], progress=False)


@pytest.mark.parametrize(
    "junk", [b"", b"\xff\xfe\n", b"[]\n{}\n1\n", b'{"key": 3, "score": "x"}\n', b"[" * 100_000]
)
def test_a_damaged_cache_costs_only_what_it_held(tmp_path, junk):
    model, cache = net(), tmp_path / "scan.jsonl"
    cache.write_bytes(junk)
    measure = Measure(model)
    sensitivity(model, X, evaluate=measure, cache=cache, ratios=[0.5], progress=False)
    assert measure.calls == 3
    measure = Measure(model)
    sensitivity(model, X, evaluate=measure, cache=cache, ratios=[0.5], progress=False)
    assert measure.calls == 1


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX")
def test_a_cache_that_cannot_be_written(tmp_path):
    with pytest.raises(fxprune.CheckpointError, match="could not be written"):
        sensitivity(
            net(), X, evaluate=lambda m: 0.0, cache=tmp_path / "no" / "scan", progress=False
        )
    with pytest.raises(fxprune.CheckpointError, match="cannot be read"):
        sensitivity(net(), X, evaluate=lambda m: 0.0, cache=tmp_path, progress=False)


# ---- what comes of it ---------------------------------------------------------------------------


def scan_of(*scores, method="l1 smallest"):
    points = tuple(Point(r, 1, s) for r, s in zip(RATIOS, scores, strict=False))
    return Curve("layer", 10, method, points)


@pytest.mark.parametrize(
    ("scores", "drop", "ratio"),
    [
        ((0.9, 0.9, 0.89, 0.8, 0.9), 0.01, 0.3),  # what lies behind a drop does not count
        ((0.9, 0.9, 0.89, 0.8, 0.9), 0.0, 0.2),
        ((0.9, 0.9, 0.89, 0.8, 0.9), 0.2, 0.5),
        ((0.8, 0.9), 0.01, None),
        ((math.nan, 0.9), 0.5, None),
    ],
)
def test_proposals(scores, drop, ratio):
    scan = Sensitivity("Net", 0.9, (scan_of(*scores), scan_of(0.9, method="l1 largest")))
    assert scan.propose(drop) == ({} if ratio is None else {"layer": ratio})
    assert scan.propose(drop, "l1 largest") == {"layer": 0.1}
    with pytest.raises(fxprune.OptionError, match="the scan has no method 'l2'"):
        scan.propose(drop, "l2")
    with pytest.raises(fxprune.OptionError, match="drop is -1"):
        scan.propose(-1)


def test_proposals_are_ratios_that_compile_takes():
    model = zoo.resnet20(width=8).eval()
    x = torch.randn(2, 3, 16, 16)
    wanted = model(x).detach()

    def closeness(m):
        return -float((m(x) - wanted).norm().detach() / wanted.norm())

    scan = sensitivity(model, x, evaluate=closeness, ratios=(0.25, 0.5), progress=False)
    ratios = scan.propose(drop=0.2)
    assert ratios
    pruned = fxprune.compile(model, x, method=L1(ratio=ratios), progress=False)
    cut = {row.name for row in pruned.report.groups if row.after < row.before}
    assert cut == set(ratios)


def test_json_round_trip():
    scan = Sensitivity("Net", 0.9, (scan_of(0.9, math.nan),))
    text = scan.to_json()
    again = Sensitivity.from_json(text)
    assert json.loads(text)["curves"][0]["points"][1]["score"] is None
    assert again.to_json() == text
    assert again.curves[0].points[0] == scan.curves[0].points[0]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "{}", '{"schema_version": 1, "kind": "report"}', "[" * 10_000, b"\xff"],
)
def test_what_is_no_scan(text):
    with pytest.raises(fxprune.FxPruneError, match="not a sensitivity scan"):
        Sensitivity.from_json(text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"evaluate": "loader"}, "evaluate is 'loader'"),
        ({"ratios": [0.5, 1.0]}, "ratio is 1.0"),
        ({"ratios": [0.0]}, "ratio is 0.0"),
        ({"method": "l7"}, "there is no method 'l7'"),
        ({"scope": ["zz*"]}, "matches nothing"),
    ],
)
def test_what_makes_no_sense_is_refused(options, words):
    options = {"evaluate": lambda m: 0.0, **options}
    with pytest.raises(fxprune.FxPruneError, match=words):
        sensitivity(net(), X, progress=False, **options)
