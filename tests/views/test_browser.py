"""Pages in a real browser: silent, asking for nothing, legible in light and dark, wide and narrow.

Needs Chromium on the PATH; without one these tests are skipped, and say so.
"""

import re
from pathlib import Path

import numpy as np
import pytest
from browser import NAMES, Browser, find
from reports import NASTY, long, sample, scan, scan_page

from fxprune.report import GroupRow, LayerRow
from fxprune.views.page import report_page

pytestmark = pytest.mark.skipif(find() is None, reason=f"none of {', '.join(NAMES)} starts here")

WINDOWS = [(1100, False), (1100, True), (400, False), (400, True)]
NAME = (
    "features.denseblock3.denselayer24.residual_path.convolution.with.a.name.that.never.ends.conv1"
)


def named_badly():
    names = [NASTY, NAME, "x" * 300, "層" * 80]
    return sample(
        model=names[2],
        groups=[GroupRow(n, 64, 32, (n,) * 9) for n in names],
        layers=[LayerRow(n, "conv", 64, 32, 2**30, 2**29, 2**20, 2**19) for n in names],
        stages=dict.fromkeys(names, 0.5),
        notes=[names[2]],
    )


STAGES = {f"{what}, step {i} of 3": 0.9 - i / 10 for i in (1, 2, 3) for what in ("after the cut", "recalibrated", "fine-tuned")}  # fmt: skip
PAGES = {
    "report": lambda: report_page(sample()),
    "long": lambda: report_page(long()),
    "steps": lambda: report_page(sample(stages={"before": 0.93, **STAGES}, layers=long(90).layers)),
    "names": lambda: report_page(named_badly()),
    "scan": lambda: scan_page(scan()),
    "long-scan": lambda: scan_page(
        scan([f"features.block{1 + i // 60}.layer{i}.conv" for i in range(240)], methods=("l1",)),
        notes=[NAME],
    ),
}


@pytest.fixture(scope="module")
def browser():
    with Browser() as started:
        yield started


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("pages")
    for name, make in PAGES.items():
        (made / f"{name}.html").write_text(make(), encoding="utf-8")
    return made


# Boxes of what is drawn and shown, and what sticks out of where it belongs.
MEASURE = """(() => {
  const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  const shown = e => e.checkVisibility() && e.getBoundingClientRect().width > 0;
  const all = what => [...document.querySelectorAll(what)].filter(shown);
  const out = [];
  for (const e of all("h1, h2, h3, p, li, code, summary, .name, .value, .tile, .bar, svg"))
    if (!e.closest(".scroll") && (box(e)[2] > innerWidth + 1 || box(e)[0] < -1))
      out.push(e.className + ": " + e.textContent.slice(0, 40));
  const clipped = [];
  for (const svg of all("svg")) {
    const [left, top, right, bottom] = box(svg);
    for (const text of svg.querySelectorAll("text")) {
      const b = box(text);
      if (b[0] < left - 2 || b[1] < top - 2 || b[2] > right + 2 || b[3] > bottom + 2)
        clipped.push(text.textContent);
    }
  }
  const overlapping = [];
  for (const svg of all("svg")) {
    const texts = [...svg.querySelectorAll("text")].map(e => [box(e), e.textContent]);
    texts.forEach(([a, one], i) => texts.slice(i + 1).forEach(([b, other]) => {
      if (Math.min(a[2], b[2]) - Math.max(a[0], b[0]) > 2 &&
          Math.min(a[3], b[3]) - Math.max(a[1], b[1]) > 4) overlapping.push([one, other]);
    }));
  }
  return {plots: all("svg").map(box), clipped, overlapping, out, width: document.documentElement.scrollWidth,
    bars: all(".bar").map(e => [box(e), ...["--a", "--accent"].map(v => getComputedStyle(e).getPropertyValue(v))]),
    letters: Math.min(...all("svg text").map(e => e.getBoundingClientRect().height))};
})()"""


def colour(view, name):
    """A colour of the page, float [3], 0 to 255."""
    return rgb(view.run(f"getComputedStyle(document.documentElement).getPropertyValue('--{name}')"))


def rgb(text):
    """#rrggbb as float [3], 0 to 255."""
    return np.array([int(text.strip()[i : i + 2], 16) for i in (1, 3, 5)], dtype=float)


def near(pixels, wanted):
    """Which pixels have a colour, but for rounding: bool."""
    return (np.abs(pixels.astype(float) - wanted) < 12).all(axis=-1)


def brightness(c):
    """Relative luminance as WCAG 2 defines it."""
    c = np.asarray(c) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])


def contrast(a, b):
    high, low = sorted((brightness(a), brightness(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("name", PAGES)
def test_a_page_in_every_window(name, browser, folder):
    path = folder / f"{name}.html"
    for width, dark in WINDOWS:
        view = browser.open(path, width=width, dark=dark)
        assert view.messages == []
        assert view.requests == [path.resolve().as_uri()]
        seen = view.run(MEASURE)
        assert seen["width"] == width, "the page scrolls sideways"
        assert seen["out"] == []
        assert seen["clipped"] == []
        assert seen["overlapping"] == []
        assert seen["letters"] >= 9, "letters of a plot are too small to read"
        picture, back = view.picture(), colour(view, "card")
        assert near(picture, colour(view, "back")).mean() > 0.05
        assert len(seen["plots"]) == {"report": 2, "scan": 2, "long-scan": 1}.get(name, 2)
        for left, top, right, bottom in seen["plots"]:
            assert right - left > 0.8 * width - 60
            assert bottom - top > 100
            ink = ~near(picture[int(top) : int(bottom), int(left) : int(right)], back)
            assert ink.mean() > 0.01
        assert seen["bars"]
        for (left, top, right, bottom), filled, accent in seen["bars"]:
            assert right - left >= 40
            assert bottom - top >= 8
            row = picture[int(bottom) - 3, int(left) : int(right)]
            assert abs(near(row, rgb(accent)).mean() - float(filled.rstrip("%")) / 100) < 0.06
        view.close()


@pytest.mark.parametrize("name", ["report", "scan"])
def test_light_and_dark_are_legible(name, browser, folder):
    backs = []
    for dark in (False, True):
        view = browser.open(folder / f"{name}.html", dark=dark)
        card, back = colour(view, "card"), colour(view, "back")
        for text in ("ink", "muted", "warn", "good"):
            assert contrast(colour(view, text), card) >= 4.5, text
            assert contrast(colour(view, text), back) >= 4.4, text
        for drawn in ("accent", "first", "second", "third", "fourth", "fifth"):
            assert contrast(colour(view, drawn), card) >= 3, drawn
        assert contrast(colour(view, "accent"), colour(view, "pale")) > 2
        backs.append(brightness(view.picture()[2, 2]))
        view.close()
    assert backs[0] > 0.8
    assert backs[1] < 0.05


def test_everything_can_be_unfolded_on_a_phone(browser, folder):
    view = browser.open(folder / "long.html", width=400)
    closed = view.run(MEASURE)
    rows = "[...document.querySelectorAll('.layer')].filter(e => e.checkVisibility()).length"
    before = view.run(rows)
    view.run("document.querySelectorAll('summary').forEach(e => e.click())")
    opened = view.run(MEASURE)
    assert len(opened["bars"]) > 10 * len(closed["bars"])
    assert view.run(rows) == before + 480
    assert opened["width"] == 400
    assert opened["out"] == []
    assert view.messages == []
    view.close()


def test_names_are_told_under_the_pointer(browser, folder):
    view = browser.open(folder / "scan.html")
    titles = view.run("[...document.querySelectorAll('svg title')].map(e => e.textContent)")
    assert "conv1, 64 channels" in titles
    view.close()
    view = browser.open(folder / "names.html")
    titles = view.run("[...document.querySelectorAll('[title]')].map(e => e.title)")
    assert any(title.startswith(NAME) for title in titles)
    view.close()


def test_a_page_prints_without_losing_its_bars(browser, folder):
    view = browser.open(folder / "report.html")
    browser.call("Emulation.setEmulatedMedia", {"media": "print"}, view.session)
    exact = "getComputedStyle(document.body).getPropertyValue('print-color-adjust')"
    assert view.run(exact) == "exact"
    view.close()


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("<script>throw new Error('mine')</script>", "messages"),
        ("<script>console.error('mine')</script>", "messages"),
        ("<img src='http://127.0.0.1:9/mine.png'>", "requests"),
        ("<style>body { background: url(mine.png) }</style>", "requests"),
        ("<div style='width: 2000px; height: 1px'>mine</div>", "width"),
        ("<p style='margin-left: -9px'>mine</p>", "out"),
        ("<svg width='50' height='20'><text x='40' y='15'>mine</text></svg>", "clipped"),
        ("<svg><text y='15'>mine</text><text x='9' y='18'>too</text></svg>", "overlapping"),
    ],
)
def test_the_checks_see_what_is_wrong(body, what, browser, tmp_path):
    path = Path(tmp_path) / "bad.html"
    path.write_text(f"<!doctype html><meta charset=utf-8><body style='margin: 0'>{body}</body>")
    view = browser.open(path, width=400)
    if what == "requests":
        assert len(view.requests) == 2
        assert re.search(r"mine\.png", view.requests[1])
    elif what == "messages":
        assert len(view.messages) == 1
        assert "mine" in view.messages[0]
    else:
        seen = view.run(MEASURE)
        assert seen[what] not in (400, [])
    view.close()
