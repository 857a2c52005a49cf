"""The report of one compilation: what was asked, what was reached, and what the user must know.

Promise: pure data that survives `copy.deepcopy`, pickle and JSON; shown as a table of text, as
JSON, or as one self-contained HTML page (no script, nothing fetched) with its plots drawn inside.
Names of layers come from users: they are escaped wherever they are shown.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from io import StringIO
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxprune._version import __version__
from fxprune.errors import FxPruneError
from fxprune.plan import Note

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table

SCHEMA_VERSION = 1
_HEAD, _TAIL = 16, 6  # rows of a long table of groups that the terminal shows
_GAP = 3  # cells between two columns of a table in the terminal
_NAME = 48  # cells that the name of a group may take there
_BAR = 16
_SPANS_FROM = 90  # columns of a terminal in which the modules of a group are told
_PLOTTED = 80  # groups that the plot of widths shows at most; the page's table has all of them


@dataclass(frozen=True)
class GroupRow:
    """Channels that live or die together: how many there were and are; equal means untouched."""

    name: str
    before: int
    after: int
    members: tuple[str, ...]  # the tensors that the group spans


@dataclass(frozen=True)
class AnalysisRow:
    """Channels that live or die together, before any cut; `residual`: an addition couples them."""

    name: str
    channels: int
    cuttable: int
    residual: bool
    members: tuple[str, ...]  # the tensors that the group spans


@dataclass(frozen=True)
class TimingRow:
    """Milliseconds per call of one network at one batch size: median, 20th, 80th percentile."""

    name: str
    batch: int
    median_ms: float
    p20_ms: float
    p80_ms: float


@dataclass(frozen=True)
class Point:
    """One score of a sensitivity scan: a share of a group's channels gone, and how many stayed."""

    ratio: float
    kept: int
    score: float


@dataclass(frozen=True)
class Curve:
    """The scores of a network with one group cut alone, by one method (a short label of it)."""

    name: str
    channels: int
    method: str
    points: tuple[Point, ...]


@dataclass(kw_only=True, repr=False)
class Report:
    """What one compilation did. `print(report)` shows it; `to_json` and `to_html` keep it.

    Rows of `timings` with the same `batch` are compared with the first of them. `stages` and
    `seconds` are shown in the order of insertion.
    """

    model: str  # the class name
    method: str
    front_end: str
    asked: dict[str, float] | None = None  # what may remain, e.g. {"macs": 0.5}
    metrics: dict[str, int]  # macs_before, macs_after, params_before, params_after
    groups: list[GroupRow] = field(default_factory=list)
    frozen: list[Note] = field(default_factory=list)
    folds: int = 0  # batch norms folded into convolutions
    verified: str = ""  # a sentence: what was compared, how close it came, the bound
    notes: list[str] = field(default_factory=list)  # what the user must know
    stages: dict[str, float] = field(default_factory=dict)  # a score by stage; accuracies 0 to 1
    timings: list[TimingRow] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)  # how long each step took
    environment: str = ""  # what the timings were taken on: threads, processor, dtype, torch

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dicts and lists; numbers that are not finite become None."""
        plain: dict[str, Any] = _plain({"schema_version": SCHEMA_VERSION, **_fields(self)})
        return plain

    def to_json(self, *, indent: int | None = 2) -> str:
        """Everything as a strict JSON document; numbers that are not finite become null."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """The report that `to_json` wrote; FxPruneError when the text is something else."""
        try:
            data = json.loads(text)
            if data.pop("schema_version") != SCHEMA_VERSION:
                raise ValueError(f"schema_version is not {SCHEMA_VERSION}")
            for name, row in (("groups", GroupRow), ("frozen", Note), ("timings", TimingRow)):
                data[name] = [_row(row, item) for item in data[name]]
            for name in ("stages", "seconds"):
                data[name] = {k: math.nan if v is None else v for k, v in data[name].items()}
            return cls(**data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise FxPruneError(
                "this is not a report of fxprune",
                why=f"{type(error).__name__}: {error}",
                fix="pass the text that Report.to_json() wrote",
            ) from error

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained HTML page, in light and dark; the file is whole or not there.

        OSError when the folder does not exist or cannot be written.
        """
        with _atomic(Path(path)) as temporary:
            temporary.write_text(_page(self), encoding="utf-8")

    def __repr__(self) -> str:
        """The table as plain text, without colour codes, as wide as the terminal."""
        return _as_text(lambda width, ascii_only: _terminal(self, width, ascii_only))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table for rich: `rich.print(report)` shows it in colour."""
        return _terminal(self, options.max_width, options.ascii_only)


def analysis_text(rows: Sequence[AnalysisRow], frozen: Mapping[str, str]) -> str:
    """What may be cut, and what may not (node -> why), as plain text as wide as the terminal."""
    return _as_text(lambda width, ascii_only: _analysis(rows, frozen, width, ascii_only))


class _Sink(StringIO):
    """Text in memory that tells rich which encoding it will be printed in."""

    def __init__(self, encoding: str) -> None:
        super().__init__()
        self._encoding = encoding

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the stream that this text goes to."""
        return self._encoding


# ---- data ---------------------------------------------------------------------------------------


def _fields(report: Report) -> dict[str, Any]:
    return {f.name: getattr(report, f.name) for f in dataclasses.fields(report)}


def _plain(value: Any) -> Any:
    """JSON's own types all the way down."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value


def _row(kind: Callable[..., Any], item: Mapping[str, Any]) -> Any:
    """One row back from its dict; lists become the tuples that they were."""
    return kind(
        **{
            k: tuple(v) if isinstance(v, list) else math.nan if v is None else v
            for k, v in item.items()
        }
    )


@contextlib.contextmanager
def _atomic(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place at the end, or vanishes on an error."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@dataclass(frozen=True)
class _Metric:
    """One line of the headline."""

    label: str
    before: int
    after: int
    remains: float | None  # after / before
    asked: float | None


def _headline(report: Report) -> list[_Metric]:
    lines = []
    for key, label in (("macs", "MACs"), ("params", "parameters")):
        before = report.metrics.get(f"{key}_before", 0)
        after = report.metrics.get(f"{key}_after", 0)
        remains = after / before if before else None
        lines.append(_Metric(label, before, after, remains, (report.asked or {}).get(key)))
    return lines


def _reasons(notes: Sequence[Note]) -> dict[str, list[str]]:
    """Reason -> the nodes that share it, in order of first appearance; "a, b" are two."""
    found: dict[str, dict[str, None]] = {}
    for note in notes:
        found.setdefault(note.why, {}).update(dict.fromkeys(note.node.split(", ")))
    return {why: list(nodes) for why, nodes in found.items()}


def _batches(timings: Sequence[TimingRow]) -> dict[int, list[TimingRow]]:
    found: dict[int, list[TimingRow]] = {}
    for row in timings:
        found.setdefault(row.batch, []).append(row)
    return found


def _speedup(row: TimingRow, first: TimingRow) -> float | None:
    return first.median_ms / row.median_ms if row.median_ms > 0 else None


def _shares(stages: Mapping[str, float]) -> bool:
    """Whether all scores can be shares, to be shown in percent."""
    return all(0 <= value <= 1 for value in stages.values() if math.isfinite(value))


# ---- words --------------------------------------------------------------------------------------


def _clean(text: str) -> str:
    """Without control characters: a layer's name must not move the cursor."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _si(number: float) -> str:
    """1234567 -> "1.23 M": three digits and a suffix."""
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= 0.9995 * size:
            digits = number / size
            return f"{digits:.{2 if digits < 9.995 else 1 if digits < 99.95 else 0}f} {suffix}"
    return f"{number:g}"


def _percent(share: float | None, digits: int = 1) -> str:
    return "-" if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f} %"


def _scorer(stages: Mapping[str, float]) -> Callable[[float], str]:
    """How these scores are written: all with as many digits behind the point."""
    if _shares(stages):
        return lambda value: _percent(value, 2)
    most = max((abs(v) for v in stages.values() if math.isfinite(v)), default=0.0)
    if not 1e-3 <= most < 1e6:
        return lambda value: f"{value:.4g}"
    digits = max(3 - math.floor(math.log10(most)), 0)
    return lambda value: f"{value:.{digits}f}"


def _timer(timings: Sequence[TimingRow]) -> Callable[[float], str]:
    """How these milliseconds are written: all with as many digits behind the point."""
    medians = [t.median_ms for t in timings if math.isfinite(t.median_ms) and t.median_ms > 0]
    least = min(medians, default=1.0)
    digits = next(d for d, low in ((0, 100), (1, 10), (2, 0.1), (4, 0)) if least >= low)
    return lambda value: f"{value:.{digits}f}"


def as_fast(times: float) -> str:
    """The one wording for a speed in comparison."""
    return f"{times:.2f}x as fast"


def _gain(row: TimingRow, first: TimingRow) -> str:
    gain = _speedup(row, first)
    return "" if row is first or gain is None else as_fast(gain)


def _short(name: str, most: int = 44, dots: str = "…") -> str:
    """A long name with its middle left out; `most` counts cells of a terminal."""
    from rich.cells import cell_len

    name = _clean(name)
    if cell_len(name) <= most:
        return name
    room = max(most - len(dots), 2)
    head, tail = _cells(name, room // 2), _cells(name[::-1], room - room // 2)[::-1]
    return f"{head}{dots}{tail}"


def _cells(text: str, most: int) -> str:
    """The start of a text, so much that it takes at most so many cells of a terminal."""
    from rich.cells import cell_len

    return text[: sum(total <= most for total in accumulate(map(cell_len, text)))]


def _some(names: Sequence[str], most: int) -> str:
    shown = ", ".join(_clean(n) for n in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def _modules(name: str, members: Sequence[str]) -> list[str]:
    """The modules that a group spans, without the one that it is named after."""
    modules = dict.fromkeys(m.rpartition(".")[0] or m for m in members)
    modules.pop(name, None)
    return list(modules)


def _fitting(names: Sequence[str], width: int) -> str:
    """Up to three of the names, as many as a column has room for, and how many more there are."""
    from rich.cells import cell_len

    for most in (3, 2):
        if cell_len(text := _some(names, most)) <= width:
            return text
    return _some(names, 1)


# ---- terminal -----------------------------------------------------------------------------------


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


def _terminal(report: Report, width: int, ascii_only: bool) -> Iterator[RenderableType]:
    """The report as rich's tables and texts; no user's string is read as markup."""
    from rich.padding import Padding
    from rich.text import Text

    how = [f"by {_clean(report.method)}", f"traced with {_clean(report.front_end)}"]
    if report.folds:
        how.append(f"{report.folds} batch norm{'s' * (report.folds > 1)} folded")
    yield Text.assemble((_clean(report.model), "bold"), " pruned ", ", ".join(how))
    yield Text()
    yield _headline_table(report)
    if report.groups:
        yield Text()
        yield Text(_groups_title(report), "bold")
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
            yield Text(f"measured on {_clean(report.environment)}", "dim")
    if report.frozen:
        yield Text()
        yield Text("Not cut", "bold")
        yield from _reason_lines(report.frozen)
    if report.notes:
        yield Text()
        yield Text("To know", "bold")
        for note in report.notes:
            yield Padding(Text(_clean(note)), (0, 0, 0, 2))
    yield Text()
    if report.verified:
        yield Text.assemble(("Verified: ", "bold green"), _clean(report.verified))
    else:
        yield Text("Not verified", "bold yellow")
    if report.seconds:
        parts = ", ".join(f"{_clean(k)} {v:.2f} s" for k, v in report.seconds.items())
        yield Text(f"Took {parts}", "dim")


def _table(*columns: tuple[str, str]) -> Table:
    """A table without vertical lines; columns are (header, "left" | "right")."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="dim")
    for header, justify in columns:
        table.add_column(header, justify="left" if justify == "left" else "right", overflow="fold")
    return table


def _headline_table(report: Report) -> Table:
    table = _table(
        ("", "left"),
        ("before", "right"),
        ("after", "right"),
        ("remains", "right"),
        ("asked", "right"),
    )
    for m in _headline(report):
        asked = "" if m.asked is None else f"at most {_percent(m.asked)}"
        table.add_row(m.label, _si(m.before), _si(m.after), _percent(m.remains), asked)
    return table


def _groups_title(report: Report) -> str:
    cut = sum(g.after < g.before for g in report.groups)
    return f"Channels by group: {cut} of {len(report.groups)} groups cut"


def _reason_lines(notes: Sequence[Note]) -> Iterator[RenderableType]:
    """A line per reason, with the first of the nodes that share it."""
    from rich.padding import Padding
    from rich.text import Text

    for why, nodes in _reasons(notes).items():
        line = Text.assemble((_some(nodes, 3), "cyan"), f": {_clean(why)}")
        yield Padding(line, (0, 0, 0, 2))


def _room(
    width: int, names: Sequence[str], numbers: Sequence[int], bar: int = 0
) -> tuple[int, int, int]:
    """Cells for the names of groups, a bar, and the modules that they span; 0: no such column.

    numbers: the cells that other columns take. Names come first: the rest gets what they leave.
    """
    from rich.cells import cell_len

    rest = width - sum(n + _GAP for n in numbers)
    longest = max(cell_len(_clean(n)) for n in names)
    name = max(min(longest, _NAME, rest), len("group"))
    rest -= name + _GAP
    bar = min(bar, rest) if rest >= bar // 2 else 0
    rest -= bar + _GAP if bar else 0
    return name, bar, rest if width >= _SPANS_FROM and rest >= 20 else 0


def _fixed(table: Table, widths: Sequence[int], ascii_only: bool) -> Table:
    """The table with columns of these widths, in which nothing is folded."""
    for column, width in zip(table.columns, widths, strict=True):
        column.width, column.no_wrap, column.vertical = width, True, "bottom"
        column.overflow = "crop" if ascii_only else "ellipsis"
    return table


def _groups_tables(
    groups: Sequence[GroupRow], width: int, ascii_only: bool
) -> Iterator[RenderableType]:
    """One line per group; of many groups the first and the last, and a line that counts the rest."""
    from rich.text import Text

    hidden = len(groups) - _HEAD - _TAIL
    hidden = hidden if hidden > 2 else 0
    left_out = groups[_HEAD : _HEAD + hidden]
    parts = [groups[:_HEAD], groups[_HEAD + hidden :]] if hidden else [groups]
    before = max(len("before"), *(len(str(g.before)) for g in groups))
    after = max(len("after"), *(len(str(g.after)) for g in groups))
    names = [g.name for part in parts for g in part]
    name, bar, spans = _room(width, names, (before, after), _BAR)
    full, empty = ("#", ".") if ascii_only else ("█", "░")
    columns = [("group", "left", name), ("before", "right", before), ("after", "right", after)]
    columns += [("", "left", bar)] * bool(bar) + [("spans", "left", spans)] * bool(spans)
    for i, part in enumerate(parts):
        table = _table(*(c[:2] for c in columns))
        table.show_header = not i
        for g in part:
            filled = round(bar * g.after / g.before) if g.before else 0
            cells = [
                Text(_short(g.name, name, "..." if ascii_only else "…")),
                Text(str(g.before)),
                Text(str(g.after), "bold" if g.after < g.before else "dim"),
            ]
            if bar:
                cells.append(Text(full * filled + empty * (bar - filled), "cyan"))
            if spans:
                cells.append(Text(_fitting(_modules(g.name, g.members), spans), "dim"))
            table.add_row(*cells)
        if i:
            lost = sum(g.before - g.after for g in left_out)
            yield Text(f"({hidden} more groups, {lost:,} channels cut)", "dim")
        yield _fixed(table, [c[2] for c in columns], ascii_only)


def _analysis(
    rows: Sequence[AnalysisRow], frozen: Mapping[str, str], width: int, ascii_only: bool
) -> Iterator[RenderableType]:
    """One line per group, their sum, and what is frozen."""
    from rich.text import Text

    count = f"group{'s' * (len(rows) != 1)}"
    yield Text(f"{len(rows)} prunable {count}", "bold")
    if rows:
        numbers = len("channels"), len("cuttable"), len("an addition")
        name, _, spans = _room(width, [r.name for r in rows], numbers)
        headers = ["group", "channels", "cuttable", "coupled by\nan addition"]
        headers += ["spans"] * bool(spans)
        table = _table(*((h, "right" if h in headers[1:3] else "left") for h in headers))
        for r in rows:
            cells = [
                Text(_short(r.name, name, "..." if ascii_only else "…")),
                Text(str(r.channels)),
                Text(str(r.cuttable)),
                Text("yes" if r.residual else ""),
            ]
            if spans:
                cells.append(Text(_fitting(_modules(r.name, r.members), spans), "dim"))
            table.add_row(*cells)
        yield Text()
        yield _fixed(table, [name, *numbers, *[spans] * bool(spans)], ascii_only)
        yield Text()
        yield Text(
            f"In all: {len(rows)} {count}, {sum(r.cuttable for r in rows):,} cuttable channels"
        )
    if frozen:
        yield Text()
        yield Text("Frozen", "bold")
        yield from _reason_lines([Note(node, why) for node, why in frozen.items()])


def _stages_table(report: Report) -> Table:
    from rich.text import Text

    table = _table(("stage", "left"), ("score", "right"))
    score = _scorer(report.stages)
    for stage, value in report.stages.items():
        table.add_row(Text(_clean(stage)), score(value))
    return table


def _timings_table(report: Report) -> Table:
    from rich.text import Text

    table = _table(("network", "left"), ("batch", "right"), ("ms", "right"), ("", "left"))
    ms = _timer(report.timings)
    for rows in _batches(report.timings).values():
        for row in rows:
            table.add_row(
                Text(_clean(row.name)),
                str(row.batch),
                f"{ms(row.median_ms)} ({ms(row.p20_ms)} to {ms(row.p80_ms)})",
                _gain(row, rows[0]),
            )
    return table


# ---- page ---------------------------------------------------------------------------------------

# Stand-ins in the drawings, replaced by the page's colours so that plots follow light and dark.
_COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--accent)",
    "#050505": "var(--pale)",
}
_WIDE = 8.0  # inches, of every drawing, so that letters have one size
_INK, _MUTED, _LINE, _ACCENT, _PALE = _COLOURS


def _page(report: Report) -> str:
    """The whole page as text."""
    import torch
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        files("fxprune").joinpath("report.html").read_text(encoding="utf-8")
    )
    score, ms = _scorer(report.stages), _timer(report.timings)
    tiles = [
        {
            "label": m.label,
            "value": _percent(m.remains),
            "unit": "remain",
            "detail": f"{_si(m.before)} → {_si(m.after)}",
            "asked": "" if m.asked is None else f"asked: at most {_percent(m.asked)}",
        }
        for m in _headline(report)
    ]
    tiles += _latency_tiles(report)
    if len(report.stages) > 1:
        first, *_, last = report.stages.items()
        tiles.append(
            {
                "label": f"score, {last[0]}",
                "value": score(last[1]),
                "unit": "",
                "detail": f"{score(first[1])} {first[0]}",
                "asked": "",
            }
        )
    return template.render(
        report=report,
        tiles=tiles,
        metrics=[
            (m.label, f"{m.before:,}", f"{m.after:,}", _percent(m.remains))
            for m in _headline(report)
        ],
        groups_title=_groups_title(report),
        reasons=_reasons(report.frozen),
        stages=[(name, score(value)) for name, value in report.stages.items()],
        timings=[
            (row, ms(row.median_ms), ms(row.p20_ms), ms(row.p80_ms), _gain(row, rows[0]))
            for rows in _batches(report.timings).values()
            for row in rows
        ],
        hidden=max(len(report.groups) - _PLOTTED, 0),
        plots=_plots(report),
        versions=f"fxprune {__version__}, torch {torch.__version__}",
    )


def _latency_tiles(report: Report) -> list[dict[str, str]]:
    """One tile for the last batch size, where batching hides the overheads."""
    batches = list(_batches(report.timings).items())
    if not batches or len(batches[-1][1]) < 2:
        return []
    batch, rows = batches[-1]
    gain, ms = _gain(rows[-1], rows[0]), _timer(report.timings)
    value, _, unit = gain.partition(" ")
    return [
        {
            "label": f"latency, batch {batch}",
            "value": value or "-",
            "unit": unit,
            "detail": f"{ms(rows[0].median_ms)} → {ms(rows[-1].median_ms)} ms",
            "asked": "",
        }
    ]


def _plots(report: Report) -> dict[str, str]:
    """Name of a plot -> its `<svg>`, ready to stand in the page, or "" where there is no data."""
    import matplotlib

    wanted: dict[str, Callable[[Report], Figure]] = {}
    if report.groups:
        wanted["widths"] = _draw_widths
    if len(report.stages) > 1:
        wanted["stages"] = _draw_stages
    if report.timings:
        wanted["latency"] = _draw_latency
    settings = {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "fxprune",  # the same report, the same bytes
        "text.parse_math": False,  # a $ in a name is a $
        "text.usetex": False,
        "font.size": 10.0,
        "text.color": _INK,
        "axes.edgecolor": _LINE,
        "axes.labelcolor": _MUTED,
        "xtick.color": _LINE,
        "ytick.color": _LINE,
        "xtick.labelcolor": _MUTED,
        "ytick.labelcolor": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.unicode_minus": False,
        "grid.color": _LINE,
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # the user's style must not leak into the page
        matplotlib.rcParams.update(settings)
        drawn = {name: _svg(draw(report), name) for name, draw in wanted.items()}
    return {"widths": "", "stages": "", "latency": "", **drawn}


def _svg(figure: Figure, prefix: str) -> str:
    """The figure as an `<svg>` element that can stand beside others in a page."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    out = StringIO()
    FigureCanvasSVG(figure)
    figure.savefig(
        out,
        format="svg",
        transparent=True,
        metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
    )
    text = out.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    head, rest = text.split(">", 1)
    head = re.sub(r' xmlns(:\w+)?="[^"]*"', "", head)
    text = f'{head} role="img" aria-label="Plot: {prefix}">{rest}'
    text = text.replace("xlink:href=", "href=")
    # Ids are unique in a page: give each drawing its own.
    text = re.sub(r'(<[^<>]*\s)id="', rf'\1id="{prefix}-', text)
    text = re.sub(r'(<[^<>]*\shref="#)', rf"\1{prefix}-", text)
    text = text.replace("url(#", f"url(#{prefix}-")
    for stand_in, colour in _COLOURS.items():
        text = text.replace(stand_in, colour)
    return text


def _draw_widths(report: Report) -> Figure:
    """A bar per group: the old width pale, the new one on top of it."""
    from matplotlib.figure import Figure

    rows = report.groups[:_PLOTTED]
    height = 0.27 * len(rows) + 0.5
    figure = Figure(figsize=(_WIDE, height), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(places, [r.before for r in rows], height=0.62, color=_PALE)
    axes.barh(places, [r.after for r in rows], height=0.62, color=_ACCENT)
    widest = max(r.before for r in rows)
    for i, r in enumerate(rows):
        text = f"{r.before} → {r.after}" if r.after != r.before else f"{r.before}"
        colour = _INK if r.after != r.before else _MUTED
        axes.text(r.before + 0.012 * widest, i, text, va="center", fontsize=9, color=colour)
    axes.set_yticks(list(places), [_short(r.name) for r in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(0, 1.12 * widest)
    axes.set_xlabel("channels")
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    return figure


def _draw_stages(report: Report) -> Figure:
    """A point per stage, joined, with its value above it."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    shares, score = _shares(report.stages), _scorer(report.stages)
    values = list(report.stages.values())
    finite = [v for v in values if math.isfinite(v)] or [0.0]
    figure = Figure(figsize=(_WIDE, 2.7), layout="constrained")
    axes = figure.subplots()
    places = list(range(len(values)))
    axes.plot(places, values, color=_ACCENT, linewidth=2, marker="o", markersize=7, clip_on=False)
    low, high = min(finite), max(finite)
    least = 0.05 if shares else 0.01 * abs(high)  # a difference of nothing must not fill the plot
    spread = max(high - low, least) or 1.0
    for i, value in enumerate(values):
        if math.isfinite(value):
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
    axes.set_xticks(places, [_short(name, 28) for name in report.stages])
    axes.tick_params(axis="x", labelcolor=_INK)
    axes.tick_params(axis="y", labelcolor=_MUTED)
    axes.set_xlim(-0.4, len(values) - 0.6)
    bottom, top = high - 1.22 * spread, high + 0.2 * spread
    ticks = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(bottom, top)
    if shares:
        bottom = max(bottom, -0.1)
        ticks = [t for t in ticks if -1e-9 <= t <= 1 + 1e-9]
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=" %"))
    axes.set_yticks([t for t in ticks if bottom <= t <= top])
    axes.set_ylim(bottom, top)
    axes.tick_params(length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="y")
    return figure


def _draw_latency(report: Report) -> Figure:
    """A panel per batch size: a bar to the median, a line from the 20th to the 80th percentile."""
    from matplotlib.figure import Figure

    batches = _batches(report.timings)
    ms = _timer(report.timings)
    heights = [max(len(rows), 1) for rows in batches.values()]
    figure = Figure(figsize=(_WIDE, sum(0.34 * h + 0.62 for h in heights)), layout="constrained")
    panels = figure.subplots(len(batches), 1, squeeze=False, height_ratios=[h + 1 for h in heights])
    for axes, (batch, rows) in zip(panels[:, 0], batches.items(), strict=True):
        widest = max(max(r.p80_ms, r.median_ms) for r in rows) or 1.0
        for i, row in enumerate(rows):
            axes.barh(i, row.median_ms, height=0.56, color=_PALE if i == 0 else _ACCENT)
            axes.plot([row.p20_ms, row.p80_ms], [i, i], color=_INK, linewidth=1.6)
            for end in (row.p20_ms, row.p80_ms):
                axes.plot([end, end], [i - 0.13, i + 0.13], color=_INK, linewidth=1.6)
            gain = _gain(row, rows[0])
            text = f"{ms(row.median_ms)} ms" + (f" ({gain})" if gain else "")
            place = max(row.p80_ms, row.median_ms) + 0.012 * widest
            axes.text(place, i, text, va="center", fontsize=9)
        axes.set_yticks(range(len(rows)), [_short(r.name) for r in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, 1.32 * widest)
        axes.set_title(f"batch {batch}", loc="left", fontsize=10, color=_MUTED)
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
    panels[-1, 0].set_xlabel("ms per call")
    return figure
