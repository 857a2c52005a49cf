"""Pages of reports and scans: whole, escaped, in need of nothing else."""

import html.parser
import math
import re

import pytest
import torch
from reports import NASTY, Scanned, long, sample, scan, scan_page, small
from torch import nn

import fxprune
from fxprune.plan import Note
from fxprune.report import Curve, GroupRow, LayerRow, Point, TimingRow
from fxprune.views.page import report_page, sensitivity_figure, write_sensitivity


def page(report, tmp_path):
    report.to_html(tmp_path / "page.html")
    return (tmp_path / "page.html").read_text(encoding="utf-8")


class Parser(html.parser.HTMLParser):
    """Collects tags, text and attributes; checks that tags close in order."""

    VOID = frozenset({"meta", "link", "br", "hr", "img", "input"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.text, self.values = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

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


PAGES = {
    "a report": lambda: report_page(sample()),
    "a bare report": lambda: report_page(small()),
    "a long report": lambda: report_page(long(120)),
    "a scan": lambda: scan_page(scan()),
    "a scan by one method": lambda: scan_page(scan(methods=("l1",)), notes=["it was short"]),
    "an empty scan": lambda: scan_page(scan(methods=())),
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_whole_and_needs_nothing_else(name):
    text = PAGES[name]()
    parser = Parser(text)
    assert not {"script", "link", "img", "iframe", "object", "image", "base"} & set(parser.tags)
    assert not re.search(r"(https?:)?//[a-z]", text)
    assert "@import" not in text
    for _, key, value in parser.values:
        assert key not in ("src", "srcset")
        assert not key.startswith("on")
        if key == "href":
            assert value.startswith("#")
    for target in re.findall(r"url\(([^)]*)\)", text):
        assert target.startswith("#")
    ids = [value for _, key, value in parser.values if key == "id"]
    assert len(ids) == len(set(ids))
    hrefs = {value[1:] for _, key, value in parser.values if key == "href"}
    assert hrefs | set(re.findall(r"url\(#([^)]*)\)", text)) <= set(ids)
    assert "prefers-color-scheme: dark" in text
    assert "#0101" not in text  # every stand-in became a colour of the page
    variables = set(re.findall(r"var\((--\w+)\)", text))  # those without a value to fall back to
    assert variables <= set(re.findall(r"(--\w+):", text))


@pytest.mark.parametrize("name", ["a report", "a scan"])
def test_the_same_data_give_the_same_page(name):
    assert PAGES[name]() == PAGES[name]()


def test_a_report_shows_the_plots_that_have_data(tmp_path):
    text = page(sample(), tmp_path)
    for name in ("stages", "profile"):
        assert text.count(f'id="{name}-wide-figure_1"') == 1
        assert text.count(f'id="{name}-narrow-figure_1"') == 1
    assert "31.00 %" in text
    assert "2.00x" in text
    assert "10.0 ms (9.5 to 10.5)" in text
    bare = page(small(), tmp_path)
    assert "<svg" not in bare
    for section in ("remains", "stages", "latency", "layers", "groups", "frozen"):
        assert f'<section id="{section}"' in text
        assert f'<section id="{section}"' not in bare
    odd = sample(stages={"a": -3.0, "b": math.nan}, groups=[GroupRow("g", 1, 1, ())])
    assert "-3" in page(odd, tmp_path)


def bars(text, section):
    """(before, after) in percent of the bars of a section."""
    part = text[text.index(f'<section id="{section}"') :]
    part = part[: part.index("</section>")]
    found = re.findall(r'class="bar[^"]*" style="(?:--b: ([\d.]+)%; )?--a: ([\d.]+)%', part)
    return [(float(b or 0), float(a)) for b, a in found]


def test_bars_are_as_long_as_their_numbers(tmp_path):
    text = page(sample(), tmp_path)
    assert bars(text, "remains") == [(100, 49.97), (100, 50.55), (100, 50)]
    assert '<i class="asked" style="left: 50%"></i>' in text
    assert text.count('<i class="asked"') == 1  # nothing was asked of the parameters
    assert bars(text, "latency") == [(0, 90.91), (0, 45.45)]
    assert '<i class="spread" style="left: 86.36%; width: 13.64%">' in text
    rows = bars(text, "layers")  # channels and multiply-adds in turns, layer by layer
    assert rows[0::2] == [(100, 100), (100, 31.25), (100, 100), (0, 0), (62.5, 62.5)]
    assert rows[1::2] == [(18.75, 18.75), (100, 31.25), (100, 31.25), (0.04, 0.04), (0.03, 0.03)]
    assert "16 → 5" in text
    assert "2.36 M → 737 k" in text
    assert "Not shown, for they multiply nothing: 1 normalisation with 32 parameters." in text


def test_parts_of_a_long_network_add_up_and_are_closed(tmp_path):
    report = long()
    text = page(report, tmp_path)
    assert len(text) < 1_000_000
    assert text.count('<details class="part">') == 8
    assert "60 layers" in text
    for row in report.layers:
        if row.kind != "norm":
            assert f"<code>{row.name}</code>" in text
    macs = sum(r.macs_before for r in report.layers if r.name.startswith("features.denseblock3."))
    assert f"{macs / 1e6:.0f} M → " in text
    assert "features.x9 and 470 more" in text or "and 474 more" in text
    assert page(sample(), tmp_path).count('<details class="part"') == 0


def test_frozen_channels_are_told_by_reason(tmp_path):
    names = [f"layer{i}.conv2" for i in range(30)]
    text = page(
        sample(
            frozen=[Note(", ".join(names), 'left out by scope="free"'), Note("fc", "an output")]
        ),
        tmp_path,
    )
    assert text.count('<div class="reason">') == 2
    assert "left out by scope=&#34;free&#34; <span" in text
    assert "(30 places)" in text
    assert "<summary>and 22 more</summary>" in text
    for name in names:
        assert f">{name}</code>" in text


def nasty():
    return sample(
        model=NASTY,
        method=NASTY,
        options={"name": NASTY, NASTY: NASTY},
        groups=[GroupRow(NASTY, 4, 2, (NASTY,))],
        layers=[LayerRow(NASTY + str(i), NASTY, 4, 2, 9, 4, 9, 4) for i in range(14)],
        frozen=[Note(NASTY, NASTY)] * 8,
        notes=[NASTY],
        stages={NASTY: 0.5, "b" + NASTY: 0.6},
        timings=[TimingRow(NASTY, 1, 1.0, 1.0, 1.0)],
        verified=NASTY,
        environment=NASTY,
        seconds={NASTY: 1.0},
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: report_page(nasty()),
        lambda: scan_page(scan([NASTY, "x"], methods=(NASTY, "b")), title=NASTY, notes=[NASTY]),
        lambda: scan_page(scan([f"{NASTY}.{i}" for i in range(90)], methods=(NASTY,))),
    ],
)
def test_names_are_escaped(make):
    text = make()
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)" in text
    assert "script" not in Parser(text).tags
    assert "\x1b" not in text


ODD = ["x" * 5_000, "層" * 999, '" onclick="x', "a\nb", "\ud800", "</svg>", "#010101", "_", "", "."]


def test_names_of_any_kind(tmp_path):
    report = sample(
        model="".join(ODD),
        groups=[GroupRow(name, 4, 2, (name,)) for name in ODD],
        layers=[LayerRow(name, "conv", 4, 2, 9, 4, 9, 4) for name in ODD],
        frozen=[Note(name, name) for name in ODD],
        stages=dict.fromkeys(ODD, 0.5),
        timings=[TimingRow(name, 1, 2.0, 1.0, 3.0) for name in ODD],
    )
    for text in (page(report, tmp_path), scan_page(scan(ODD, methods=ODD[:3]))):
        parser = Parser(text)
        assert not [key for _, key, _ in parser.values if key.startswith("on")]
        shown = re.findall("<code[^>]*>(.*?)</code>", text, re.DOTALL)
        assert len(shown) >= len(ODD)
        assert all(len(name) < 120 for name in shown)
    repr(report)


@pytest.mark.parametrize("name", ["_", "", "."])
def test_a_legend_names_every_method(name):
    text = scan_page(scan(["_a", "b"], methods=(name, "other")))
    assert len(re.findall(">other</text>", text)) == 4  # two drawings, each wide and narrow
    assert len(re.findall(">\u200a?_a</text>", text)) == 4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0, 0.0, 1e300])
def test_numbers_of_any_kind(bad, tmp_path):
    report = sample(
        stages={"a": bad, "b": 0.5, "c": bad},
        timings=[TimingRow("a", 1, bad, bad, bad), TimingRow("b", 1, bad, 0.0, bad)],
        metrics={"macs_before": 0, "macs_after": 0},
        layers=[LayerRow("x", "conv", 0, 0, 0, 0, 0, 0)],
        groups=[GroupRow("g", 0, 0, ())],
        asked={"macs": bad},
    )
    text = page(report, tmp_path)
    assert "nan%" not in text
    assert "inf%" not in text
    repr(report)
    points = (Point(0.5, 1, bad), Point(0.9, 1, 0.5))
    Parser(scan_page(Scanned((Curve("a", 4, "_m", points),), baseline=bad)))
    Parser(scan_page(Scanned((Curve("a", 0, "m", ()), Curve("b", 0, "n", ())))))


def test_a_page_says_what_and_with_what(tmp_path):
    text = page(sample(), tmp_path)
    assert "<title>CifarResNet pruned by l1 - fxprune</title>" in text
    assert "pruned by L1, smallest first, preset ResNet-56-A</span></h1>" in text
    footer = text[text.index("<footer") :]
    assert f"fxprune {fxprune.__version__}, torch {torch.__version__}" in footer
    assert "2 batch norms folded" in footer
    assert '<code>layer1.0.conv1</code></td><td class="number">16</td>' in text
    environment = page(sample(environment="1 thread of <CPU>, float32"), tmp_path)
    assert "Measured on 1 thread of &lt;CPU&gt;, float32." in environment
    assert "easured on" not in text


def test_a_dollar_in_a_name_is_a_dollar(tmp_path):
    text = page(sample(stages={"a$b$c": 0.5, "d": 0.6}), tmp_path)
    assert ">a$b$c</text>" in text


def test_a_page_replaces_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    sample().to_html(str(path))
    before = path.read_bytes()

    def fail(*_):
        raise RuntimeError("mine")

    for write in (lambda: sample(model="Other").to_html(path), lambda: write_sensitivity(scan(), path)):  # fmt: skip
        with monkeypatch.context() as broken:
            broken.setattr("fxprune.views.plots.draw_stages", fail)
            broken.setattr("fxprune.views.plots.draw_curves", fail)
            with pytest.raises(RuntimeError, match="mine"):
                write()
        with monkeypatch.context() as broken:
            broken.setattr("os.replace", fail)
            with pytest.raises(RuntimeError, match="mine"):
                write()
        assert path.read_bytes() == before
        assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="No such file"):
        sample().to_html(tmp_path / "missing" / "page.html")
    write_sensitivity(scan(), path)
    assert path.read_bytes() != before


def test_the_users_plot_settings_are_left_alone(tmp_path):
    import matplotlib

    plain, plain_scan = page(sample(), tmp_path), scan_page(scan())
    with matplotlib.rc_context({"axes.linewidth": 33.0, "font.size": 40.0, "text.usetex": True}):
        assert page(sample(), tmp_path) == plain
        assert scan_page(scan()) == plain_scan
        assert matplotlib.rcParams["axes.linewidth"] == 33.0


# ---- scans


def test_a_scan_shows_curves_a_comparison_and_proposals():
    scanned = scan()
    text = scan_page(scanned)
    for name in ("curves", "compare"):
        assert text.count(f'id="{name}-wide-figure_1"') == 1
    one = scan_page(scan(methods=("l1 smallest",)))
    assert 'id="compare-wide-figure_1"' not in one
    names = [c.name for c in scanned.curves if c.method == "l1 smallest"]
    proposals = scanned.propose(0.01)
    rows = re.findall(r'<div class="group">(.*?)</div>', text, re.DOTALL)
    assert len(rows) == len(names)
    for name, row in zip(names, rows, strict=True):
        assert f"<code>{name}</code>" in row
        assert "64 channels" in row
        assert f"--a: {100 * proposals[name]:.1f}%" in row
        assert f">{100 * proposals[name]:.0f} %" in row
    assert "the largest share up to which the score drops by at most 1 point<" in text
    assert "conv1, 64 channels</title>" in text  # under the pointer


def test_what_may_not_go_is_told_as_none():
    text = scan_page(scan(["a", "b"], methods=("l1",)), proposals={"b": 0.4})
    rows = re.findall(r'<div class="group">(.*?)</div>', text, re.DOTALL)
    assert ">none</span>" in re.sub(r"\s+", " ", rows[0])
    assert "40 %" in rows[1]


def test_a_long_scan_is_told_by_part():
    names = [f"features.block{1 + i // 30}.layer{i}" for i in range(120)]
    text = scan_page(scan(names))
    assert text.count('<details class="part">') == 4
    assert text.count('<div class="group">') == 120
    assert "30 groups" in text


def test_a_figure_can_be_saved(tmp_path):
    import matplotlib
    import matplotlib.image

    for methods in (("l1 smallest", "l1 random", "l1 largest"), ("l1",), ()):
        scanned = scan(methods=methods)
        figure = sensitivity_figure(
            title="Sensitivity of $ResNet$",
            baseline=scanned.baseline,
            curves=scanned.curves,
            drop=0.01,
        )
        with matplotlib.rc_context({"text.usetex": True}):
            figure.savefig(tmp_path / "scan.png", dpi=60)
            figure.savefig(tmp_path / "scan.svg")
        picture = matplotlib.image.imread(tmp_path / "scan.png")[..., :3]
        assert picture.shape[1] == 600
        assert (picture[0, 0] == 1).all()  # white, whatever shows it
        assert (picture < 0.9).any(axis=2).mean() > (0.02 if methods else 0)
        Parser((tmp_path / "scan.svg").read_text().partition("?>")[2].partition(">")[2])


def test_a_real_scan_and_a_real_report_have_pages(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 1))  # fmt: skip
    x = torch.randn(2, 3, 8, 8)
    found = fxprune.sensitivity(
        net.eval(), x, evaluate=lambda m: -m(x).abs().mean().item(), ratios=(0.25, 0.5), progress=False
    )  # fmt: skip
    found.to_html(tmp_path / "scan.html", 0.1)
    text = (tmp_path / "scan.html").read_text()
    Parser(text)
    assert "Sensitivity of Sequential to pruning" in text
    pruned = fxprune.compile(net, x, budget=0.5, progress=False)
    text = page(pruned.report, tmp_path)
    assert "asked 50.0 %" in text
    for name in ("0", "2", "4"):
        assert f"<code>{name}</code>" in text


def test_means_far_below_the_middle_half_are_drawn():
    """One layer that bears nothing pulls the mean out of the middle half of all layers."""
    curves = [
        Curve(
            f"layer{i}", 8, "l1 smallest", tuple(Point(r, 4, 0.9 if i else 0.0) for r in (0.2, 0.4))
        )
        for i in range(8)
    ]
    curves += [Curve(c.name, 8, "l1 largest", c.points) for c in curves]
    figure = sensitivity_figure(title="Net", baseline=0.9, curves=curves, drop=0.01)
    axes = figure.axes[2]
    low, high = axes.get_ylim()
    for line in axes.get_lines():
        assert all(low <= y <= high for y in line.get_ydata())
