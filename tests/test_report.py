"""The report: data that survives, text without surprises, one page that needs nothing else."""

from __future__ import annotations

import copy
import dataclasses
import html.parser
import io
import json
import math
import pickle
import re
import sys

import pytest
from rich.cells import cell_len
from rich.console import Console

import fxprune
from fxprune.errors import FxPruneError
from fxprune.plan import Note
from fxprune.report import AnalysisRow, GroupRow, Report, TimingRow, analysis_text

NASTY = "<script>alert(1)</script>[red]&$x$\x1b[31m"


def _report(**changes):
    values = {
        "model": "CifarResNet",
        "method": "l1",
        "front_end": "torch.fx",
        "asked": {"macs": 0.5},
        "metrics": {
            "macs_before": 125_485_696,
            "macs_after": 62_701_234,
            "params_before": 853_018,
            "params_after": 431_210,
        },
        "groups": [
            GroupRow("layer1.0.conv1", 16, 5, ("layer1.0.conv1.weight", "layer1.0.bn1.weight")),
            GroupRow("conv1", 16, 16, ("conv1.weight",)),
        ],
        "frozen": [
            Note("linear", "an output"),
            *(Note(f"view_{i}", "unknown size") for i in range(9)),
        ],
        "folds": 2,
        "verified": "max relative difference 3.1e-16 (bound 1e-9)",
        "notes": ["branch aux was dropped"],
        "stages": {"before": 0.98, "after the cut": 0.31, "fine-tuned": 0.97},
        "timings": [
            TimingRow("original", 64, 20.0, 19.0, 22.0),
            TimingRow("pruned", 64, 10.0, 9.5, 10.5),
        ],
        "seconds": {"trace": 0.21, "verify": 0.1},
    }
    return Report(**{**values, **changes})


def _small():
    return Report(model="M", method="l1", front_end="torch.fx", metrics={})


def _page(report, tmp_path):
    report.to_html(tmp_path / "page.html")
    return (tmp_path / "page.html").read_text(encoding="utf-8")


# ---- data


@pytest.mark.parametrize("make", [_report, _small])
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
    report = _report()
    data = json.loads(report.to_json())
    assert set(data) == {"schema_version", *(f.name for f in dataclasses.fields(Report))}
    assert data["metrics"]["params_after"] == 431_210
    assert data["groups"][0]["members"] == ["layer1.0.conv1.weight", "layer1.0.bn1.weight"]
    assert list(data["stages"]) == ["before", "after the cut", "fine-tuned"]


def test_json_is_strict_about_numbers():
    report = _report(stages={"before": math.nan, "after": math.inf})
    data = json.loads(report.to_json(), parse_constant=pytest.fail)
    assert data["stages"] == {"before": None, "after": None}
    assert math.isnan(Report.from_json(report.to_json()).stages["before"])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 2}', '{"schema_version": 1}'])
def test_from_json_refuses(text):
    with pytest.raises(FxPruneError, match="not a report of fxprune"):
        Report.from_json(text)


# ---- text


def test_text_tells_the_story(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = repr(_report())
    for part in (
        "CifarResNet pruned by l1, traced with torch.fx, 2 batch norms folded",
        "125 M",
        "62.7 M",
        "50.0 %",
        "at most 50.0 %",
        "1 of 2 groups cut",
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
    assert str(_report()) == text
    assert max(map(len, text.splitlines())) <= 100


def test_text_of_a_bare_report():
    text = repr(_small())
    assert "M pruned by l1" in text
    assert "Not verified" in text


def test_names_are_not_markup_and_do_not_move_the_cursor():
    report = _report(
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


def test_many_groups_are_collapsed_in_text_but_not_in_the_page(tmp_path):
    groups = [GroupRow(f"layer{i}.conv", 16, 8, ()) for i in range(100)]
    text = repr(_report(groups=groups))
    assert "(78 more groups, 624 channels cut)" in text
    assert "layer0.conv" in text
    assert "layer99.conv" in text
    assert "layer50.conv" not in text
    page = _page(_report(groups=groups), tmp_path)
    assert "<code>layer99.conv</code>" in page
    assert "20 more groups stand in the table" in page


WIDTHS = [60, 80, 100, 120]


def _mobile():
    """Groups with names as long as those of MobileNet, and with as many members."""
    return [
        GroupRow(
            f"features.{i}.block.{j}.{'fc1' if j == 2 else 0}",
            1280,
            640 + i,
            tuple(f"features.{i + k}.block.{j}.{k}.weight" for k in range(9)),
        )
        for i in range(10, 16)
        for j in range(3)
    ]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_group_is_one_line(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = repr(_report(groups=_mobile())).splitlines()
    assert max(map(len, lines)) <= width
    start = lines.index("Channels by group: 18 of 18 groups cut")
    assert lines[start + 1].split() == ["group", "before", "after", *["spans"] * (width >= 90)]
    for group, line in zip(_mobile(), lines[start + 3 :], strict=False):
        assert line.split()[:3] == [group.name, "1280", str(group.after)]
        assert line.split()[3] == "████████░░░░░░░░"
        assert ("and" in line and "more" in line) == (width >= 90)
    assert lines[start + 3 + 18] == ""


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["a" * 30 + "." + "b" * 170, "層" * 60])
def test_a_very_long_name_loses_its_middle(name, width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    groups = [GroupRow(name, 16, 7, (f"{name}x.weight",)), GroupRow("short", 16, 8, ())]
    lines = repr(_report(groups=groups)).splitlines()
    (line,) = (line for line in lines if line.startswith(name[:10]))
    shown, before, after, *_ = line.split()
    assert (before, after) == ("16", "7")
    assert re.fullmatch(rf"{name[0]}+…{name[-1]}+", shown)
    assert cell_len(line) <= width
    assert [line.split()[:3] for line in lines if "short" in line] == [["short", "16", "8"]]


def test_names_go_before_the_bar(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    name = "features.denseblock3.denselayer12.norm1.x"
    (line,) = (
        x for x in repr(_report(groups=[GroupRow(name, 9, 3, ())])).splitlines() if name in x
    )
    assert line.split() == [name, "9", "3"]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_line_of_left_out_groups_is_one_line(width, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    groups = [GroupRow(f"c{i}", 16, 8, ()) for i in range(100)]
    lines = repr(_report(groups=groups)).splitlines()
    at = lines.index("(78 more groups, 624 channels cut)")
    assert lines[at - 1].split()[0] == "c15"
    assert lines[at + 1].split()[0] == "c94"
    assert lines[at - 1].index("16") == lines[at + 1].index("16")


def test_nodes_told_together_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    names = [f"layer{i}.conv2" for i in range(30)]
    report = _report(frozen=[Note(", ".join(names), 'left out by scope="free"')])
    text = repr(report)
    assert 'layer0.conv2, layer1.conv2, layer2.conv2 and 27 more: left out by scope="free"' in text
    page = _page(report, tmp_path)
    for name in names:
        assert f"<code>{name}</code>" in page
    assert Report.from_json(report.to_json()) == report


def test_numbers_of_a_column_have_the_same_digits(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    report = _report(
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


def test_environment_is_told_and_may_be_missing(tmp_path):
    report = _report(environment="1 thread of <CPU>, float32")
    assert "measured on 1 thread of <CPU>, float32" in repr(report)
    assert "Measured on 1 thread of &lt;CPU&gt;, float32." in _page(report, tmp_path)
    data = json.loads(report.to_json())
    del data["environment"]
    assert Report.from_json(json.dumps(data)).environment == ""
    assert "easured on" not in repr(_report()) + _page(_report(), tmp_path)


# ---- analysis


def _rows():
    return [
        AnalysisRow(g.name, g.before, g.after, i % 2 == 0, g.members)
        for i, g in enumerate(_mobile())
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
    text = repr(_report(notes=["größer"]))
    assert text.isascii()
    assert "#####" in text
    print(text)


# ---- page


class _Parser(html.parser.HTMLParser):
    """Collects tags, text and attributes; checks that tags close in order."""

    VOID = frozenset({"meta", "link", "br", "hr", "img", "input"})

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.text, self.values = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.values += [(tag, key, value) for key, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.values += [(tag, key, value) for key, value in attrs]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.mark.parametrize("make", [_report, _small])
def test_page_is_whole_and_needs_nothing_else(make, tmp_path):
    page = _page(make(), tmp_path)
    parser = _Parser()
    parser.feed(page)
    assert parser.open == []
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(parser.tags)
    assert not re.search(r"(https?:)?//[a-z]", page)
    assert "@import" not in page
    for _, key, value in parser.values:
        assert key not in ("src", "srcset", "onload", "onclick")
        if key == "href":
            assert value.startswith("#")
    for target in re.findall(r"url\(([^)]*)\)", page):
        assert target.startswith("#")
    ids = [value for _, key, value in parser.values if key == "id"]
    assert len(ids) == len(set(ids))
    hrefs = {value[1:] for _, key, value in parser.values if key == "href"}
    assert hrefs | set(re.findall(r"url\(#([^)]*)\)", page)) <= set(ids)
    assert "prefers-color-scheme: dark" in page
    assert "#010101" not in page  # every stand-in became a colour of the page


def test_page_shows_the_plots_that_have_data(tmp_path):
    page = _page(_report(), tmp_path)
    assert page.count("<svg") == 3
    assert "31.00 %" in page
    assert "2.00x" in page
    assert "10.0 ms (2.00x as fast)" in page
    assert "<svg" not in _page(_small(), tmp_path)
    odd = _report(stages={"a": -3.0, "b": math.nan}, groups=[GroupRow("g", 1, 1, ())])
    assert "-3" in _page(odd, tmp_path)


def test_page_escapes_names(tmp_path):
    report = _report(
        model=NASTY,
        method=NASTY,
        groups=[GroupRow(NASTY, 4, 2, (NASTY,))],
        frozen=[Note(NASTY, NASTY)] * 8,
        notes=[NASTY],
        stages={NASTY: 0.5, "b" + NASTY: 0.6},
        timings=[TimingRow(NASTY, 1, 1.0, 1.0, 1.0)],
        verified=NASTY,
        seconds={NASTY: 1.0},
    )
    page = _page(report, tmp_path)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page
    parser = _Parser()
    parser.feed(page)
    assert parser.open == []
    assert "script" not in parser.tags


def test_the_page_says_what_and_with_what(tmp_path):
    import torch

    page = _page(_report(), tmp_path)
    assert "<title>CifarResNet pruned by l1 - fxprune</title>" in page
    footer = page[page.index("<footer") :]
    assert f"fxprune {fxprune.__version__}, torch {torch.__version__}" in footer
    assert '<td class="name"><code>layer1.0.conv1</code></td>' in page


def test_a_dollar_in_a_name_is_a_dollar(tmp_path):
    page = _page(_report(groups=[GroupRow("a$b$c", 4, 2, ())]), tmp_path)
    assert ">a$b$c</text>" in page


def test_same_report_same_page(tmp_path):
    assert _page(_report(), tmp_path) == _page(_report(), tmp_path)


def test_page_replaces_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    _report().to_html(str(path))
    before = path.read_bytes()

    def fail(report):
        raise RuntimeError("mine")

    monkeypatch.setattr("fxprune.report._draw_stages", fail)
    with pytest.raises(RuntimeError, match="mine"):
        _report(model="Other").to_html(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_users_plot_settings_are_left_alone(tmp_path):
    import matplotlib

    with matplotlib.rc_context({"axes.linewidth": 33.0}):
        styled = _page(_report(), tmp_path)
        assert matplotlib.rcParams["axes.linewidth"] == 33.0
    assert styled == _page(_report(), tmp_path)
