"""The groups of a network as a drawing: an SVG, by its own layout.

Promise: a row per layer that makes channels, from top to bottom in the order of computation. A
group is a box beside its first layer; further layers that make its channels are smaller boxes, tied
together by a bar. An arrow into a box tells which group the layer reads. Boxes never overlap, texts
stay inside; light and dark; no script, nothing fetched; the same graph, the same bytes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from itertools import pairwise
from typing import Any

import networkx as nx

from fxprune.views.page import write_text
from fxprune.views.words import clean, counted, short

_MARGIN = 28.0
_TOP = 142.0  # title and legend
_LEGEND = 500.0  # the least width: the legend takes it
_BOX, _PORT, _LINE = 28.0, 22.0, 15.0  # heights: a group, a further layer, a line of a reason
_GAP = 13.0  # between two rows
_WIDE = 300.0  # the least width of a group's box
_LANE, _BAR = 36.0, 22.0  # from bar to bar, and how broad one is
_TRACK = 9.0  # from wire to wire
_SPACE = 38.0  # room for arrows beside the boxes
_PAD = 12.0  # inside a box, beside the text
_NAME, _DETAIL = 7.5, 6.9  # the widest a letter of each size may be in any usual font
_TOLD, _TITLE = 7.0, 12.0  # the same of the legend and of the title
_MOST = 42  # cells of a name
_REASON = 3  # lines of a reason
_COUNTED = {"heads": "head", "head-dims": "head dim", "experts": "expert"}  # kinds by their units
_SAID = ("embedding", "mlp")  # kinds that no colour tells
_AGAIN = 720.0  # a long bar repeats its name after so much
_LISTED = 12  # tensors that a tooltip names


@dataclass(frozen=True)
class Box:
    """A layer's box. role: "group" (the first layer of one), "port" (a further one), "frozen"."""

    node: str
    layer: str
    role: str
    x: float
    y: float
    width: float
    height: float
    label: str
    detail: str
    lines: tuple[str, ...] = ()

    @property
    def middle(self) -> float:
        """The height at which wires meet it."""
        return self.y + min(self.height, _BOX) / 2

    @property
    def right(self) -> float:
        """Its right edge."""
        return self.x + self.width


@dataclass(frozen=True)
class Bar:
    """What ties the layers of a group together; labels: where along it (y) its name is written."""

    node: str
    x: float
    top: float
    bottom: float
    label: str = ""
    labels: tuple[float, ...] = ()


@dataclass(frozen=True)
class Wire:
    """A line from a group to a layer: corners, and whether it ends in an arrow and in a dot."""

    node: str
    points: tuple[tuple[float, float], ...]
    arrow: bool = False
    dot: bool = False


@dataclass
class Layout:
    """Where everything is."""

    width: float = 0.0
    height: float = 0.0
    boxes: list[Box] = field(default_factory=list)
    bars: list[Bar] = field(default_factory=list)
    wires: list[Wire] = field(default_factory=list)


def write_coupling(graph: nx.DiGraph, path: str | os.PathLike[str], title: str = "") -> None:
    """Draw a graph of `Analysis.coupling()` into a file; OSError where it cannot be written."""
    write_text(path, draw_coupling(graph, title))


def draw_coupling(graph: nx.DiGraph, title: str = "") -> str:
    """The drawing of a graph of `Analysis.coupling()` as SVG."""
    plan = lay_out(graph)
    kinds = {name: _class(values) for name, values in graph.nodes(data=True)}
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_n(plan.width)} {_n(plan.height)}" '
        f'width="{_n(plan.width)}" height="{_n(plan.height)}" role="img">',
        f"<title>{_text(_heading(title))}</title>",
        f"<style>{_STYLE}</style>",
        '<rect class="page" width="100%" height="100%"/>',
        *_head(graph, title, int((plan.width - 2 * _MARGIN) / _TITLE)),
        *(_bar(bar, kinds[bar.node]) for bar in plan.bars),
        *_wires(plan.wires, kinds),
        *(_box(box, graph.nodes[box.node]) for box in plan.boxes),
        "</svg>\n",
    ]
    return "\n".join(parts)


# ---- layout -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """A layer that makes channels of a node; reads: the groups that it takes in."""

    node: str
    layer: str
    first: bool
    reads: tuple[str, ...]


def lay_out(graph: nx.DiGraph) -> Layout:
    """Places of the boxes, bars and wires of a graph of `Analysis.coupling()`."""
    rows = _rows(graph)
    made, read = _places(rows)
    barred = [
        n for n, at in made.items() if len(at) > 1 or any(r <= at[0] for r in read.get(n, ()))
    ]
    spans = {n: (min([*made[n], *read.get(n, ())]), max(made[n])) for n in barred}
    lanes = _lanes(graph, spans)
    late = {n: [r for r in read.get(n, ()) if r > spans[n][1]] for n in barred}
    left = _tracks({n: (spans[n][1], max(at)) for n, at in late.items() if at})
    far = {n: [r for r in read.get(n, ()) if r > made[n][0] + 1] for n in made if n not in spans}
    right = _tracks({n: (made[n][0], max(at)) for n, at in far.items() if at})

    bars_x = {n: _MARGIN + lane * _LANE for n, lane in lanes.items()}
    end = _MARGIN + _LANE * (max(lanes.values(), default=-1) + 1)
    end += _TRACK * (max(left.values(), default=-1) + 1)
    left_x = {n: end - _TRACK * t for n, t in left.items()}
    boxes = _boxes(graph, rows, end + (_SPACE if lanes else 0.0))
    edge = max((b.right for b in boxes), default=end)
    right_x = {n: edge + _SPACE * 0.6 + _TRACK * t for n, t in right.items()}
    plan = Layout(boxes=boxes)
    plan.width = max(max(right_x.values(), default=edge) + _MARGIN, _LEGEND)
    plan.height = max((b.y + b.height for b in boxes), default=_TOP) + _MARGIN
    for name, (top, bottom) in spans.items():
        low = boxes[bottom].y + boxes[bottom].height + _GAP / 2
        high = boxes[top].middle if any(s in spans for s in rows[top].reads) else boxes[top].y
        plan.bars.append(Bar(name, bars_x[name], high, low))
    plan.wires = list(_routes(rows, boxes, made, plan.bars, left_x, right_x))
    plan.bars = [_labelled(b, plan.wires, _details(graph.nodes[b.node])) for b in plan.bars]
    return plan


def _rows(graph: nx.DiGraph) -> list[_Row]:
    """The layers of all nodes in the order of computation."""
    found = []
    place = {name: i for i, name in enumerate(graph)}
    for number, (name, values) in enumerate(graph.nodes(data=True)):
        for i, (layer, step) in enumerate(zip(values["producers"], values["steps"], strict=True)):
            reads = [s for s, _, ls in graph.in_edges(name, data="layers") if layer in ls]
            reads.sort(key=place.__getitem__)
            found.append((step, number, _Row(name, layer, not i, tuple(reads))))
    return [row for _, _, row in sorted(found, key=lambda item: item[:2])]


def _places(rows: Sequence[_Row]) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """By node, the rows that make its channels, and those that read them."""
    made: dict[str, list[int]] = {}
    read: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        made.setdefault(row.node, []).append(i)
        for source in row.reads:
            read.setdefault(source, []).append(i)
    return made, read


def _lanes(graph: nx.DiGraph, spans: dict[str, tuple[int, int]]) -> dict[str, int]:
    """A lane per bar; those of additions come first, and the longest of them outermost."""
    lanes: dict[str, int] = {}
    for residual in (True, False):
        some = {n: s for n, s in spans.items() if graph.nodes[n]["residual"] is residual}
        start = max(lanes.values(), default=-1) + 1
        for name, lane in _fitted(some, lambda span: span[0] - span[1]).items():
            lanes[name] = start + lane
    return lanes


def _tracks(spans: dict[str, tuple[int, int]]) -> dict[str, int]:
    """A track per wire; the shortest are nearest."""
    return _fitted(spans, lambda span: span[1] - span[0])


def _fitted(
    spans: dict[str, tuple[int, int]], rank: Callable[[tuple[int, int]], int]
) -> dict[str, int]:
    """Each into the first place in which no other overlaps it, in the order of `rank`."""
    taken: list[list[tuple[int, int]]] = []
    found: dict[str, int] = {}
    for name, (low, high) in sorted(spans.items(), key=lambda item: (rank(item[1]), item[1])):
        fits = (all(high < a or b < low for a, b in place) for place in taken)
        place = next((i for i, free in enumerate(fits) if free), len(taken))
        if place == len(taken):
            taken.append([])
        taken[place].append((low, high))
        found[name] = place
    return found


def _boxes(graph: nx.DiGraph, rows: Sequence[_Row], x: float) -> list[Box]:
    """A box per row, below each other; those of groups are equally wide."""
    from rich.cells import cell_len

    texts = []
    for row in rows:
        values = graph.nodes[row.node]
        name = row.layer if not row.first or values["frozen"] is not None else row.node
        detail = " · ".join(_details(values)) if row.first else ""
        texts.append((short(name, _MOST), detail))
    wide = (
        max(
            (_NAME * cell_len(a) + _DETAIL * cell_len(b) + 24.0 * bool(b) for a, b in texts),
            default=0.0,
        )
        + 2 * _PAD
    )
    wide = max(wide, _WIDE)
    boxes, y = [], _TOP
    for row, (label, detail) in zip(rows, texts, strict=True):
        why = graph.nodes[row.node]["frozen"]
        lines = _wrapped(why, int((wide - 2 * _PAD) / _DETAIL)) if why and row.first else ()
        role = "frozen" if why is not None else "group" if row.first else "port"
        height = _PORT if role == "port" else _BOX + _LINE * len(lines) + 5.0 * bool(lines)
        width = _NAME * cell_len(label) + 2 * _PAD if role == "port" else wide
        boxes.append(Box(row.node, row.layer, role, x, y, width, height, label, detail, lines))
        y += height + _GAP
    return boxes


def _routes(
    rows: Sequence[_Row],
    boxes: Sequence[Box],
    made: dict[str, list[int]],
    bars: Sequence[Bar],
    left: dict[str, float],
    right: dict[str, float],
) -> Iterator[Wire]:
    """The wires: from groups to the layers that read them, from layers to the bars of their groups."""
    bar_of = {bar.node: bar for bar in bars}
    leaving: dict[str, list[float]] = {}
    last = {source: i for i, row in enumerate(rows) for source in row.reads}
    for i, (row, box) in enumerate(zip(rows, boxes, strict=True)):
        writes = bar_of.get(row.node)
        at_left = [s for s in row.reads if s in bar_of]
        apart = 5.0 if writes and at_left else 0.0
        if writes:
            ends = ((box.x, box.middle + apart), (writes.x + _BAR, box.middle + apart))
            yield Wire(row.node, ends, arrow=True)
        for source in at_left:
            bar, y = bar_of[source], box.middle - apart
            within = boxes[min(i, made[source][-1])] is box
            x = bar.x + _BAR if within else left[source]
            if not within:
                leaving.setdefault(source, []).append(y)
            corner = source == min(at_left, key=lambda s: left.get(s, 0.0)) and i == last[source]
            yield Wire(source, ((x, y), (box.x, y)), arrow=True, dot=not within and not corner)
        beside = [s for s in row.reads if s not in bar_of]
        far = [s for s in beside if made[s][0] + 1 < i]
        for source in beside:
            if source not in far:
                before, x = boxes[i - 1], box.x + 2 * _PAD
                yield Wire(source, ((x, before.y + before.height), (x, box.y)), arrow=True)
        y = box.middle - (5.0 if row.node in right and far else 0.0)
        for k, source in enumerate(sorted(far, key=lambda s: -right[s])):
            leaving.setdefault(source, []).append(y)
            corner = not k and i == last[source]
            yield Wire(source, ((right[source], y), (box.right, y)), arrow=True, dot=not corner)
        if row.node in right:
            y = box.middle + (5.0 if far else 0.0)
            leaving.setdefault(row.node, []).insert(0, y)
            yield Wire(row.node, ((box.right, y), (right[row.node], y)))
    for source, ys in leaving.items():
        if source in bar_of:
            bar, x = bar_of[source], left[source]
            corners = ((bar.x + _BAR, bar.bottom - 2.0), (x, bar.bottom - 2.0), (x, ys[-1]))
            yield Wire(source, corners)
        else:
            yield Wire(source, ((right[source], ys[0]), (right[source], ys[-1])))


def _labelled(bar: Bar, wires: Iterable[Wire], details: Sequence[str]) -> Bar:
    """The bar with as much of its name as it has room for, wherever no wire crosses it."""
    crossed = sorted(
        y
        for wire in wires
        for (a, y), (b, z) in pairwise(wire.points)
        if y == z and bar.top < y < bar.bottom and min(a, b) < bar.x and max(a, b) > bar.x + _BAR
    )
    name = short(bar.node, _MOST)
    for label in (" · ".join([name, *details]), name, details[0]):
        if labels := _windows([bar.top, *crossed, bar.bottom], _length(label)):
            return replace(bar, label=label, labels=labels)
    return bar


def _length(label: str) -> float:
    """What a label takes along a bar."""
    from rich.cells import cell_len

    return _DETAIL * cell_len(label) + 14.0


def _windows(ends: Sequence[float], need: float) -> tuple[float, ...]:
    """Middles of pieces that are `need` long, between ends, from the first on in wide steps."""
    found: list[float] = []
    free = ends[0]
    for low, high in pairwise(ends):
        at = max(low, free)
        while at + need <= high:
            found.append(at + need / 2)
            free = at = at + max(need, _AGAIN)
    return tuple(found)


def _wrapped(text: str, cells: int) -> tuple[str, ...]:
    """A text in at most `_REASON` lines of so many cells."""
    from rich.cells import cell_len

    lines: list[str] = []
    for word in clean(text).split():
        word = short(_end_of_path(word, cells), cells)
        if lines and cell_len(lines[-1]) + 1 + cell_len(word) <= cells:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    if len(lines) > _REASON:
        rest = " ".join(lines[_REASON - 1 :])
        lines = [*lines[: _REASON - 1], short(rest, cells)]
    return tuple(lines)


def _end_of_path(word: str, cells: int) -> str:
    """A long path of a file without its first folders: what tells is the end."""
    start = "(…" if word.startswith("(") else "…"
    while len(word) > cells and "/" in word[3:]:
        word = start + word[word.index("/", 3) :]
    return word


def _details(values: dict[str, Any]) -> list[str]:
    """How wide a group is and how many layers it ties: ["256 ch", "8 layers"]."""
    width, units, free = values["width"], values["units"], values["free"]
    if values["frozen"] is not None:
        return [f"{width} ch"]
    layers = {member.rpartition(".")[0] or member for member in values["members"]}
    parts = [f"{free} of {width} ch" if free < width else f"{width} ch"]
    kind = values["kind"]
    if kind in _COUNTED:
        parts.insert(0, counted(units, _COUNTED[kind]))
    elif units != free:
        parts.insert(0, counted(units, "unit"))
    if kind in _SAID:
        parts.insert(0, kind)
    return [*parts, *[counted(len(layers), "layer")] * (len(layers) > 1)]


# ---- drawing ------------------------------------------------------------------------------------

_STYLE = """
svg { background: #fbfbf9; }
.page { fill: #fbfbf9; }
text { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #1d2329; }
.name { font-weight: 600; }
.small { font-size: 11px; fill: #56606a; }
.title { font: 600 19px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; }
.told { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif; fill: #56606a; }
.mid { text-anchor: middle; }
.end { text-anchor: end; }
.wire { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.halo { fill: none; stroke: #fbfbf9; stroke-width: 6; }
.group .shape, .bar { stroke-width: 1.4; }
.port .shape { stroke-width: 1; }
.frozen .shape { stroke-width: 1.4; stroke-dasharray: 5 3; }
.residual .shape, .bar.residual { fill: #dbe8fa; stroke: #2463b4; }
.free .shape, .bar.free { fill: #fdeccb; stroke: #b26a00; }
.frozen .shape { fill: #eeefec; stroke: #68717a; }
.port .shape { fill: #fbfbf9; }
.wire.residual { stroke: #2463b4; } .tip.residual { fill: #2463b4; }
.wire.free { stroke: #b26a00; } .tip.free { fill: #b26a00; }
.wire.frozen { stroke: #68717a; } .tip.frozen { fill: #68717a; }
@media (prefers-color-scheme: dark) {
  svg { background: #14171a; }
  .page { fill: #14171a; } .halo { stroke: #14171a; }
  text { fill: #e6e9eb; } .small, .told { fill: #a5afb8; }
  .residual .shape, .bar.residual { fill: #1b3350; stroke: #74acf5; }
  .free .shape, .bar.free { fill: #43300f; stroke: #e8ac4a; }
  .frozen .shape { fill: #23282d; stroke: #9aa4ad; }
  .port .shape { fill: #14171a; }
  .wire.residual { stroke: #74acf5; } .tip.residual { fill: #74acf5; }
  .wire.free { stroke: #e8ac4a; } .tip.free { fill: #e8ac4a; }
  .wire.frozen { stroke: #9aa4ad; } .tip.frozen { fill: #9aa4ad; }
}
"""


def _class(values: dict[str, Any]) -> str:
    """The colour of a node."""
    if values["frozen"] is not None:
        return "frozen"
    return "residual" if values["residual"] else "free"


def _n(number: float) -> str:
    """A coordinate, in as few letters as it takes."""
    return f"{round(number, 2):g}"


def _text(text: str) -> str:
    return escape(clean(text))


def _heading(title: str) -> str:
    return f"Coupled channels of {title}" if title else "Coupled channels"


def _head(graph: nx.DiGraph, title: str, cells: int) -> Iterator[str]:
    """What is drawn, in numbers, and the legend; cells: how long the title may be."""
    groups = [v for _, v in graph.nodes(data=True) if v["frozen"] is None]
    residual = sum(v["residual"] for v in groups)
    told = [counted(len(groups), "group")]
    told += [f"{residual:,} coupled by additions"] * bool(residual)
    told += [f"{sum(v['free'] for v in groups):,} channels may go"]
    heading = short(_heading(title), cells)
    yield f'<text class="title" x="{_n(_MARGIN)}" y="38">{escape(heading)}</text>'
    yield f'<text class="told" x="{_n(_MARGIN)}" y="59">{", ".join(told)}</text>'
    present = {_class(values) for _, values in graph.nodes(data=True)}
    several = next((_class(v) for _, v in graph.nodes(data=True) if len(v["producers"]) > 1), "")
    legend = [
        ("residual", "group", "group coupled by additions"),
        ("free", "group", "group" if "residual" not in present else "other group"),
        ("frozen", "frozen", "stays"),
        (several, "port", "one more layer of its group"),
        ("frozen", "", "is read by"),
    ]
    x, y = _MARGIN, 76.0
    for colour, role, name in legend:
        if colour not in present and role:
            continue
        width = _TOLD * len(name)
        if x + 32.0 + width > _LEGEND - _MARGIN:
            x, y = _MARGIN, y + 24.0
        if role:
            yield f'<g class="{role} {colour}">{_shape(role, x, y, 24, 14)}</g>'
        else:
            yield from _wires([Wire("", ((x, y + 7), (x + 24, y + 7)), arrow=True)], {"": colour})
        yield f'<text class="told" x="{_n(x + 32)}" y="{_n(y + 11.5)}">{name}</text>'
        x += 32.0 + width + 20.0


def _shape(role: str, x: float, y: float, width: float, height: float) -> str:
    """Round corners for what may go, cut ones for what stays."""
    if role != "frozen":
        return (
            f'<rect class="shape" x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" '
            f'height="{_n(height)}" rx="{4 if role == "group" else 8}"/>'
        )
    cut = min(7.0, height / 3)
    xs, ys = (x, x + cut, x + width - cut, x + width), (y, y + cut, y + height - cut, y + height)
    corners = [(1, 0), (2, 0), (3, 1), (3, 2), (2, 3), (1, 3), (0, 2), (0, 1)]
    points = " ".join(f"{_n(xs[i])},{_n(ys[j])}" for i, j in corners)
    return f'<polygon class="shape" points="{points}"/>'


def _box(box: Box, values: dict[str, Any]) -> str:
    colour = _class(values)
    y = box.middle + 4.2
    name = "" if box.role == "port" else ' class="name"'
    parts = [
        f'<g class="{box.role if box.role == colour else f"{box.role} {colour}"}" '
        f'data-group="{_text(box.node)}" data-layer="{_text(box.layer)}">',
        f"<title>{_text(_tooltip(box, values))}</title>",
        _shape(box.role, box.x, box.y, box.width, box.height),
        f'<text{name} x="{_n(box.x + _PAD)}" y="{_n(y)}">{escape(box.label)}</text>',
    ]
    if box.detail:
        right = box.right - _PAD
        parts.append(f'<text class="small end" x="{_n(right)}" y="{_n(y)}">{box.detail}</text>')
    for i, line in enumerate(box.lines):
        below = box.y + _BOX + _LINE * i + 8.0
        parts.append(f'<text class="small" x="{_n(box.x + _PAD)}" y="{_n(below)}">{escape(line)}</text>')  # fmt: skip
    return "".join([*parts, "</g>"])


def _tooltip(box: Box, values: dict[str, Any]) -> str:
    if values["frozen"] is not None:
        return f"{box.layer} stays: {values['frozen']}"
    if box.role == "port":
        return f"{box.layer} makes channels of {box.node}"
    members = values["members"]
    more = f" and {len(members) - _LISTED} more" if len(members) > _LISTED else ""
    told = ", ".join([box.node, *_details(values)])
    return f"{told}: {', '.join(members[:_LISTED])}{more}"


def _bar(bar: Bar, colour: str) -> str:
    parts = [
        f'<rect class="bar {colour}" x="{_n(bar.x)}" y="{_n(bar.top)}" width="{_n(_BAR)}" '
        f'height="{_n(bar.bottom - bar.top)}" rx="4"/>'
    ]
    for y in bar.labels:
        x = bar.x + _BAR / 2 + 4.0
        parts.append(
            f'<text class="small mid" transform="translate({_n(x)} {_n(y)}) rotate(-90)">'
            f"{escape(bar.label)}</text>"
        )
    return "".join(parts)


def _wires(wires: Sequence[Wire], colours: dict[str, str]) -> Iterator[str]:
    """Lines down first; those across go over them, with a gap beside; then dots and arrows."""
    upright = [w for w in wires if w.points[0][1] != w.points[-1][1]]
    across = [w for w in wires if w.points[0][1] == w.points[-1][1]]
    for wire in upright:
        yield _line(wire, f"wire {colours[wire.node]}")
    for wire in across:
        yield _line(wire, "halo", 5.0)
    for wire in across:
        yield _line(wire, f"wire {colours[wire.node]}")
    for wire in wires:
        if wire.dot:
            x, y = wire.points[0]
            yield f'<circle class="tip {colours[wire.node]}" cx="{_n(x)}" cy="{_n(y)}" r="3"/>'
        if wire.arrow:
            yield _tip(wire, colours[wire.node])


def _line(wire: Wire, look: str, inset: float = 0.0) -> str:
    """The line; inset: how much is left out at both ends."""
    points = list(wire.points)
    if inset:
        (a, y), (b, _) = points[0], points[-1]
        inset = inset if a < b else -inset
        points = [(a + inset, y), (b - inset, y)]
    path = "L".join(f"{_n(x)} {_n(y)}" for x, y in points)
    return f'<path class="{look}" d="M{path}"/>'


def _tip(wire: Wire, colour: str) -> str:
    """An arrow's head at the end of the wire."""
    (a, b), (x, y) = wire.points[-2:]
    dx, dy = (x > a) - (x < a), (y > b) - (y < b)
    corners = [(x, y), (x - 7 * dx - 4 * dy, y - 7 * dy - 4 * dx), (x - 7 * dx + 4 * dy, y - 7 * dy + 4 * dx)]  # fmt: skip
    points = " ".join(f"{_n(p)},{_n(q)}" for p, q in corners)
    return f'<polygon class="tip {colour}" points="{points}"/>'
