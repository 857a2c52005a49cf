"""The report: data that survives copies and JSON, and text without surprises."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
import pickle
import re
import sys

import pytest
from reports import NASTY, long, mobile, sample, scan, small
from rich.cells import cell_len
from rich.console import Console

from fxprune.errors import FxPruneError
from fxprune.plan import Note
from fxprune.report import AnalysisRow, Curve, GroupRow, LayerRow, Point, Report, TimingRow, blocks
from fxprune.views.tables import analysis_text, sensitivity_text

# ---- data


@pytest.mark.parametrize("make", [sample, small])
def test_survives_copies_pickle_and_json(make):
    report = make()
    for twin in (
        copy.deepcopy(report),
        pickle.loads(pickle.dumps(report)),
        Report.from_json(report.to_json()),
    ):
        assert twin == report
        assert dataclasses.asdict(twin) == dataclasses.asdict(report)
    copy.deepcopy(report).stages["x"] = 1.0
    assert "x" not in report.stages


def test_json_holds_everything():
    report = sample()
    data = json.loads(report.to_json())
    assert set(data) == {"schema_version", *(f.name for f in dataclasses.fields(Report))}
    assert data["metrics"]["params_after"] == 431_210
    assert data["groups"][0]["members"] == ["layer1.0.conv1.weight", "layer1.0.bn1.weight"]
    assert list(data["stages"]) == ["before", "after the cut", "fine-tuned"]


def test_json_is_strict_about_numbers():
    report = sample(stages={"before": math.nan, "after": math.inf})
    data = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert data["stages"] == {"before": None, "after": None}
    assert math.isnan(Report.from_json(report.to_json()).stages["before"])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 2}', '{"schema_version": 1}'])
def test_from_json_refuses(text):
    with pytest.raises(FxPruneError, match="not a report of fxprune"):
        Report.from_json(text)


OLD = (  # what version 0.1.0 wrote before it knew layers and options
    '{"schema_version": 1, "model": "Net", "method": "l1", "front_end": "fx", "asked": {"macs": 0.5},'
    ' "metrics": {"macs_before": 29400, "macs_after": 13512, "params_before": 706, "params_after": 304},'
    ' "groups": [{"name": "a", "before": 8, "after": 5, "members": ["a.weight", "a.bias"]},'
    ' {"name": "b", "before": 6, "after": 3, "members": ["b.weight", "b.bias"]}],'
    ' "frozen": [{"node": "output", "why": "outputs of the model keep their channels"}], "folds": 0,'
    ' "verified": "max relative difference 0 (bound 1e-09)", "notes": [],'
    ' "stages": {"before": 0.5, "after the cut": 0.25},'
    ' "timings": [{"name": "original", "batch": 64, "median_ms": 20.0, "p20_ms": 19.0, "p80_ms": null}],'
    ' "seconds": {"analyse": 0.01}, "environment": ""}'
)


def test_old_documents_are_read(tmp_path):
    report = Report.from_json(OLD)
    assert report.groups[1] == GroupRow("b", 6, 3, ("b.weight", "b.bias"))
    assert report.asked == {"macs": 0.5}
    assert math.isnan(report.timings[0].p80_ms)
    assert (report.layers, report.options, report.how) == ([], {}, "l1")
    assert "2 of 2 groups cut" in repr(report)
    report.to_html(tmp_path / "page.html")
    again = json.loads(report.to_json())
    assert {k: v for k, v in again.items() if k not in ("layers", "options")} == json.loads(OLD)


def test_options_are_plain_data_of_their_own():
    ratios = {"layer1.*": 0.3}
    report = sample(options={"name": "l1", "ratio": ratios, "deep": ((1, 2), math.inf)})
    assert report.options == {"name": "l1", "ratio": {"layer1.*": 0.3}, "deep": [[1, 2], None]}
    ratios["x"] = 1.0
    assert report.options["ratio"] == {"layer1.*": 0.3}
    assert Report.from_json(report.to_json()) == report


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        ("model", 3, "model is int, not str"),
        ("notes", "text", "notes is str, not list"),
        ("notes", [3], "notes is int, not str"),
        ("folds", "2", "folds is str, not int"),
        ("options", [], "options is list, not dict"),
        ("layers", [3], r"layers\[0\] is int, not dict"),
        ("layers", [{"name": "x"}], "missing 7 required positional arguments"),
        ("groups", [{"name": "x", "before": "8"}], r"groups\[0\].before is str, not int"),
        ("groups", [{"name": "x", "members": [1]}], r"groups\[0\].members is int, not str"),
        ("frozen", [{"node": None}], r"frozen\[0\].node is NoneType, not str"),
        ("timings", [{"batch": True}], r"timings\[0\].batch is bool, not int"),
        ("timings", [{"p20_ms": "fast"}], r"timings\[0\].p20_ms is str, not a number"),
        ("metrics", {"macs_before": 1.5}, "metrics.macs_before is float, not int"),
        ("stages", {"before": [1]}, "stages.before is list, not a number"),
        ("asked", 0.5, "asked is float, not dict"),
        ("unheard_of", 1, "unheard_of"),
    ],
)
def test_from_json_says_which_entry_is_wrong(place, value, said):
    data = {**json.loads(sample().to_json()), place: value}
    with pytest.raises(FxPruneError, match=said):
        Report.from_json(json.dumps(data))


def test_from_json_survives_any_text():
    for text in ("[" * 100_000, b"\xff\xfe", '{"schema_version": 1' + " " * 9 + ', "a": ' * 50):
        with pytest.raises(FxPruneError, match="not a report of fxprune"):
            Report.from_json(text)


# ---- text


def test_text_tells_the_story(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = repr(sample())
    for part in (
        "CifarResNet pruned by L1, smallest first, preset ResNet-56-A, traced with torch.fx, 2 batch norms",
        "125 M",
        "62.7 M",
        "50.0 %",
        "at most 50.0 %",
        "1 of 2 groups cut",
        "MACs by layer",
        "31.2 %",
        "layer1.0.conv1",
        "linear: an output",
        "view_0, view_1, view_2 and 6 more: unknown size",
        "branch aux was dropped",
        "31.00 %",
        "2.00x as fast",
        "20.0 (19.0 to 22.0)",
        "Verified: max relative difference",
        "trace 0.21 s",
    ):
        assert part in text, part
    assert "\x1b" not in text
    assert str(sample()) == text
    assert max(map(len, text.splitlines())) <= 100


def test_text_of_a_baresample():
    text = repr(small())
    assert "M pruned by l1" in text
    assert "Not verified" in text


def test_names_are_not_markup_and_do_not_move_the_cursor():
    report = sample(
        model=NASTY,
        groups=[GroupRow(NASTY, 4, 2, (NASTY,))],
        frozen=[Note(NASTY, NASTY)],
        notes=[NASTY],
        stages={NASTY: 0.5},
        timings=[TimingRow(NASTY, 1, 1.0, 1.0, 1.0)],
        verified=NASTY,
        seconds={NASTY: 1.0},
    )
    text = repr(report)
    assert "\x1b" not in text
    assert "[red]" in text
    assert text.count("\\x1b") >= 6
    coloured = io.StringIO()
    Console(file=coloured, force_terminal=True, width=200).print(report)
    assert "[red]" in coloured.getvalue()
    assert "\x1b[31m" not in coloured.getvalue()


def test_many_groups_are_collapsed():
    groups = [GroupRow(f"layer{i}.conv", 16, 8, ()) for i in range(100)]
    text = repr(sample(groups=groups))
    assert "(78 more groups, 624 channels cut)" in text
    assert "layer0.conv" in text
    assert "layer99.conv" in text
    assert "layer50.conv" not in text


WIDTHS = [60, 80, 100, 120]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_group_is_one_line(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = repr(sample(groups=mobile())).splitlines()
    assert max(map(len, lines)) <= width
    start = lines.index("Channels by group: 18 of 18 groups cut")
    assert lines[start + 1].split() == ["group", "before", "after", *["spans"] * (width >= 90)]
    for group, line in zip(mobile(), lines[start + 3 :], strict=False):
        assert line.split()[:3] == [group.name, "1280", str(group.after)]
        assert line.split()[3] == "████████░░░░░░░░"
        assert ("and" in line and "more" in line) == (width >= 90)
    assert lines[start + 3 + 18] == ""


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["a" * 30 + "." + "b" * 170, "層" * 60])
def test_a_very_long_name_loses_its_middle(name, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    groups = [GroupRow(name, 16, 7, (f"{name}x.weight",)), GroupRow("short", 16, 8, ())]
    lines = repr(sample(groups=groups)).splitlines()
    (line,) = (line for line in lines if line.startswith(name[:10]))
    shown, before, after, *_ = line.split()
    assert (before, after) == ("16", "7")
    assert re.fullmatch(rf"{name[0]}+…{name[-1]}+", shown)
    assert cell_len(line) <= width
    assert [line.split()[:3] for line in lines if "short" in line] == [["short", "16", "8"]]


def test_names_go_before_the_bar(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    name = "features.denseblock3.denselayer12.norm1.x"
    (line,) = (x for x in repr(sample(groups=[GroupRow(name, 9, 3, ())])).splitlines() if name in x)
    assert line.split() == [name, "9", "3"]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_line_of_left_out_groups_is_one_line(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    groups = [GroupRow(f"c{i}", 16, 8, ()) for i in range(100)]
    lines = repr(sample(groups=groups)).splitlines()
    at = lines.index("(78 more groups, 624 channels cut)")
    assert lines[at - 1].split()[0] == "c15"
    assert lines[at + 1].split()[0] == "c94"
    assert lines[at - 1].index("16") == lines[at + 1].index("16")


def test_nodes_told_together_are_told_apart(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    names = [f"layer{i}.conv2" for i in range(30)]
    report = sample(frozen=[Note(", ".join(names), 'left out by scope="free"')])
    text = repr(report)
    assert 'layer0.conv2, layer1.conv2, layer2.conv2 and 27 more: left out by scope="free"' in text
    assert Report.from_json(report.to_json()) == report


def test_numbers_of_a_column_have_the_same_digits(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    report = sample(
        timings=[
            TimingRow("original", 1, 1.3, 1.29, 1.3),
            TimingRow("pruned", 1, 0.5, 0.5, 0.52),
            TimingRow("original", 64, 120.0, 119.0, 123.456),
            TimingRow("pruned", 64, 60.0, 59.0, 61.0),
        ],
        stages={"before": 2.0, "after": 12.346},
    )
    text = repr(report)
    for part in ("1.30 (1.29 to 1.30)", "0.50 (0.50 to 0.52)", "120.00 (119.00 to 123.46)"):
        assert part in text
    assert re.search(r"^before +2\.00$", text, re.MULTILINE)
    assert re.search(r"^after +12\.35$", text, re.MULTILINE)


def test_environment_is_told_and_may_be_missing():
    report = sample(environment="1 thread of <CPU>, float32")
    assert "measured on 1 thread of <CPU>, float32" in repr(report)
    data = json.loads(report.to_json())
    del data["environment"]
    assert Report.from_json(json.dumps(data)).environment == ""
    assert "easured on" not in repr(sample())


def test_multiply_adds_are_told_by_layer_of_few_and_by_part_of_many(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    lines = repr(sample()).splitlines()
    start = lines.index("MACs by layer")
    told = [line.split() for line in lines[start + 3 : start + 8]]
    assert [words[0] for words in told] == ["conv1", "layer1.0.conv1", "layer1.0.conv2", "matmul", "linear"]  # fmt: skip
    assert told[1][1:7] == ["2.36", "M", "737", "k", "31.2", "%"]
    assert told[1][7] == "██████████" + "░" * 22  # a third of the widest
    lines = repr(long()).splitlines()
    start = lines.index("MACs by part of the network")
    assert lines[start + 3].split()[0] == "features.denseblock1"
    assert lines[start + 11].split()[0] == "classifier"
    assert lines[start + 12] == ""
    assert len(lines) < 120


@pytest.mark.parametrize("width", [60, 80, 100, 120])
def test_parts_of_the_network_fit_the_terminal(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    rows = [LayerRow(f"{'x' * 70}{i}", "conv", 4, 2, 10**i, 10**i // 2, 9, 9) for i in range(1, 40)]
    for layers in (rows, rows[:5], sample().layers, [rows[0]]):
        lines = repr(sample(layers=layers)).splitlines()
        assert max(map(cell_len, lines)) <= width
    many = repr(sample(layers=rows))
    assert "(17 more layers)" in many
    assert "MACs by layer" in many


def test_blocks_are_as_many_as_one_can_survey():
    def parts(names):
        return [b.name for b in blocks([LayerRow(n, "conv", 1, 1, 1, 1, 1, 1) for n in names])]

    resnet = ["conv1", *(f"layer{i}.{j}.conv{k}" for i in (1, 2) for j in (0, 1) for k in (1, 2))]
    assert parts(resnet) == ["conv1", "layer1", "layer2"]
    dense = [f"features.block{i}.layer{j}" for i in (1, 2) for j in range(9)]
    assert parts(dense) == ["features.block1", "features.block2"]
    flat = [f"features.{i}" for i in range(90)]
    assert parts(flat) == ["features"]  # 90 parts would be no overview
    assert parts([]) == []
    assert parts(["", ".", "..", "a"]) == ["", ".", "a"]


# ---- analysis


def _rows():
    return [
        AnalysisRow(g.name, g.before, g.after, i % 2 == 0, g.members)
        for i, g in enumerate(mobile())
    ]


@pytest.mark.parametrize("width", WIDTHS)
def test_an_analysis_has_one_line_per_group(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    frozen = {"output": "outputs of the model", **{f"view_{i}": "unknown size" for i in range(9)}}
    text = analysis_text(_rows(), frozen)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert lines[0] == "18 prunable groups"
    assert lines[3].split() == [*["group", "channels", "cuttable", "an", "addition"], *["spans"] * (width >= 90)]  # fmt: skip
    for row, line in zip(_rows(), lines[5:], strict=False):
        words = line.split()
        assert words[:3] == [row.name, str(row.channels), str(row.cuttable)]
        assert ("yes" in words) == row.residual
        assert "weight" not in line
    assert lines[5 + 18] == ""
    assert f"In all: 18 groups, {sum(r.cuttable for r in _rows()):,} cuttable channels" in lines
    assert "  output: outputs of the model" in lines
    assert "  view_0, view_1, view_2 and 6 more: unknown size" in lines


def test_an_analysis_of_little(monkeypatch):
    assert analysis_text([], {}) == "0 prunable groups"
    text = analysis_text([AnalysisRow(NASTY, 4, 2, False, (NASTY,))], {NASTY: NASTY})
    assert text.startswith("1 prunable group\n")
    assert "\x1b" not in text
    assert "[red]" in text
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert analysis_text(_rows(), {"größe": "größer"}).isascii()
    assert analysis_text([AnalysisRow("a" * 99, 1, 1, True, ())], {}).isascii()
    assert "a...a" in analysis_text([AnalysisRow("a" * 99, 1, 1, True, ())], {})


def test_text_for_a_stream_without_unicode(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    text = repr(sample(notes=["größer"]))
    assert text.isascii()
    assert "#####" in text
    print(text)


# ---- a scan of sensitivity


@pytest.mark.parametrize("width", WIDTHS)
def test_a_scan_has_one_line_per_group(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    seen = scan()
    text = sensitivity_text(seen)
    lines = text.splitlines()
    assert max(map(cell_len, lines)) <= width
    assert lines[0] == "CifarResNet scores 93.00 %; each group cut alone"
    start = lines.index("What may go by l1 smallest, at a drop of 1 point")
    there = ["score", "there"] * (width > 60)  # names go before it
    assert lines[start + 1].split() == ["group", "channels", "scores", "removed", *there]
    proposals = seen.propose()
    firsts = [c for c in seen.curves if c.method == "l1 smallest"]
    for curve, line in zip(firsts, lines[start + 3 :], strict=False):
        words = line.split()
        assert words[:2] == [curve.name, "64"]
        assert len(words[2]) == len(curve.points)
        assert words[3:5] == [f"{100 * proposals[curve.name]:.0f}", "%"]
    assert lines[start + 3 + len(firsts)] == ""
    means = [line for line in lines if line.startswith(("l1 smallest", "l1 random", "l1 largest"))]
    last = [float(line.split()[-2]) for line in means]
    assert last == sorted(last, reverse=True)  # smallest first does the least harm


def test_scans_of_little(monkeypatch):
    assert "No group could be cut." in sensitivity_text(scan(methods=()))
    odd = scan([NASTY], methods=(NASTY,), worst=math.nan)
    text = sensitivity_text(odd)
    assert "\x1b" not in text
    assert "?????????" in text
    assert "[red]" in text
    losses = scan(worst=8.0, top=-2.0, methods=("a",))  # a score that is no accuracy
    assert "at a drop of 0.01" in sensitivity_text(losses)
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert sensitivity_text(scan(["größe" * 30])).isascii()


def test_a_group_that_bears_nothing_says_so():
    curve = Curve("fc", 8, "l1", (Point(0.5, 4, 0.1),))
    (line,) = (x for x in sensitivity_text(_Scan((curve,))).splitlines() if x.startswith("fc"))
    assert line.split()[-1] == "-"


class _Scan:
    model, baseline = "M", 0.9

    def __init__(self, curves):
        self.curves = curves

    def propose(self, drop=0.01):
        return {}


def test_a_score_that_no_float_holds_is_refused():
    data = sample().to_dict()
    data["stages"] = {"before": 10**400}
    with pytest.raises(FxPruneError, match=r"stages.* is no number of a report"):
        Report.from_json(json.dumps(data))
