"""Reports, analyses and scans as tables for a terminal, in colour or as plain text.

Promise: no user's string is read as markup or moves the cursor; nothing is wider than the
terminal; streams that cannot show Unicode get ASCII; long networks get a screen, not a scroll.
"""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import StringIO
from statistics import fmean
from typing import TYPE_CHECKING

from fxprune.plan import Note
from fxprune.report import (
    AnalysisRow,
    Curve,
    GroupRow,
    LayerRow,
    Report,
    Scan,
    batches,
    blocks,
    costly,
    gain,
    groups_title,
    headline,
    reasons,
)
from fxprune.report import spans as spans_of
from fxprune.views.words import (
    are_shares,
    clean,
    counted,
    dropped,
    percent,
    scorer,
    short,
    si,
    some,
    timer,
)

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

_HEAD, _TAIL = 16, 6  # rows of a long table that the terminal shows
_FEW = 16  # layers up to which each of them has its line
_GAP = 3  # cells between two columns of a table in the terminal
_NAME = 48  # cells that the name of a group may take there
_BAR = 16
_MACS_FROM = 76  # columns of a terminal in which shares of the multiply-adds are told
_SPANS_FROM = 90  # columns of a terminal in which the modules of a group are told
_LEVELS, _LEVELS_ASCII = "▁▂▃▄▅▆▇█", "_.-=+*#@"  # a score from the worst to the best


def report_text(report: Report) -> str:
    """The report as plain text, as wide as the terminal."""
    return _as_text(lambda width, ascii_only: report_terminal(report, width, ascii_only))


def analysis_text(rows: Sequence[AnalysisRow], frozen: Mapping[str, str]) -> str:
    """What may be cut, and what may not (node -> why), as plain text as wide as the terminal."""
    return _as_text(lambda width, ascii_only: _analysis(rows, frozen, width, ascii_only))


def sensitivity_text(scan: Scan) -> str:
    """A scan as plain text, as wide as the terminal."""
    return _as_text(lambda width, ascii_only: sensitivity_terminal(scan, width, ascii_only))


class _Sink(StringIO):
    """Text in memory that tells rich which encoding it will be printed in."""

    def __init__(self, encoding: str) -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the stream that this text goes to."""
        return self._encoding


def _as_text(shown: Callable[[int, bool], Iterator[RenderableType]]) -> str:
    """What `shown(width, ascii_only)` yields, as plain text for stdout: no colour codes."""
    from rich.console import Console

    width = min(max(shutil.get_terminal_size((100, 24)).columns, 60), 120)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    ascii_only = not encoding.lower().startswith("utf")
    out = _Sink(encoding)
    console = Console(file=out, width=width, color_system=None, force_terminal=False, _environ={})
    for part in shown(width, ascii_only):
        console.print(part)
    text = "\n".join(line.rstrip() for line in out.getvalue().splitlines())
    return text.encode(encoding, "replace").decode(encoding) if ascii_only else text


# ---- parts that several tables share ------------------------------------------------------------


def _table(*columns: tuple[str, str]) -> Table:
    """A table without vertical lines; columns are (header, "left" | "right")."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
    for header, justify in columns:
        table.add_column(header, justify="left" if justify == "left" else "right", overflow="fold")
    return table


def _fixed(table: Table, widths: Sequence[int], ascii_only: bool) -> Table:
    """The table with columns of these widths, in which nothing is folded."""
    for column, width in zip(table.columns, widths, strict=True):
        column.width, column.no_wrap, column.vertical = width, True, "bottom"
        column.overflow = "crop" if ascii_only else "ellipsis"
    return table


def _dots(ascii_only: bool) -> str:
    return "..." if ascii_only else "…"


def _bar(after: float, before: float, most: float, width: int, ascii_only: bool) -> str:
    """What is left and what went, as a bar of which `most` fills the width."""
    full, empty = ("#", ".") if ascii_only else ("█", "░")
    if not most:
        return ""
    filled, whole = (min(round(width * part / most), width) for part in (after, before))
    return full * filled + empty * (whole - filled)


def _reason_lines(notes: Sequence[Note]) -> Iterator[RenderableType]:
    """A line per reason, with the first of the nodes that share it."""
    from rich.padding import Padding
    from rich.text import Text

    for why, nodes in reasons(notes).items():
        line = Text.assemble((some(nodes, 3), "cyan"), f": {clean(why)}")
        yield Padding(line, (0, 0, 0, 2))


def _fitting(names: Sequence[str], width: int) -> str:
    """Up to three of the names, as many as a column has room for, and how many more there are."""
    from rich.cells import cell_len

    for most in (3, 2):
        if cell_len(text := some(names, most)) <= width:
            return text
    return some(names, 1)


def _room(
    width: int, names: Sequence[str], numbers: Sequence[int], bar: int = 0
) -> tuple[int, int, int]:
    """Cells for the names of groups, a bar, and the modules that they span; 0: no such column.

    numbers: the cells that other columns take. Names come first: the rest gets what they leave.
    """
    from rich.cells import cell_len

    rest = width - sum(n + _GAP for n in numbers)
    longest = max(cell_len(clean(n)) for n in names)
    name = max(min(longest, _NAME, rest), len("group"))
    rest -= name + _GAP
    bar = min(bar, rest) if rest >= bar // 2 else 0
    rest -= bar + _GAP if bar else 0
    return name, bar, rest if width >= _SPANS_FROM and rest >= 20 else 0


def _ends(count: int) -> tuple[slice, slice, slice]:
    """The rows of a table that are shown first, left out (none of few), and shown last."""
    hidden = count - _HEAD - _TAIL
    hidden = hidden if hidden > 2 else 0
    head = _HEAD if hidden else count
    return slice(head), slice(head, head + hidden), slice(head + hidden, None)


# ---- a report -----------------------------------------------------------------------------------


def report_terminal(report: Report, width: int, ascii_only: bool) -> Iterator[RenderableType]:
    """The report as rich's tables and texts."""
    from rich.padding import Padding
    from rich.text import Text

    how = [f"by {report.how}", f"traced with {clean(report.front_end)}"]
    if report.folds:
        how.append(f"{counted(report.folds, 'batch norm')} folded")
    yield Text.assemble((clean(report.model), "bold"), " pruned ", ", ".join(how))
    yield Text()
    yield _headline_table(report)
    if layers := costly(report.layers):
        yield Text()
        yield from _macs_tables(layers, width, ascii_only)
    if report.groups:
        yield Text()
        yield Text(groups_title(report), "bold")
        yield from _groups_tables(report.groups, width, ascii_only)
    if report.stages:
        yield Text()
        yield Text("Score by stage", "bold")
        yield _stages_table(report)
    if report.timings:
        yield Text()
        yield Text("Latency, ms per call: median (20th to 80th percentile)", "bold")
        yield _timings_table(report)
        if report.environment:
            yield Text(f"measured on {clean(report.environment)}", "dim")
    if report.frozen:
        yield Text()
        yield Text("Not cut", "bold")
        yield from _reason_lines(report.frozen)
    if report.notes:
        yield Text()
        yield Text("To know", "bold")
        for note in report.notes:
            yield Padding(Text(clean(note)), (0, 0, 0, 2))
    yield Text()
    if report.verified:
        yield Text.assemble(("Verified: ", "bold green"), clean(report.verified))
    else:
        yield Text("Not verified", "bold yellow")
    if report.seconds:
        parts = ", ".join(f"{clean(k)} {v:.2f} s" for k, v in report.seconds.items())
        yield Text(f"Took {parts}", "dim")


def _headline_table(report: Report) -> Table:
    table = _table(
        ("", "left"),
        ("before", "right"),
        ("after", "right"),
        ("remains", "right"),
        ("asked", "right"),
    )
    for m in headline(report):
        asked = "" if m.asked is None else f"at most {percent(m.asked)}"
        table.add_row(m.label, si(m.before), si(m.after), percent(m.remains), asked)
    return table


def _macs_tables(
    layers: Sequence[LayerRow], width: int, ascii_only: bool
) -> Iterator[RenderableType]:
    """Where the multiply-adds went: a line per layer of few, per part of the network of many."""
    from rich.text import Text

    parts = [(b.name, b.total("macs_before"), b.total("macs_after")) for b in blocks(layers)]
    if len(layers) <= _FEW or len(parts) < 3:
        parts = [(row.name, row.macs_before, row.macs_after) for row in layers]
    noun = "layer" if len(parts) == len(layers) else "part of the network"
    yield Text(f"MACs by {noun}", "bold")
    numbers = [max(len(h), 6) for h in ("before", "after", "remains")]
    head, left_out, tail = _ends(len(parts))
    shown = [*parts[head], *parts[tail]] if parts[left_out] else parts
    name, bar, _ = _room(width, [p[0] for p in shown], numbers, 2 * _BAR)
    columns = [(noun.split()[0], "left", name), ("before", "right", numbers[0])]
    columns += [("after", "right", numbers[1]), ("remains", "right", numbers[2])]
    columns += [("", "left", bar)] * bool(bar)
    most = max(before for _, before, _ in parts)
    for rows in (parts[head], parts[tail]):
        if not rows:
            continue
        table = _table(*(c[:2] for c in columns))
        table.show_header = rows[0] is parts[0]
        if not table.show_header:
            yield Text(f"({counted(len(parts[left_out]), f'more {noun.split()[0]}')})", "dim")
        for part, before, after in rows:
            cells = [
                Text(short(part, name, _dots(ascii_only))),
                Text(si(before)),
                Text(si(after), "bold" if after < before else "dim"),
                Text(percent(after / before if before else None)),
            ]
            if bar:
                cells.append(Text(_bar(after, before, most, bar, ascii_only), "cyan"))
            table.add_row(*cells)
        yield _fixed(table, [c[2] for c in columns], ascii_only)


def _groups_tables(
    groups: Sequence[GroupRow], width: int, ascii_only: bool
) -> Iterator[RenderableType]:
    """One line per group; of many groups the first and the last, and a line that counts the rest."""
    from rich.text import Text

    head, left_out, tail = _ends(len(groups))
    parts = [part for part in (groups[head], groups[tail]) if part]
    before = max(len("before"), *(len(str(g.before)) for g in groups))
    after = max(len("after"), *(len(str(g.after)) for g in groups))
    names = [g.name for part in parts for g in part]
    name, bar, spans = _room(width, names, (before, after), _BAR)
    columns = [("group", "left", name), ("before", "right", before), ("after", "right", after)]
    columns += [("", "left", bar)] * bool(bar) + [("spans", "left", spans)] * bool(spans)
    for i, part in enumerate(parts):
        table = _table(*(c[:2] for c in columns))
        table.show_header = not i
        for g in part:
            cells = [
                Text(short(g.name, name, _dots(ascii_only))),
                Text(str(g.before)),
                Text(str(g.after), "bold" if g.after < g.before else "dim"),
            ]
            if bar:
                cells.append(Text(_bar(g.after, g.before, g.before, bar, ascii_only), "cyan"))
            if spans:
                cells.append(Text(_fitting(spans_of(g.name, g.members), spans), "dim"))
            table.add_row(*cells)
        if i:
            lost = sum(g.before - g.after for g in groups[left_out])
            yield Text(f"({len(groups[left_out])} more groups, {lost:,} channels cut)", "dim")
        yield _fixed(table, [c[2] for c in columns], ascii_only)


def _stages_table(report: Report) -> Table:
    from rich.text import Text

    table = _table(("stage", "left"), ("score", "right"))
    score = scorer(list(report.stages.values()))
    for stage, value in report.stages.items():
        table.add_row(Text(clean(stage)), score(value))
    return table


def _timings_table(report: Report) -> Table:
    from rich.text import Text

    table = _table(("network", "left"), ("batch", "right"), ("ms", "right"), ("", "left"))
    ms = timer(t.median_ms for t in report.timings)
    for rows in batches(report.timings).values():
        for row in rows:
            table.add_row(
                Text(clean(row.name)),
                str(row.batch),
                f"{ms(row.median_ms)} ({ms(row.p20_ms)} to {ms(row.p80_ms)})",
                gain(row, rows[0]),
            )
    return table


# ---- an analysis --------------------------------------------------------------------------------


def _analysis(
    rows: Sequence[AnalysisRow], frozen: Mapping[str, str], width: int, ascii_only: bool
) -> Iterator[RenderableType]:
    """One line per group, their sum, and what is frozen."""
    from rich.cells import cell_len
    from rich.text import Text

    count = f"group{'s' * (len(rows) != 1)}"
    yield Text(f"{len(rows)} prunable {count}", "bold")
    if rows:
        kinds = any(r.kind not in ("channels", "stage") for r in rows)
        shown: list[tuple[str, Callable[[AnalysisRow], str]]] = [
            ("channels", lambda r: str(r.channels)),
            ("cuttable", lambda r: str(r.cuttable)),
        ]
        if kinds:
            shown.append(("kind", lambda r: clean(r.kind)))
        if width >= _MACS_FROM and any(r.macs is not None for r in rows):
            shown.append(("% of MACs", lambda r: "" if r.macs is None else f"{100 * r.macs:.1f}"))
        shown.append(("coupled by\nan addition", lambda r: "yes" if r.residual else ""))
        numbers = [
            max(*(cell_len(line) for line in header.split("\n")), *(cell_len(of(r)) for r in rows))
            for header, of in shown
        ]
        name, _, spans = _room(width, [r.name for r in rows], numbers)
        headers = ["group", *(header for header, _ in shown)] + ["spans"] * bool(spans)
        right = ("channels", "cuttable", "% of MACs")
        table = _table(*((h, "right" if h in right else "left") for h in headers))
        for r in rows:
            cells = [
                Text(short(r.name, name, _dots(ascii_only))),
                *(Text(of(r)) for _, of in shown),
            ]
            if spans:
                cells.append(Text(_fitting(spans_of(r.name, r.members), spans), "dim"))
            table.add_row(*cells)
        yield Text()
        yield _fixed(table, [name, *numbers, *[spans] * bool(spans)], ascii_only)
        yield Text()
        units = "units" if kinds else "channels"
        yield Text(
            f"In all: {len(rows)} {count}, {sum(r.cuttable for r in rows):,} cuttable {units}"
        )
    if frozen:
        yield Text()
        yield Text("Frozen", "bold")
        yield from _reason_lines([Note(node, why) for node, why in frozen.items()])


# ---- a scan of sensitivity ----------------------------------------------------------------------


def sensitivity_terminal(
    scan: Scan, width: int, ascii_only: bool, drop: float = 0.01
) -> Iterator[RenderableType]:
    """A line per group with its scores as a little curve, and the methods beside each other.

    drop: what a score may lose for the proposed ratios.
    """
    from rich.cells import cell_len
    from rich.text import Text

    scores = [scan.baseline, *(p.score for c in scan.curves for p in c.points)]
    write = scorer(scores)
    methods = list(dict.fromkeys(c.method for c in scan.curves))
    yield Text.assemble(
        (clean(scan.model), "bold"), f" scores {write(scan.baseline)}; each group cut alone"
    )
    if not scan.curves:
        yield Text("No group could be cut.")
        return
    if len(methods) > 1:
        yield Text()
        yield Text("Mean score over the groups, by the share of channels removed", "bold")
        yield _methods_table(scan.curves, methods, write, width, ascii_only)
    finite = [s for s in scores if math.isfinite(s)] or [0.0]
    proposals = scan.propose(drop)
    by_name: dict[str, Curve] = {}
    for curve in scan.curves:
        by_name.setdefault(curve.name, curve)
    yield Text()
    what = f" by {short(methods[0], 24)}" if len(methods) > 1 else ""
    lost = dropped(drop, are_shares(scores))
    yield Text(f"What may go{what}, at a drop of {lost}", "bold")
    points = min(max(len(c.points) for c in by_name.values()), _BAR)
    headers = ["channels", "scores", "removed", "score there"]
    numbers = [max(len(h), points * (h == "scores")) for h in headers]
    longest = min(max(cell_len(clean(n)) for n in by_name), _NAME)
    while longest + sum(n + _GAP for n in numbers) > width and len(numbers) > 1:
        headers, numbers = headers[:-1], numbers[:-1]  # names first: the rest gets what they leave
    name, _, _ = _room(width, list(by_name), numbers)
    table = _table(("group", "left"), *((h, "left" if h == "scores" else "right") for h in headers))
    for curve in by_name.values():
        ratio = proposals.get(curve.name, 0.0)
        there = next((p.score for p in curve.points if p.ratio == ratio), None)
        cells = [
            Text(str(curve.channels)),
            Text(_spark(curve, min(finite), max(finite), ascii_only), "cyan"),
            Text(percent(ratio, 0) if ratio else "-", "bold" if ratio else "dim"),
            Text("" if there is None else write(there)),
        ]
        shown = Text(short(curve.name, name, _dots(ascii_only)))
        table.add_row(shown, *cells[: len(headers)])
    yield _fixed(table, [name, *numbers], ascii_only)
    yield Text()
    ratios = sorted({p.ratio for c in by_name.values() for p in c.points})
    span = f"{percent(ratios[0], 0)} to {percent(ratios[-1], 0)}" if ratios else "nothing"
    yield Text(f"scores: from {span} of the channels removed", "dim")


def _spark(curve: Curve, low: float, high: float, ascii_only: bool) -> str:
    """A character per score: the higher the better; "?" for one that is no number."""
    levels = _LEVELS_ASCII if ascii_only else _LEVELS
    spread = (high - low) or 1.0
    return "".join(
        levels[round((p.score - low) / spread * (len(levels) - 1))]
        if math.isfinite(p.score)
        else "?"
        for p in sorted(curve.points, key=lambda p: p.ratio)[
            :: math.ceil(len(curve.points) / _BAR) or 1
        ]
    )


def _methods_table(
    curves: Sequence[Curve],
    methods: Sequence[str],
    write: Callable[[float], str],
    width: int,
    ascii_only: bool,
) -> Table:
    """A line per method, a column per ratio: of many ratios as many as there is room for."""
    from rich.text import Text

    ratios = sorted({p.ratio for c in curves for p in c.points})
    name = min(max(len(clean(m)) for m in methods), 24)
    cells = max(len(write(p.score)) for c in curves for p in c.points)
    most = max((width - name) // (cells + _GAP), 1)
    step = math.ceil(len(ratios) / most)
    ratios = ratios[::-1][::step][::-1]
    table = _table(("method", "left"), *((percent(r, 0), "right") for r in ratios))
    for method in methods:
        means = []
        for ratio in ratios:
            found = [
                p.score
                for c in curves
                if c.method == method
                for p in c.points
                if p.ratio == ratio and math.isfinite(p.score)
            ]
            means.append(Text(write(fmean(found)) if found else "-"))
        table.add_row(Text(short(method, name, _dots(ascii_only))), *means)
    return _fixed(table, [name, *[cells] * len(ratios)], ascii_only)
