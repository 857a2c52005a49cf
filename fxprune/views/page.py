"""Reports and scans as one self-contained HTML page each.

Promise: no script, nothing fetched; good to read in light and dark, on a screen and on a phone; what
users named is escaped and shortened. A file is whole or not there. The same data give the same page.
"""

from __future__ import annotations

import contextlib
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fxprune._version import __version__
from fxprune.report import (
    Block,
    Curve,
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
    spans,
)
from fxprune.views import plots
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
    from matplotlib.figure import Figure

_FLAT = 12  # layers up to which they are not put into parts
_OPEN = 26  # layers up to which all parts are open
_FOLDED = 40  # groups of a scan from which on they are put into parts
_SPANS = 6  # modules that a group's row names
_NAMED = 8  # nodes that a reason shows at once
_NAME, _TITLE = 64, 120  # letters of a name in a table, and in a heading


def write_report(report: Report, path: str | os.PathLike[str]) -> None:
    """Write a report's page; OSError when the folder is missing or cannot be written."""
    write_text(path, report_page(report))


def write_sensitivity(scan: Scan, path: str | os.PathLike[str], drop: float = 0.01) -> None:
    """Write a scan's page; drop: what the score may lose for the proposed ratios."""
    title = f"Sensitivity of {scan.model} to pruning"
    text = sensitivity_page(
        title=title,
        baseline=scan.baseline,
        curves=scan.curves,
        proposals=scan.propose(drop),
        drop=drop,
    )
    write_text(path, text)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text as UTF-8, whole or not at all."""
    with _atomic(Path(path)) as temporary:
        # A name may hold half of a surrogate pair, which no file can.
        temporary.write_bytes(text.encode("utf-8", "replace"))


@contextlib.contextmanager
def _atomic(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` that takes its place at the end, or vanishes on an error."""
    temporary = path.with_name(f".{path.name[:200]}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _render(template: str, **values: Any) -> str:
    import torch
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    def source(name: str) -> str:
        return files("fxprune.views").joinpath(name).read_text(encoding="utf-8")

    environment = Environment(
        loader=FunctionLoader(source),
        autoescape=True,
        finalize=lambda value: clean(value) if type(value) is str else value,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    versions = f"fxprune {__version__}, torch {torch.__version__}"
    return environment.get_template(template).render(versions=versions, **values)


def _drawn(name: str, about: str, draw: Callable[[plots.Look], Figure]) -> str:
    """A drawing as HTML: the page shows the wide one on a screen, the narrow one on a phone."""
    both = []
    for look, size in ((plots.WIDE, "wide"), (plots.NARROW, "narrow")):
        with plots.settings(look):
            text = plots.svg(draw(look), f"{name}-{size}", about)
        both.append(f'<div class="plot {size}">{text}</div>')
    return "\n".join(both)


# ---- a report -----------------------------------------------------------------------------------


def report_page(report: Report) -> str:
    """The whole page as text."""
    score = scorer(list(report.stages.values()))
    layers = costly(report.layers)
    drawn: dict[str, Any] = {"stages": "", "profile": ""}
    if len(report.stages) > 1:
        draw = partial(plots.draw_stages, report.stages)
        drawn["stages"] = _drawn("stages", "Plot: the score by stage", draw)
    if layers:
        about = "Plot: channels and multiply-adds of every layer, before and after"
        drawn["profile"] = _drawn("profile", about, partial(plots.draw_profile, layers))
    remains = _remains(report)
    parts = _parts(layers)
    widest = max((g.before for g in report.groups), default=1) or 1
    return _render(
        "report.html",
        report=report,
        model=short(report.model, _TITLE),
        how=short(report.how, _TITLE),
        tiles=_tiles(report, score),
        remains=remains,
        any_asked=any(row["asked"] is not None for row in remains),
        timings=_timings(report),
        parts=parts,
        flat=all(len(part["rows"]) == 1 for part in parts),
        unfolded=len(layers) <= _OPEN or len(parts) == 1,
        layers_title=f"{counted(len(layers), 'layer')}, from the input to the output",
        others=_others(report.layers),
        metrics=[
            (m.label, f"{m.before:,}", f"{m.after:,}", percent(m.remains)) for m in headline(report)
        ],
        groups_title=groups_title(report),
        groups=[
            {
                "name": g.name,
                "short": short(g.name, _NAME),
                "before": g.before,
                "after": g.after,
                "was": _part(g.before, widest),
                "now": _part(g.after, widest),
                "spans": some([short(m, _NAME) for m in spans(g.name, g.members)], _SPANS),
            }
            for g in report.groups
        ],
        reasons=_reasons(report),
        stages=[(short(name, _NAME), score(value)) for name, value in report.stages.items()],
        plots=drawn,
    )


def _part(value: float, whole: float) -> str:
    """A share in percent, as styles write it."""
    share = 100 * value / whole if whole and math.isfinite(value / whole) else 0.0
    return f"{min(max(share, 0.0), 100.0):.2f}".rstrip("0").rstrip(".")


def _tiles(report: Report, score: Callable[[float], str]) -> list[dict[str, str]]:
    """The few numbers that a reader looks for first."""
    tiles = [
        {
            "label": m.label,
            "value": percent(m.remains),
            "unit": "remain",
            "detail": f"{si(m.before)} → {si(m.after)}",
        }
        for m in headline(report)
        if m.before
    ]
    by_batch = list(batches(report.timings).items())
    if by_batch and len(by_batch[-1][1]) > 1:  # the last batch size: overheads are hidden there
        batch, rows = by_batch[-1]
        ms = timer(t.median_ms for t in rows)
        value, _, unit = gain(rows[-1], rows[0]).partition(" ")
        tiles.append(
            {
                "label": f"latency, batch {batch}",
                "value": value or "-",
                "unit": unit,
                "detail": f"{ms(rows[0].median_ms)} → {ms(rows[-1].median_ms)} ms",
            }
        )
    if len(report.stages) > 1:
        first, *_, last = report.stages.items()
        tiles.append(
            {
                "label": f"score, {short(last[0], _NAME)}",
                "value": score(last[1]),
                "unit": "",
                "detail": f"{score(first[1])} {short(first[0], _NAME)}",
            }
        )
    return tiles


def _remains(report: Report) -> list[dict[str, Any]]:
    """What is left of multiply-adds, parameters and time, beside what was asked for."""
    rows = [
        {
            "label": m.label,
            "after": _part(m.after, m.before),
            "asked": None if m.asked is None else _part(m.asked, 1.0),
            "wanted": "" if m.asked is None else percent(m.asked),
            "text": percent(m.remains),
        }
        for m in headline(report)
        if m.before
    ]
    for batch, timings in batches(report.timings).items():
        first, last = timings[0], timings[-1]
        if len(timings) > 1 and first.median_ms > 0:
            share = last.median_ms / first.median_ms
            label = f"time, batch {batch}"
            part = {"label": label, "after": _part(share, 1.0), "asked": None, "wanted": ""}
            rows.append({**part, "text": percent(share)})
    return rows


def _timings(report: Report) -> list[tuple[int, list[dict[str, str]]]]:
    """Bars of latency by batch size, each batch size on a scale of its own."""
    found = []
    for batch, rows in batches(report.timings).items():
        ms = timer(t.median_ms for t in rows)
        ends = [v for r in rows for v in (r.median_ms, r.p80_ms) if math.isfinite(v)]
        most = max(ends, default=1.0) or 1.0
        lines = [
            {
                "name": short(r.name, _NAME),
                "median": _part(r.median_ms, most),
                "low": _part(r.p20_ms, most),
                "spread": _part(r.p80_ms - r.p20_ms, most),
                "text": f"{ms(r.median_ms)} ms ({ms(r.p20_ms)} to {ms(r.p80_ms)})",
                "gain": gain(r, rows[0]),
            }
            for r in rows
        ]
        found.append((batch, lines))
    return found


def _parts(layers: Sequence[LayerRow]) -> list[dict[str, Any]]:
    """Layers by part of the network, each with its sums, as bars on one scale."""
    alone = [Block(row.name, (row,)) for row in layers]
    found = blocks(layers) if len(layers) > _FLAT else alone
    widest = max((row.channels_before for row in layers), default=1)
    dearest = max((row.macs_before for row in layers), default=1)
    sums = [(b.total("channels_before"), b.total("macs_before")) for b in found]
    most = max((c for c, _ in sums), default=1), max((m for _, m in sums), default=1)
    parts = []
    for block in found:
        scale = most if len(block.layers) == 1 else (widest, dearest)
        whole = _bar_row(
            block.name,
            "",
            {
                f"{what}_{when}": block.total(f"{what}_{when}")
                for what in ("channels", "macs", "params")
                for when in ("before", "after")
            },
            most,
        )
        rows = [_bar_row(row.name, row.kind, vars(row), scale) for row in block.layers]
        parts.append({"rows": rows, "sum": whole, "count": counted(len(rows), "layer")})
    return parts


def _bar_row(
    name: str, kind: str, counts: Mapping[str, Any], most: tuple[int, int]
) -> dict[str, Any]:
    """A line of two bars with their numbers."""
    parameters = _change(counts["params_before"], counts["params_after"], lambda n: f"{n:,}")
    row: dict[str, Any] = {
        "name": name,
        "short": short(name, _NAME),
        "kind": "" if kind == "conv" else kind,
        "about": f"{short(name, _TITLE)}: {parameters} parameters",
    }
    for what, write, scale in (("channels", str, most[0]), ("macs", si, most[1])):
        before, after = counts[f"{what}_before"], counts[f"{what}_after"]
        row[what] = {
            "before": _part(before, scale),
            "after": _part(after, scale),
            "changed": before != after,
            "text": _change(before, after, write) if before or after else "",
        }
    return row


def _change(before: int, after: int, write: Callable[[int], str]) -> str:
    return write(before) if before == after else f"{write(before)} → {write(after)}"


def _others(layers: Sequence[LayerRow]) -> str:
    """What layers that multiply nothing hold."""
    shown = {id(row) for row in costly(layers)}
    said = []
    for noun, kinds in (("normalisation", ("norm",)), ("other holder", ())):
        rows = [r for r in layers if id(r) not in shown and (r.kind == "norm") == bool(kinds)]
        if rows:
            before, after = (sum(getattr(r, f"params_{w}") for r in rows) for w in _WHEN)
            held = _change(before, after, lambda n: f"{n:,}")
            said.append(f"{counted(len(rows), noun)} with {held} parameters")
    return f"Not shown, for they multiply nothing: {' and '.join(said)}." if said else ""


_WHEN = ("before", "after")


def _reasons(report: Report) -> list[dict[str, Any]]:
    found = []
    for why, nodes in reasons(report.frozen).items():
        names = [(short(node, 4 * _TITLE), short(node, _NAME)) for node in nodes]
        few = len(names) <= _NAMED + 2
        found.append(
            {
                "why": why,
                "count": counted(len(names), "place"),
                "first": names if few else names[:_NAMED],
                "rest": [] if few else names[_NAMED:],
            }
        )
    return found


# ---- a scan of sensitivity ----------------------------------------------------------------------


def sensitivity_page(
    *,
    title: str,
    baseline: float,
    curves: Sequence[Curve],
    proposals: Mapping[str, float],
    drop: float,
    notes: Sequence[str] = (),
) -> str:
    """The page of a scan as text; several scans can stand in one page.

    baseline: the score of the whole network. curves: one per group and method, in graph order.
    proposals: {group: share to remove}, found by the first method with a tolerated `drop` of score.
    """
    scores = [baseline, *(p.score for c in curves for p in c.points)]
    write = scorer(scores)
    methods = list(dict.fromkeys(c.method for c in curves))
    first = {c.name: c for c in reversed(curves) if c.method == methods[0]} if methods else {}
    ordered = [c for c in curves if c is first.get(c.name)]
    tolerated = dropped(drop, are_shares(scores))
    drawn: dict[str, Any] = {"curves": "", "compare": ""}
    if curves:
        draw = partial(plots.draw_curves, baseline, curves, drop)
        drawn["curves"] = _drawn("curves", "Plot: the score by what was removed, per group", draw)
    if len(methods) > 1:
        draw = partial(plots.draw_comparison, baseline, curves, drop)
        drawn["compare"] = _drawn("compare", "Plot: the mean score by method", draw)
    parts = blocks(ordered)
    return _render(
        "sensitivity.html",
        title=short(title, _TITLE),
        notes=notes,
        tiles=_scan_tiles(baseline, ordered, proposals, write, tolerated),
        parts=[_proposed(block, proposals, write) for block in parts],
        folded=len(ordered) > _FOLDED and len(parts) < len(ordered),
        drop=f"at most {tolerated}",
        plots=drawn,
    )


def _scan_tiles(
    baseline: float,
    curves: Sequence[Curve],
    proposals: Mapping[str, float],
    write: Callable[[float], str],
    tolerated: str,
) -> list[dict[str, str]]:
    """The whole network's score, the least and the most that its groups bear."""
    tiles = [
        {
            "label": "score of the whole network",
            "value": write(baseline),
            "unit": "",
            "detail": f"{counted(len(curves), 'group')} scanned",
        }
    ]
    borne = [(proposals.get(c.name, 0.0), c) for c in curves]
    if borne:
        able = [c for ratio, c in borne if ratio]
        removed = sum(ratio * c.channels for ratio, c in borne)
        total = sum(c.channels for c in curves)
        tiles.append(
            {
                "label": f"may lose channels, at {tolerated}",
                "value": f"{len(able)}",
                "unit": f"of {counted(len(borne), 'group')}",
                "detail": f"{percent(removed / total if total else None, 0)} of all channels",
            }
        )
        means = [(_mean(c), c) for c in curves]
        worst = min(means, key=lambda pair: pair[0])[1]
        tiles.append(
            {
                "label": "most sensitive",
                "value": short(worst.name, 40),
                "unit": "",
                "detail": f"{write(_mean(worst))} on average",
                "word": "yes",
            }
        )
    return tiles


def _mean(curve: Curve) -> float:
    scores = [p.score for p in curve.points if math.isfinite(p.score)]
    return sum(scores) / len(scores) if scores else math.inf


def _proposed(
    block: Block[Curve], proposals: Mapping[str, float], write: Callable[[float], str]
) -> dict[str, Any]:
    rows = []
    for curve in block.layers:
        ratio = proposals.get(curve.name, 0.0)
        there = next((p.score for p in curve.points if math.isclose(p.ratio, ratio)), None)
        rows.append(
            {
                "name": curve.name,
                "short": short(curve.name, _NAME),
                "channels": counted(curve.channels, "channel"),
                "share": float(_part(ratio, 1.0)),
                "ratio": percent(ratio, 0) if ratio else "none",
                "there": "" if there is None or not ratio else write(there),
            }
        )
    removed = sum(proposals.get(c.name, 0.0) * c.channels for c in block.layers)
    total = sum(c.channels for c in block.layers)
    return {
        "rows": rows,
        "sum": {
            "name": block.name,
            "short": short(block.name, _NAME),
            "channels": counted(len(rows), "group"),
            "share": float(_part(removed, total)),
            "ratio": percent(removed / total if total else None, 0),
            "there": "",
        },
    }


def sensitivity_figure(
    *,
    title: str,
    baseline: float,
    curves: Sequence[Curve],
    drop: float,
) -> Figure:
    """The drawings of `sensitivity_page` as one figure in light colours, to save as SVG or PNG.

    Arguments as there; save it with `figure.savefig(path)`.
    """
    with plots.settings(plots.PRINTED):
        figure = plots.draw_scan(title=title, baseline=baseline, curves=curves, drop=drop)
        figure.draw_without_rendering()  # labels are made now, while these settings hold
        return figure
