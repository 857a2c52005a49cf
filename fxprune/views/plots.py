"""The drawings of reports and scans, by matplotlib: for a page (as SVG) or for a file.

Promise: a drawing for a page has no colours of its own but stand-ins that `svg` turns into the
page's, so that it follows light and dark; text stays text; the same data give the same bytes; the
user's matplotlib settings neither leak in nor change.
Scans are drawn as in Li et al. 2017 (arXiv:1608.08710), figures 2(b) and 6.
"""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from statistics import fmean, quantiles
from typing import TYPE_CHECKING, Any

from fxprune.report import Curve, LayerRow, blocks
from fxprune.views.words import are_shares, counted, scorer, short, si

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_NAMED = 4  # curves of a panel that a legend names: the most sensitive ones
_MANY = 24  # bars from which on they may tower over others, or stand close
_MARKERS = "os^D"  # neighbours have much the same colour
_CROWD = 60  # curves of a panel from which on they are drawn finer
_LEGEND = 34  # letters of a name in a legend
_SWATCHES = 48  # steps of the scale that tells depth
# From the first layer to the last; each of them is readable on white and on near black.
_DEPTH = ("#3f74d6", "#1f9c93", "#7f9a2a", "#dd8a2e")


@dataclass(frozen=True)
class Look:
    """Colours and measures of a drawing; `width` in inches."""

    ink: str
    muted: str
    line: str
    accent: str
    pale: str
    back: str
    series: tuple[str, ...]
    width: float

    def colour(self, number: int) -> str:
        """The colour of a series; beyond the last they start anew."""
        return self.series[number % len(self.series)]


# Stand-ins that no drawing uses otherwise, and what they become in a page.
_VARIABLES = {
    "#010101": "var(--ink)",
    "#010102": "var(--muted)",
    "#010103": "var(--line)",
    "#010104": "var(--accent)",
    "#010105": "var(--pale)",
    "#010106": "var(--card)",
    "#010107": "var(--first)",
    "#010108": "var(--second)",
    "#010109": "var(--third)",
    "#01010a": "var(--fourth)",
    "#01010b": "var(--fifth)",
}
_STAND_INS = list(_VARIABLES)


def _in_a_page(width: float) -> Look:
    ink, muted, line, accent, pale, back, *series = _STAND_INS
    return Look(ink, muted, line, accent, pale, back, tuple(series), width)


WIDE, NARROW = _in_a_page(10.0), _in_a_page(3.9)
PRINTED = Look(
    "#1d2329", "#68717a", "#e3e5e2", "#0f7b6c", "#d3dbd9", "#ffffff",
    series=("#0f7b6c", "#7a6ff0", "#d1495b", "#b7791f", "#3f74d6"), width=10.0,
)  # fmt: skip


@contextlib.contextmanager
def settings(look: Look) -> Iterator[None]:
    """Inside, matplotlib has its defaults and this look, whatever the user has set."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",  # text stays text
                "svg.hashsalt": "fxprune",  # the same data, the same bytes
                "text.parse_math": False,  # a $ in a name is a $
                "text.usetex": False,
                "font.size": 10.0,
                "text.color": look.ink,
                "axes.edgecolor": look.line,
                "axes.labelcolor": look.muted,
                "axes.titlecolor": look.ink,
                "axes.titlelocation": "left",
                "axes.titlesize": 10.5,
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.spines.left": False,
                "axes.unicode_minus": False,
                "axes.axisbelow": True,
                "xtick.color": look.line,
                "ytick.color": look.line,
                "xtick.labelcolor": look.muted,
                "ytick.labelcolor": look.muted,
                "xtick.major.size": 0.0,
                "ytick.major.size": 0.0,
                "grid.color": look.line,
                "grid.linewidth": 0.8,
                "legend.frameon": True,
                "legend.facecolor": look.back,
                "legend.edgecolor": look.back,
                "legend.framealpha": 0.85,
                "legend.fontsize": 9.0,
                "figure.facecolor": look.back,
                "axes.facecolor": "none",
                "lines.solid_capstyle": "round",
            }
        )
        yield


def svg(figure: Figure, name: str, about: str) -> str:
    """The figure as an `<svg>` element that can stand beside others in a page.

    name: unique in the page. about: what a screen reader says. Groups whose id is a title (see
    `titled`) show it under the pointer.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = StringIO()
    FigureCanvasSVG(figure)
    nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the browser has its own fonts
        figure.savefig(out, format="svg", transparent=True, metadata=nothing)
    text = out.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, rest = text.split(">", 1)
    head = re.sub(r' xmlns(:\w+)?="[^"]*"', "", head)
    text = f'{head} role="img" aria-label="{escape(about)}">{rest}'
    text = text.replace("xlink:href=", "href=")
    # Ids are unique in a page: give each drawing its own.
    text = re.sub(r'(<[^<>]*\s)id="', rf'\1id="{name}-', text)
    text = re.sub(r'(<[^<>]*\shref="#)', rf"\1{name}-", text)
    text = text.replace("url(#", f"url(#{name}-")
    for stand_in, variable in _VARIABLES.items():
        text = text.replace(stand_in, variable)
    titles: Mapping[str, str] = getattr(figure, "_fxprune_titles", {})
    for key, title in titles.items():
        opening = f'<g id="{name}-{key}">'
        text = text.replace(opening, f"{opening}<title>{escape(title)}</title>")
    return text


def _titled(axes: Axes, artist: Any, title: str) -> None:
    """Let a page show `title` where the pointer meets the artist."""
    titles = axes.figure.__dict__.setdefault("_fxprune_titles", {})
    key = f"about-{len(titles)}"
    artist.set_gid(key)
    titles[key] = title


def _figure(look: Look, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(look.width, height), layout="constrained")


# ---- a report -----------------------------------------------------------------------------------


def draw_stages(stages: Mapping[str, float], look: Look) -> Figure:
    """A point per stage, joined, with its value at it."""
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    names, values = list(stages), list(stages.values())
    shares, score = are_shares(values), scorer(values)
    finite = [v for v in values if math.isfinite(v)] or [0.0]
    figure = _figure(look, 2.7)
    axes = figure.subplots()
    places = list(range(len(values)))
    axes.plot(places, values, color=look.accent, linewidth=2, marker="o", markersize=7)
    low, high = min(finite), max(finite)
    least = 0.05 if shares else 0.01 * abs(high)  # a difference of nothing must not fill the plot
    spread = max(high - low, least) or 1.0
    room = 72 * look.width / max(len(values), 1)  # points that a label may take
    for i, value in enumerate(values):
        if math.isfinite(value) and (room > 38 or i in (0, len(values) - 1)):
            # Below a valley, above anything else: never on the line.
            valley = 0 < i < len(values) - 1 and values[i - 1] > value < values[i + 1]
            axes.annotate(
                score(value),
                (i, value),
                xytext=(0, -11 if valley else 9),
                textcoords="offset points",
                ha="center",
                va="top" if valley else "bottom",
            )
    size = 10 if look.width > 6 else 9
    letters = int(room / (0.645 * size))
    if letters >= 8:
        axes.set_xticks(places, [_wrapped(short(name, 28), letters) for name in names])
    else:
        ends = sorted({0, len(names) - 1})
        axes.set_xticks(ends, [short(names[i], 18) for i in ends])
        axes.get_xticklabels()[0].set_horizontalalignment("left")
        axes.get_xticklabels()[-1].set_horizontalalignment("right")
    axes.tick_params(axis="x", labelcolor=look.ink, labelsize=size)
    axes.set_xlim(-0.4, len(values) - 0.6)
    bottom, top = high - 1.25 * spread, high + 0.22 * spread
    ticks = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(bottom, top)
    if shares:
        bottom = max(bottom, -0.12)
        ticks = [t for t in ticks if -1e-9 <= t <= 1 + 1e-9]
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    axes.set_yticks([t for t in ticks if bottom <= t <= top])
    axes.set_ylim(bottom, top)
    axes.grid(axis="y")
    return figure


def _wrapped(text: str, letters: int) -> str:
    """At most two lines, broken at a space where that helps."""
    if len(text) <= letters or " " not in text:
        return text if len(text) <= letters else short(text, max(letters - 2, 8))
    spaces = [i for i, c in enumerate(text) if c == " "]
    middle = min(spaces, key=lambda i: abs(i - len(text) / 2))
    return f"{short(text[:middle], letters)}\n{short(text[middle + 1 :], letters)}"


def draw_profile(layers: Sequence[LayerRow], look: Look) -> Figure:
    """The network from its input to its output: channels and multiply-adds of every layer.

    A bar per layer, pale as it was and in colour what is left; parts of the network are marked.
    """
    figure = _figure(look, 4.3 if look.width > 6 else 4.0)
    panels = figure.subplots(2, 1, sharex=True)
    wide = 0.82 if len(layers) <= 90 else 1.0
    for axes, what, title in zip(
        panels, ("channels", "macs"), ("Channels", "MACs per sample"), strict=True
    ):
        before = [getattr(row, f"{what}_before") for row in layers]
        after = [getattr(row, f"{what}_after") for row in layers]
        axes.add_patch(_bars(before, wide, look.pale))
        axes.add_patch(_bars(after, wide, look.accent))
        write = str if what == "channels" else si
        _fit_heights(axes, [max(pair) for pair in zip(before, after, strict=True)], look, write)
        axes.set_title(title)
        axes.yaxis.set_major_locator(_locator(3))
        axes.yaxis.set_major_formatter(lambda value, _: _tick(value))
        axes.grid(axis="y")
    panels[-1].set_xlim(-0.7, len(layers) - 0.3)
    _mark_parts(panels, layers, look)
    return figure


def _fit_heights(
    axes: Axes, heights: Sequence[int], look: Look, write: Callable[[int], str]
) -> None:
    """Up to the highest bar; where a few tower over all others, these are cut off and told."""
    usual = sorted(heights)[int(0.97 * (len(heights) - 1))]
    if len(heights) < _MANY or max(heights) <= 2.5 * usual or not usual:
        axes.set_ylim(0, 1.06 * max([*heights, 1]))
        return
    axes.set_ylim(0, 1.6 * usual)
    end = -math.inf
    letter = len(heights) / (72 * look.width - 60) * 5.6  # bars that a letter is wide
    for i, height in enumerate(heights):
        text = f"{write(height)} ↑"
        if height > 1.6 * usual and i - len(text) * letter > end:
            axes.annotate(
                text,
                (i - 0.6, 1.6 * usual),
                xytext=(0, -1),
                textcoords="offset points",
                ha="right",
                va="top",
                fontsize=8.5,
                color=look.muted,
                annotation_clip=False,
            )
            end = i


def _locator(most: int) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, steps=[1, 2, 5, 10])


def _tick(value: float) -> str:
    """An axis label: 2500000 -> "2.5 M"."""
    for size, suffix in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e4, " k")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == ' k' else size):g}{suffix}"
    return f"{value:g}"


def _bars(heights: Sequence[float], width: float, colour: str) -> Any:
    """Bars at 0, 1, ... as one patch: hundreds of them stay a small drawing."""
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    vertices: list[tuple[float, float]] = []
    codes: list[Any] = []
    for i, height in enumerate(heights):
        left, right = i - width / 2, i + width / 2
        vertices += [(left, 0), (left, height), (right, height), (right, 0), (left, 0)]
        codes += [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]
    return PathPatch(Path(vertices, codes), facecolor=colour, linewidth=0)


def _mark_parts(panels: Sequence[Axes], layers: Sequence[LayerRow], look: Look) -> None:
    """The names of the network's parts under their bars, as far as there is room for them."""
    places, edges = {}, []
    index = {id(row): i for i, row in enumerate(layers)}
    for block in blocks(layers):
        numbers = [index[id(row)] for row in block.layers]
        places[block.name] = (min(numbers) + max(numbers)) / 2, max(numbers) - min(numbers) + 1
        edges.append(min(numbers) - 0.5)
    letter = len(layers) / (72 * look.width - 60) * 5.6  # layers that a letter is wide
    ticks: list[tuple[float, float]] = []
    labels = []
    for name, (middle, _) in sorted(places.items(), key=lambda item: -item[1][1]):
        leaf = name.rpartition(".")[2]
        text = short(name if leaf.isdigit() else leaf, 18)
        half = letter * (len(text) + 1.5) / 2
        middle = max(min(middle, len(layers) - 0.3 - half), half - 0.7)  # inside the axes
        if all(abs(middle - other) >= half + width for other, width in ticks):
            ticks.append((middle, half))
            labels.append(text)
    axes = panels[-1]
    axes.set_xticks([place for place, _ in ticks], labels)
    axes.tick_params(axis="x", labelcolor=look.ink, pad=5)
    if 1 < len(edges) < max(len(layers) / 2, 3):
        for panel in panels:
            for edge, last in zip(edges[1:], edges, strict=False):
                if edge - last < 2 * letter and len(layers) >= _MANY:
                    continue  # a part of one or two layers: its neighbours' lines are enough
                panel.axvline(edge, color=look.line, linewidth=0.8, zorder=0)
    for panel in panels[:-1]:
        panel.tick_params(axis="x", labelbottom=False)


# ---- a scan of sensitivity ----------------------------------------------------------------------


def draw_curves(baseline: float, curves: Sequence[Curve], drop: float, look: Look) -> Figure:
    """A panel per method with the curves of all groups, coloured from the first to the last."""
    methods = list(dict.fromkeys(c.method for c in curves))
    across = min(len(methods), 3) if look.width > 6 else 1
    down = math.ceil(len(methods) / across)
    height = 4.4 if across == 1 and look.width > 6 else 4.0
    figure = _figure(look, down * height + 0.55)
    panels = figure.subplots(down, across, sharey=True, squeeze=False)
    _fill_panels(list(panels.flat), baseline, curves, drop, look)
    _depth_scale(figure, look)
    return figure


def _fill_panels(
    panels: Sequence[Axes],
    baseline: float,
    curves: Sequence[Curve],
    drop: float,
    look: Look,
) -> None:
    """One method per panel; panels that are left over are hidden."""
    methods = list(dict.fromkeys(c.method for c in curves))
    names = list(dict.fromkeys(c.name for c in curves))
    shades = _shades(len(names))
    write = scorer(_scores(baseline, curves))
    marks: dict[str, str] = {}  # a name has one mark in all panels
    for axes, method in zip(panels, methods, strict=False):
        own = [c for c in curves if c.method == method]
        named = sorted(own, key=_mean_score)[:_NAMED] if len(own) > 1 else own
        lines: dict[str, Any] = {}
        for curve in own:
            x, y = _points(baseline, curve)
            chosen = curve in named
            (line,) = axes.plot(
                x,
                y,
                color=shades[names.index(curve.name)],
                linewidth=2.0 if chosen else 1.2 if len(own) <= _CROWD else 0.8,
                alpha=1.0 if chosen else 0.6 if len(own) <= _CROWD else 0.45,
                zorder=3 if chosen else 2,
                marker=marks.setdefault(curve.name, _MARKERS[len(marks) % len(_MARKERS)])
                if chosen
                else None,
                markersize=4.5,
            )
            lines[curve.name] = line
            _titled(axes, line, f"{short(curve.name, 200)}, {counted(curve.channels, 'channel')}")
        tolerated = axes.axhline(
            baseline - drop, color=look.muted, linewidth=1, linestyle=(0, (4, 3)), zorder=4
        )
        _frame(axes, baseline, curves, drop)
        axes.set_title(short(method, 40))
        legend = axes.legend(
            [*(lines[c.name] for c in named), tolerated],
            [*(_label(c.name) for c in named), f"tolerated: {write(baseline - drop)}"],
            loc="upper left",
            bbox_to_anchor=(0, -0.16),
            ncols=3 if look.width > 6 and len(methods) == 1 else 1,
            title="most sensitive" if len(own) > 1 else None,
            alignment="left",
            borderaxespad=0.6,
            handlelength=1.6,
        )
        legend.get_title().set(fontsize=8.5, color=look.muted)
    for axes in panels[len(methods) :]:
        axes.set_visible(False)


def draw_comparison(baseline: float, curves: Sequence[Curve], drop: float, look: Look) -> Figure:
    """The methods beside each other: the mean over all groups, and the middle half of them."""
    figure = _figure(look, 3.6)
    _compare(figure.subplots(), baseline, curves, drop, look)
    return figure


def _compare(axes: Axes, baseline: float, curves: Sequence[Curve], drop: float, look: Look) -> None:
    seen: list[float] = []
    lines = []
    methods = list(dict.fromkeys(c.method for c in curves))
    for i, method in enumerate(methods):
        ratios, mean, low, high = [0.0], [baseline], [baseline], [baseline]
        for ratio, scores in _by_ratio(curves, method).items():
            quarter = quantiles(scores, n=4, method="inclusive") if len(scores) > 1 else scores * 3
            ratios.append(ratio)
            mean.append(fmean(scores))
            low.append(quarter[0])
            high.append(quarter[-1])
        colour = look.colour(i)
        axes.fill_between(ratios, low, high, color=colour, alpha=0.16, linewidth=0)
        (line,) = axes.plot(ratios, mean, color=colour, linewidth=2.4, marker="o", markersize=4)
        _titled(axes, line, short(method, 200))
        lines.append(line)
        seen += [*low, *mean, *high]  # a mean can lie below the middle half
    _frame(axes, baseline, curves, drop, seen)
    axes.legend(
        lines,
        [_label(method) for method in methods],
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=3 if look.width > 6 else 1,
        borderaxespad=0.2,
    )


def draw_scan(
    *,
    title: str,
    baseline: float,
    curves: Sequence[Curve],
    drop: float,
    look: Look = PRINTED,
) -> Figure:
    """Curves of every method, and below them the methods beside each other, in one figure."""
    methods = list(dict.fromkeys(c.method for c in curves))
    across = min(max(len(methods), 1), 3)
    down = math.ceil(max(len(methods), 1) / across)
    both = len(methods) > 1
    figure = _figure(look, 4.2 * down + (3.4 if both else 0.2) + 0.7)
    figure.suptitle(short(title, 90), x=0.01, ha="left", fontsize=12, fontweight="bold")
    rows = [[f"{r}.{c}" for c in range(across)] for r in range(down)]
    whole = [["compare"] * across] if both else []
    panels: dict[str, Axes] = figure.subplot_mosaic([*rows, *whole])
    _fill_panels(
        [panels[key] for row in rows for key in row],
        baseline,
        curves,
        drop,
        look,
    )
    if both:
        _compare(panels["compare"], baseline, curves, drop, look)
        panels["compare"].set_title("mean over the groups, and the middle half of them", pad=24)
    _depth_scale(figure, look)
    return figure


def _label(name: str) -> str:
    """A name in a legend, which leaves out labels that begin with an underscore."""
    text = short(name, _LEGEND)
    return f"\N{HAIR SPACE}{text}" if text.startswith("_") else text


def _scores(baseline: float, curves: Sequence[Curve]) -> list[float]:
    return [baseline, *(p.score for c in curves for p in c.points)]


def _mean_score(curve: Curve) -> float:
    """How well a network bears the cuts of a curve; the lower, the more sensitive."""
    return fmean([p.score for p in curve.points if math.isfinite(p.score)] or [math.inf])


def _points(baseline: float, curve: Curve) -> tuple[list[float], list[float]]:
    """Shares and scores of a curve, from the whole network on."""
    points = sorted(curve.points, key=lambda p: p.ratio)
    return [0.0, *(p.ratio for p in points)], [baseline, *(p.score for p in points)]


def _by_ratio(curves: Sequence[Curve], method: str) -> dict[float, list[float]]:
    """The finite scores of a method's curves at each share, shares ascending."""
    found: dict[float, list[float]] = {}
    for point in (p for c in curves if c.method == method for p in c.points):
        if math.isfinite(point.score):
            found.setdefault(round(point.ratio, 9), []).append(point.score)
    return dict(sorted(found.items()))


def _frame(
    axes: Axes,
    baseline: float,
    curves: Sequence[Curve],
    drop: float,
    shown: Sequence[float] = (),
) -> None:
    """Axes that all panels share; shown: what is drawn in this one, where not all scores are."""
    from matplotlib.ticker import PercentFormatter

    drawn = [*(shown or _scores(baseline, curves)), baseline - drop]
    scores = [s for s in drawn if math.isfinite(s)] or [0.0]
    low, high = min(scores), max(scores)
    spread = (high - low) or 0.1 * abs(high) or 1.0
    if are_shares(scores):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    axes.yaxis.set_major_locator(_locator(6))
    axes.set_ylim(low - 0.05 * spread, high + 0.05 * spread)
    most = max((p.ratio for c in curves for p in c.points), default=1.0)
    axes.set_xlim(0, most)
    axes.xaxis.set_major_locator(_locator(5))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    axes.set_xlabel("share of channels removed")
    axes.grid(axis="y")


def _shades(count: int) -> list[Any]:
    """A colour per layer, from the first to the last."""
    from matplotlib.colors import LinearSegmentedColormap, to_hex

    scale = LinearSegmentedColormap.from_list("depth", _DEPTH)
    return [to_hex(scale(i / max(count - 1, 1))) for i in range(count)]


def _depth_scale(figure: Figure, look: Look) -> None:
    """The scale of colours, in a strip at the foot of the figure."""
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    strip = figure.add_axes((0.3, 0.0, 0.4, 0.1))
    strip.set_in_layout(False)
    height = 0.11 / figure.get_figheight()
    strip.set_position((0.36, 0.1 / figure.get_figheight(), 0.28, height))
    for i, shade in enumerate(_shades(_SWATCHES)):
        strip.axvspan(i, i + 2, color=shade, linewidth=0)
    strip.set_xlim(0, _SWATCHES)
    strip.set_axis_off()
    for x, text, side in ((-0.02, "first layer", "right"), (1.02, "last layer", "left")):
        strip.text(
            x, 0.5, text, transform=strip.transAxes, ha=side, va="center",
            fontsize=9, color=look.muted,
        )  # fmt: skip
    engine = figure.get_layout_engine()
    foot = 0.34 / figure.get_figheight()
    assert isinstance(engine, ConstrainedLayoutEngine)
    engine.set(rect=(0, foot, 1, 1 - foot))
