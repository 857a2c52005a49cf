"""The report of one compilation: what was asked, what was reached, and what the user must know.

Promise: pure data that survives `copy.deepcopy`, pickle and JSON; shown as a table of text, as
JSON, or as one self-contained HTML page (no script, nothing fetched) with its plots drawn inside.
Names of layers come from users: they are escaped wherever they are shown.
Here are the data; `tables` writes them for a terminal, `page` and `plots` for a browser.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from fxprune.errors import FxPruneError
from fxprune.plan import Note
from fxprune.views.words import as_fast as as_fast
from fxprune.views.words import method_line

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

SCHEMA_VERSION = 1
_BLOCKS = 24  # more blocks than this are no overview of a network
_DEEPEST = 4  # names are not split further than at this dot


@dataclass(frozen=True)
class LayerRow:
    """What one layer costs before and after: channels it makes, multiply-adds, parameters.

    name: the module that owns the weights, called once or more; for a product of two activations
    the node. kind: "conv", "depthwise", "linear", "attention", "norm", "product" or "other".
    channels: 0 where the layer has no such axis. macs: per sample, over all calls.
    """

    name: str
    kind: str
    channels_before: int
    channels_after: int
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int


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
    kind: str = "channels"  # what they are: channels, a stage, heads and so on
    macs: float | None = None  # the share of the multiply-adds that go with all of it


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


class Scan(Protocol):
    """What tables and pages show of a sensitivity scan."""

    @property
    def model(self) -> str:
        """The class name."""

    @property
    def baseline(self) -> float:
        """The score of the whole network."""

    @property
    def curves(self) -> tuple[Curve, ...]:
        """One per group and method, groups in graph order."""

    def propose(self, drop: float = 0.01) -> dict[str, float]:
        """{group: the largest ratio up to which no score lies more than `drop` lower}."""


@dataclass(kw_only=True, repr=False)
class Report:
    """What one compilation did. `print(report)` shows it; `to_json` and `to_html` keep it.

    Rows of `timings` with the same `batch` are compared with the first of them. `stages` and
    `seconds` are shown in the order of insertion. Macs and params of `layers` add up to `metrics`.
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
    layers: list[LayerRow] = field(default_factory=list)  # in graph order; before: the original
    options: dict[str, Any] = field(default_factory=dict)  # the method's record in the plan

    def __post_init__(self) -> None:
        self.options = _plain(self.options)  # JSON's own types, shared with nobody

    @property
    def how(self) -> str:
        """The method and its options in one line, such as "L1, smallest first"."""
        return method_line(self.method, self.options)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dicts and lists; numbers that are not finite become None."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        plain: dict[str, Any] = _plain({"schema_version": SCHEMA_VERSION, **fields})
        return plain

    def to_json(self, *, indent: int | None = 2) -> str:
        """Everything as a strict JSON document; numbers that are not finite become null."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Report:
        """The report that `to_json` wrote, by this version or an older one that knew fewer fields.

        FxPruneError when the text is something else; it says which entry is wrong.
        """
        try:
            data = json.loads(text)
            if data.pop("schema_version") != SCHEMA_VERSION:
                raise ValueError(f"schema_version is not {SCHEMA_VERSION}")
            return cls(**_read(data))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise FxPruneError(
                "this is not a report of fxprune",
                why=f"{type(error).__name__}: {error}",
                fix="pass the text that Report.to_json() wrote",
            ) from error

    def to_html(self, path: str | os.PathLike[str]) -> None:
        """Write one self-contained HTML page, in light and dark; the file is whole or not there.

        OSError when the folder does not exist or cannot be written.
        """
        from fxprune.views.page import write_report

        write_report(self, path)

    def __repr__(self) -> str:
        """The table as plain text, without colour codes, as wide as the terminal."""
        from fxprune.views.tables import report_text

        return report_text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table for rich: `rich.print(report)` shows it in colour."""
        from fxprune.views.tables import report_terminal

        return report_terminal(self, options.max_width, options.ascii_only)


# ---- to JSON and back ---------------------------------------------------------------------------


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


_ROWS: dict[str, Callable[..., Any]] = {
    "groups": GroupRow,
    "frozen": Note,
    "timings": TimingRow,
    "layers": LayerRow,
}


def _read(data: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a report from its document, each of the type that it must have."""
    fields = dict(data)
    for name, row in _ROWS.items():
        if name in fields:
            rows = _typed(fields[name], list, name)
            fields[name] = [_row(row, item, f"{name}[{i}]") for i, item in enumerate(rows)]
    for name in ("model", "method", "front_end", "verified", "environment"):
        _typed(fields.get(name, ""), str, name)
    _typed(fields.get("folds", 0), int, "folds")
    for note in _typed(fields.get("notes", []), list, "notes"):
        _typed(note, str, "notes")
    _typed(fields.get("options", {}), dict, "options")
    for name, kind in (("metrics", int), ("asked", float), ("stages", float), ("seconds", float)):
        if name not in fields or (name == "asked" and fields[name] is None):
            continue
        items = _typed(fields[name], dict, name).items()
        fields[name] = {k: _number(v, kind, f"{name}.{k}") for k, v in items}
    return fields


def _row(kind: Callable[..., Any], item: Any, where: str) -> Any:
    """One row back from its dict; lists become the tuples that they were."""
    types = {f.name: str(f.type) for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    values = {}
    for name, value in _typed(item, dict, where).items():
        place, wanted = f"{where}.{name}", types.get(name, "")
        if wanted.startswith("tuple"):
            values[name] = tuple(_typed(v, str, place) for v in _typed(value, list, place))
        elif wanted in ("int", "float"):
            values[name] = _number(value, int if wanted == "int" else float, place)
        else:
            values[name] = _typed(value, str, place)
    return kind(**values)


def _typed(value: Any, kind: type, where: str) -> Any:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(f"{where} is {type(value).__name__}, not {kind.__name__}")
    return value


def _number(value: Any, kind: type, where: str) -> Any:
    """An integer, or a float that null stands for when it was not finite."""
    if kind is int:
        if not 0 <= _typed(value, int, where) < 1 << 63:
            raise ValueError(f"{where} is no count")
        return value
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{where} is {type(value).__name__}, not a number")
    if isinstance(value, int) and abs(value) >= 1 << 63:  # no float holds it, or none of its digits
        raise ValueError(f"{where} is no number of a report")
    return value


# ---- what tables and pages show of it -----------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """One line of the headline; remains: after / before."""

    label: str
    before: int
    after: int
    remains: float | None
    asked: float | None


def headline(report: Report) -> list[Metric]:
    """Multiply-adds and parameters, reached and asked."""
    lines = []
    for key, label in (("macs", "MACs"), ("params", "parameters")):
        before = report.metrics.get(f"{key}_before", 0)
        after = report.metrics.get(f"{key}_after", 0)
        remains = after / before if before else None
        lines.append(Metric(label, before, after, remains, (report.asked or {}).get(key)))
    return lines


def groups_title(report: Report) -> str:
    """How many groups lost something."""
    cut = sum(g.after < g.before for g in report.groups)
    return f"Channels by group: {cut} of {len(report.groups)} groups cut"


def spans(name: str, members: Sequence[str]) -> list[str]:
    """The modules that a group's tensors belong to, without the one that it is named after."""
    modules = dict.fromkeys(m.rpartition(".")[0] or m for m in members)
    modules.pop(name, None)
    return list(modules)


def reasons(notes: Sequence[Note]) -> dict[str, list[str]]:
    """Reason -> the nodes that share it, in order of first appearance; "a, b" are two."""
    found: dict[str, dict[str, None]] = {}
    for note in notes:
        found.setdefault(note.why, {}).update(dict.fromkeys(note.node.split(", ")))
    return {why: list(nodes) for why, nodes in found.items()}


def batches(timings: Sequence[TimingRow]) -> dict[int, list[TimingRow]]:
    """The rows by batch size."""
    found: dict[int, list[TimingRow]] = {}
    for row in timings:
        found.setdefault(row.batch, []).append(row)
    return found


def gain(row: TimingRow, first: TimingRow) -> str:
    """How fast a network is beside the first one; "" for the first itself."""
    if row is first or not row.median_ms > 0:
        return ""
    return as_fast(first.median_ms / row.median_ms)


class Named(Protocol):
    """A row with the name of a layer."""

    @property
    def name(self) -> str:
        """Parts of the network from the outermost, with dots between."""


R = TypeVar("R", bound=Named)


@dataclass(frozen=True)
class Block(Generic[R]):
    """A part of the network: the rows of layers whose names begin alike, and their sums."""

    name: str
    layers: tuple[R, ...]

    def total(self, what: str) -> int:
        """The sum of a field of the rows, such as "macs_before"."""
        return sum(getattr(row, what) for row in self.layers)


def costly(layers: Sequence[LayerRow]) -> list[LayerRow]:
    """The layers that multiply: the others only hold parameters."""
    return [row for row in layers if row.macs_before or row.kind not in ("norm", "other")]


def blocks(layers: Sequence[R]) -> list[Block[R]]:
    """The rows by the part of the network that their names tell, as many parts as one can survey.

    Names are split at the first dot; further down while a single part holds most of the rows.
    """
    found = _split(layers, 1)
    for depth in range(2, _DEEPEST + 1):
        largest = max((len(b.layers) for b in found), default=0)
        if largest <= 1 or largest <= 0.6 * len(layers):
            break
        finer = _split(layers, depth)
        if len(finer) > _BLOCKS:
            break
        found = finer
    return found


def _split(layers: Sequence[R], depth: int) -> list[Block[R]]:
    parts: dict[str, list[R]] = {}
    for row in layers:
        parts.setdefault(".".join(row.name.split(".")[:depth]), []).append(row)
    return [Block(name, tuple(rows)) for name, rows in parts.items()]
