"""Rows of bench/results/ -> the tables between `<!-- bench:STEM -->` and `<!-- /bench -->`.

    python bench/table.py            write the tables into README.md and bench/README.md
    python bench/table.py --check    change nothing; exit 1 if a table is not current

One table for each `bench` and device of results/STEM.csv: a line per case, a column per provider, p50
with p20-p80 behind it. Where fxprune's first column has a rival, the last column is their ratio.
results/latency.csv has one table for each device, with a column per form, and a figure (`plot.py`).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import math
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = (
    "bench", "case", "provider", "p20", "p50", "p80", "unit", "rounds", "shape", "dtype", "threads",
    "device", "torch", "commit", "date",
)  # fmt: skip
# results/models.csv is a document of its own (`models.py --table`); these two are no timings
PEERS = (
    "library", "model", "ratio", "provider", "shape", "macs_before", "macs_after", "error", "failure",
    "seconds", "threads", "device", "torch", "commit", "date",
)  # fmt: skip
APART = ("models", "peers")
SPAN = re.compile(r"(<!-- bench:(?P<stem>[\w-]+) -->\n).*?(<!-- /bench -->)", re.DOTALL)
Row = dict[str, str]


def read(path: Path, columns: Sequence[str] = COLUMNS) -> list[Row]:
    """The rows of one file; every column must be there, and no other."""
    with path.open(newline="") as stream:
        reader = csv.DictReader(stream)
        rows = list(reader)
    if tuple(reader.fieldnames or ()) != tuple(columns):
        raise ValueError(f"{path.name}: the columns are {reader.fieldnames}, not {list(columns)}")
    return rows


def write(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to a file; a new row replaces the old one of the same bench, case, provider, device."""
    kept = {identity(row): row for row in (read(path) if path.exists() else [])}
    kept |= {identity(row): row for row in rows}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept.values())


def identity(row: Row) -> tuple[str, ...]:
    """What two rows of the same measurement agree in."""
    return tuple(
        row[c] for c in ("bench", "case", "provider", "shape", "dtype", "threads", "device")
    )


def number(value: float) -> str:
    """Three figures, and no more than a reader needs of large numbers."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def ratio(ours: float, rival: float) -> str:
    """Ours over the rival's, with two figures."""
    value = ours / rival
    return f"{value:.2f}x" if value >= 0.1 else f"{value:.3f}x"


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Least-squares slope of log y over log x."""
    xs = [math.log(x) for x, _ in points]
    ys = [math.log(y) for _, y in points]
    x0, y0 = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - x0) * (y - y0) for x, y in zip(xs, ys, strict=True)) / sum((x - x0) ** 2 for x in xs)  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """One bench on one device, as Markdown."""
    by = {(row["case"], row["provider"]): row for row in rows}
    cases = list(dict.fromkeys(row["case"] for row in rows))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    ours = next((p for p in providers if p.startswith("fxprune")), None)
    rival = next((p for p in providers if not p.startswith("fxprune")), None)
    compared = ours is not None and rival is not None

    lines = [["case", "shape", *providers, *([f"{ours} / {rival}"] if compared else [])]]
    for case in cases:
        shapes = dict.fromkeys(row["shape"] for row in rows if row["case"] == case)
        line = [case, ", ".join(shapes)]
        for provider in providers:
            row = by.get((case, provider))
            if row is None:
                line.append("-")
            else:
                shown = "{:.2f}".format if row["unit"].startswith("%") else number
                low, mid, high = (shown(float(row[p])) for p in ("p20", "p50", "p80"))
                line.append(f"**{mid}** ({low}-{high})" if row["rounds"] != "1" else mid)
        if compared:
            pair = [by.get((case, provider)) for provider in (ours, rival)]
            line.append("-" if None in pair else ratio(*(float(row["p50"]) for row in pair)))
        lines.append(line)
    rule = ["---", "---", *["---:"] * (len(lines[0]) - 2)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def caption(rows: Sequence[Row], shown: str = "p50 (p20-p80)") -> str:
    """What the numbers are, and where they were measured."""

    def every(column: str) -> str:
        return ", ".join(dict.fromkeys(row[column] for row in rows))

    threads = "" if every("threads") == "0" else f" {every('threads')} thread(s),"  # 0: on a GPU
    return (
        f"{every('unit')}{shown and ', ' + shown}; {every('device')},{threads} "
        f"{every('dtype')}, torch {every('torch')}; commit {every('commit')}, {every('date')}"
    )


# --- latency: original -> pruned -> pruned+folded, in several forms ---------------------------------


def machines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each machine (device and threads), under a name that a file can have."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        words = row["device"] + ("" if row["threads"] == "0" else f" {row['threads']}")
        found.setdefault(re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-"), []).append(row)
    return found


def forms_of(rows: Sequence[Row]) -> list[str]:
    """The forms that were measured, in their order; "macs" is a count, not a form."""
    return list(dict.fromkeys(row["bench"] for row in rows if row["bench"] != "macs"))


def latency_table(rows: Sequence[Row]) -> str:
    """One machine's latencies as Markdown, and below it where a smaller graph is not a faster one."""
    value = {(r["case"], r["shape"], r["bench"], r["provider"]): float(r["p50"]) for r in rows}
    graphs = list(dict.fromkeys(row["provider"] for row in rows))
    forms = forms_of(rows)
    lines, slow = [], []
    for case, shape in dict.fromkeys((row["case"], row["shape"]) for row in rows):
        batch = shape.partition("x")[0]
        macs = [value[case, shape, "macs", graph] for graph in graphs]
        cells, fastest = [], {}
        for form in forms:
            times = {
                g: value[case, shape, form, g] for g in graphs if (case, shape, form, g) in value
            }
            first = times.get(graphs[0])
            said = []
            for graph, ms in times.items():
                fastest[graph] = min(ms, fastest.get(graph, math.inf))
                compared = first is not None and graph != graphs[0]
                said.append(number(ms) + (f" ({ratio(ms, first)})" if compared else ""))
                if compared and ms > 0.95 * first:
                    slow.append(f"{case} at batch {batch}, {form}, {graph} ({ratio(ms, first)})")
            cells.append(" → ".join(said) or "-")
        best = min((ms for graph, ms in fastest.items() if graph != graphs[0]), default=None)
        both = best is not None and graphs[0] in fastest
        cells.append(f"**{ratio(best, fastest[graphs[0]])}**" if both else "-")
        lines.append([case, batch, f"{min(macs) / macs[0]:.0%}", *cells])
    head = ["network", "batch", "MACs left", *forms, "fastest / fastest"]
    rule = ["---", "---:", "---:", *["---"] * len(forms), "---:"]
    text = "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *lines])
    if slow:
        text += "\n\nNot faster than the original by 5 % or more: " + "; ".join(slow) + "."
    return text


def render_latency(rows: Sequence[Row]) -> str:
    """Figure, table and caption of every machine."""
    parts = []
    for name, chosen in machines(rows).items():
        times = [row for row in chosen if row["bench"] != "macs"]
        graphs = " → ".join(dict.fromkeys(row["provider"] for row in times))
        parts.append(
            f"![Milliseconds per call, {chosen[0]['device']}](bench/results/latency-{name}.svg)"
        )
        parts.append(latency_table(chosen))
        said = f"{graphs} (share of the original's time), last the fastest pruned over the fastest original"
        parts.append(f"{said}; {caption(times, 'p50')}")
    return "\n\n".join(parts)


def digest(rows: Sequence[Row]) -> str:
    """What a figure carries, to tell whether it was drawn from these rows."""
    text = "\n".join(",".join(row[c] for c in COLUMNS) for row in rows)
    return hashlib.sha256(text.encode()).hexdigest()


def stale_figures(results: Path) -> dict[Path, list[Row]]:
    """The figures that are missing or drawn from other rows, and the rows they should show."""
    path = results / "latency.csv"
    wanted = machines(read(path)) if path.exists() else {}
    figures = {results / f"latency-{name}.svg": rows for name, rows in wanted.items()}
    return {
        figure: rows
        for figure, rows in figures.items()
        if not figure.exists() or digest(rows) not in figure.read_text()
    }


# --- peers: the same cut by two tools, and how far each is from the masked original -------------------


def render_peers(rows: Sequence[Row]) -> str:
    """A line per network; per tool its error or failure, the MACs left, and the seconds."""
    by = {(r["library"], r["model"], r["ratio"], r["provider"]): r for r in rows}
    tools = sorted(
        dict.fromkeys(r["provider"] for r in rows), key=lambda t: t.startswith("fxprune")
    )
    lines = []
    for case in dict.fromkeys(key[:3] for key in by):
        cells = [f"{case[0]} {case[1]}", case[2]]
        for tool in tools:
            cells += peer_cells(by.get((*case, tool)))
        lines.append(cells)
    head = ["network", "ratio"]
    for tool in tools:
        head += [f"{tool}: relative error", "MACs left", "seconds"]
    rule = ["---", "---:", *["---:"] * (len(head) - 2)]
    text = "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *lines])
    one = [{**row, "unit": "seconds", "dtype": "float64"} for row in rows]
    return f"{text}\n\n{caption(one, '')}"


def peer_cells(row: Row | None) -> list[str]:
    """Three cells; an error that is more than rounding is bold."""
    if row is None:
        return ["-"] * 3
    left = (
        f"{float(row['macs_after']) / float(row['macs_before']):.0%}" if row["macs_after"] else "-"
    )
    if row["failure"]:
        said = row["failure"].partition(" | ")[0].replace("|", "\\|")
        return [f"fails: {said[:100]}", left, row["seconds"] or "-"]
    error = row["error"] if float(row["error"]) <= 1e-9 else f"**{row['error']}**"
    return [error, left, row["seconds"]]


# --- every file -------------------------------------------------------------------------------------


def render(rows: Sequence[Row]) -> str:
    """Every table of one file of rows."""
    parts = []
    for bench, device in dict.fromkeys((row["bench"], row["device"]) for row in rows):
        chosen = [row for row in rows if (row["bench"], row["device"]) == (bench, device)]
        once = all(row["rounds"] == "1" for row in chosen)
        parts += [f"**{bench}**", table(chosen), caption(chosen, "" if once else "p50 (p20-p80)")]
    return "\n\n".join(parts)


def splice(text: str, results: Path) -> str:
    """The text with the content of every span made new."""

    def fresh(span: re.Match[str]) -> str:
        path = results / f"{span['stem']}.csv"
        if not path.exists():
            raise FileNotFoundError(f"a table is wanted for bench:{span['stem']}, but there is no {path.name}")  # fmt: skip
        if span["stem"] == "peers":
            made = render_peers(read(path, PEERS))
        else:
            made = (render_latency if span["stem"] == "latency" else render)(read(path))
        return f"{span[1]}\n{made}\n\n{span[3]}"

    return SPAN.sub(fresh, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="exit 1 if a table is not current")
    check = parser.parse_args(argv).check
    stale = False
    for figure, rows in stale_figures(ROOT / "bench" / "results").items():
        stale = True
        print(f"{figure.relative_to(ROOT)}: {'not current' if check else 'drawn'}")
        if not check:
            from plot import draw

            draw(rows, figure)
    for path in (ROOT / "README.md", ROOT / "bench" / "README.md"):
        old = path.read_text()
        new = splice(old, ROOT / "bench" / "results")
        if new == old:
            continue
        stale = True
        print(f"{path.relative_to(ROOT)}: {'not current' if check else 'written'}")
        if not check:
            path.write_text(new)
    return int(check and stale)


if __name__ == "__main__":
    sys.exit(main())
