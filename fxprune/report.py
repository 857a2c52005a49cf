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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxprune.errors import FxPruneError
from fxprune.plan import Note

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table
    from rich.text import Text

SCHEMA_VERSION = 1
_HEAD, _TAIL = 16, 6  # rows of a long table of groups that the terminal shows
_PLOTTED = 80  # groups that the plot of widths shows at most; the page's table has all of them


@dataclass(frozen=True)
class GroupRow:
    """Channels that live or die together: how many there were and are; equal means untouched."""

    name: str
    before: int
    after: int
    members: tuple[str, ...]  # the tensors that the group spans


@dataclass(frozen=True)
class TimingRow:
    """Milliseconds per call of one network at one batch size: median, 20th, 80th percentile."""

    name: str
    batch: int
    median_ms: float
    p20_ms: float
    p80_ms: float


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
        from rich.console import Console

        width = min(max(shutil.get_terminal_size((100, 24)).columns, 60), 120)
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        ascii_only = not encoding.lower().startswith("utf")
        out = _Sink(encoding)
        console = Console(
            file=out, width=width, color_system=None, force_terminal=False, _environ={}
        )
        console.print(self)
        text = "\n".join(line.rstrip() for line in out.getvalue().splitlines())
        return text.encode(encoding, "replace").decode(encoding) if ascii_only else text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table for rich: `rich.print(report)` shows it in colour."""
        return _terminal(self, ascii_only=options.ascii_only)


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
    """Reason -> the nodes that share it, in order of first appearance."""
    found: dict[str, list[str]] = {}
    for note in notes:
        found.setdefault(note.why, []).append(note.node)
    return found


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


def _score(value: float, shares: bool) -> str:
    return _percent(value, 2) if shares else f"{value:.4g}"


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _some(names: Sequence[str], most: int) -> str:
    shown = ", ".join(_clean(n) for n in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


# ---- terminal -----------------------------------------------------------------------------------


def _terminal(report: Report, *, ascii_only: bool) -> Iterator[Table | Text]:
    """The report as rich's tables and texts; no user's string is read as markup."""
    from rich.text import Text

    how = [f"by {_clean(report.method)}", f"traced with {_clean(report.front_end)}"]
    if report.folds:
        how.append(f"{report.folds} batch norm{'s' * (report.folds > 1)} folded")
    yield Text.assemble((_clean(report.model), "bold"), " pruned ", ", ".join(how))
    yield Text()
    yield _headline_table(report)
    for title, table in (
        (_groups_title(report), _groups_table(report, ascii_only)),
        ("Score by stage", _stages_table(report)),
        ("Latency, ms per call: median (20th to 80th percentile)", _timings_table(report)),
    ):
        if table.row_count:
            yield Text()
            yield Text(title, "bold")
            yield table
    if report.frozen:
        yield Text()
        yield Text("Not cut", "bold")
        for why, nodes in _reasons(report.frozen).items():
            yield Text.assemble("  ", (_some(nodes, 3), "cyan"), f": {_clean(why)}")
    if report.notes:
        yield Text()
        yield Text("To know", "bold")
        for note in report.notes:
            yield Text(f"  {_clean(note)}")
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


def _groups_table(report: Report, ascii_only: bool) -> Table:
    from rich.text import Text

    table = _table(
        ("group", "left"), ("before", "right"), ("after", "right"), ("", "left"), ("spans", "left")
    )
    last = table.columns[-1]
    last.no_wrap, last.overflow = True, "crop" if ascii_only else "ellipsis"
    full, empty = ("#", ".") if ascii_only else ("█", "░")
    groups = report.groups
    hidden = len(groups) - _HEAD - _TAIL
    hidden = hidden if hidden > 2 else 0
    for i, g in enumerate(groups):
        if hidden and i == _HEAD:
            lost = sum(r.before - r.after for r in groups[_HEAD : _HEAD + hidden])
            table.add_row(Text(f"({hidden} more groups, {lost:,} channels cut)", "dim"))
        if hidden and _HEAD <= i < _HEAD + hidden:
            continue
        filled = round(16 * g.after / g.before) if g.before else 0
        table.add_row(
            Text(_clean(g.name)),
            str(g.before),
            Text(str(g.after), "bold" if g.after < g.before else "dim"),
            Text(full * filled + empty * (16 - filled), "cyan"),
            Text(_spans(g), "dim"),
        )
    return table


def _spans(group: GroupRow) -> str:
    """The modules that a group spans, without the one that it is named after."""
    modules = dict.fromkeys(m.rpartition(".")[0] or m for m in group.members)
    modules.pop(group.name, None)
    return _some(list(modules), 3)


def _stages_table(report: Report) -> Table:
    from rich.text import Text

    table = _table(("stage", "left"), ("score", "right"))
    shares = _shares(report.stages)
    for stage, value in report.stages.items():
        table.add_row(Text(_clean(stage)), _score(value, shares))
    return table


def _timings_table(report: Report) -> Table:
    from rich.text import Text

    table = _table(("network", "left"), ("batch", "right"), ("ms", "right"), ("speed-up", "right"))
    for rows in _batches(report.timings).values():
        for row in rows:
            gain = _speedup(row, rows[0])
            table.add_row(
                Text(_clean(row.name)),
                str(row.batch),
                f"{_ms(row.median_ms)} ({_ms(row.p20_ms)} to {_ms(row.p80_ms)})",
                "" if row is rows[0] or gain is None else f"{gain:.2f}x",
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
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        files("fxprune").joinpath("templates/report.html").read_text(encoding="utf-8")
    )
    shares = _shares(report.stages)
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
                "value": _score(last[1], shares),
                "unit": "",
                "detail": f"{_score(first[1], shares)} {first[0]}",
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
        stages=[(name, _score(value, shares)) for name, value in report.stages.items()],
        timings=[
            (row, _ms(row.median_ms), _ms(row.p20_ms), _ms(row.p80_ms), _gain(row, rows[0]))
            for rows in _batches(report.timings).values()
            for row in rows
        ],
        hidden=max(len(report.groups) - _PLOTTED, 0),
        plots=_plots(report),
    )


def _gain(row: TimingRow, first: TimingRow) -> str:
    gain = _speedup(row, first)
    return "" if row is first or gain is None else f"{gain:.2f} ×"


def _latency_tiles(report: Report) -> list[dict[str, str]]:
    """One tile for the last batch size, where batching hides the overheads."""
    batches = list(_batches(report.timings).items())
    if not batches or len(batches[-1][1]) < 2:
        return []
    batch, rows = batches[-1]
    gain = _speedup(rows[-1], rows[0])
    return [
        {
            "label": f"latency, batch {batch}",
            "value": "-" if gain is None else f"{gain:.2f} ×",
            "unit": "faster" if gain is None or gain >= 1 else "as fast",
            "detail": f"{_ms(rows[0].median_ms)} → {_ms(rows[-1].median_ms)} ms",
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


def _short(name: str, most: int = 44) -> str:
    """A long name with its middle left out."""
    name = _clean(name)
    return name if len(name) <= most else f"{name[: most // 2 - 1]}…{name[-most // 2 :]}"


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

    shares = _shares(report.stages)
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
                _score(value, shares),
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
            text = f"{_ms(row.median_ms)} ms" + (f"  ({gain})" if gain else "")
            place = max(row.p80_ms, row.median_ms) + 0.012 * widest
            axes.text(place, i, text, va="center", fontsize=9)
        axes.set_yticks(range(len(rows)), [_short(r.name) for r in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(0, 1.22 * widest)
        axes.set_title(f"batch {batch}", loc="left", fontsize=10, color=_MUTED)
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
    panels[-1, 0].set_xlabel("ms per call")
    return figure
