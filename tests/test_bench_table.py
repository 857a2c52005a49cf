"""The tables in the READMEs are what bench/table.py makes of the rows in bench/results/."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("bench_table", ROOT / "bench" / "table.py")
table = importlib.util.module_from_spec(spec)
spec.loader.exec_module(table)


@pytest.mark.parametrize("name", ["README.md", "bench/README.md"])
def test_the_tables_are_current(name):
    text = (ROOT / name).read_text()
    assert text.count("<!-- bench:") == len(table.SPAN.findall(text)), "a span is not closed"
    assert table.splice(text, ROOT / "bench" / "results") == text, "run `python bench/table.py`"


TIMINGS = [p for p in (ROOT / "bench" / "results").glob("*.csv") if p.stem not in table.APART]


@pytest.mark.parametrize("path", sorted(TIMINGS), ids=lambda p: p.stem)
def test_rows_are_whole(path):
    rows = table.read(path)
    assert len({table.identity(row) for row in rows}) == len(rows)
    for row in rows:
        assert float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
        assert all(row.values()), row


def row(case, provider, p50, **other):
    values = {"p20": p50 * 0.9, "p50": p50, "p80": p50 * 1.5, "bench": "toy", "unit": "ms"}
    values |= {
        "rounds": 5,
        "shape": "1x3",
        "dtype": "float32",
        "threads": 1,
        "device": "A processor",
    }
    values |= {
        "torch": "2.0",
        "commit": "abc",
        "date": "2026-01-02",
        "case": case,
        "provider": provider,
    }
    return {column: str((values | other)[column]) for column in table.COLUMNS}


ROWS = [
    row("small", "fxprune", 10),
    row("small", "rival", 40),
    row("large", "fxprune", 300),
    row("large", "rival", 6000),
    row("alone", "fxprune", 2),
]
WANTED = """\
before
<!-- bench:toy -->

**toy**

| case | shape | fxprune | rival | fxprune / rival |
| --- | --- | ---: | ---: | ---: |
| small | 1x3 | **10.0** (9.00-15.0) | **40.0** (36.0-60.0) | 0.25x |
| large | 1x3 | **300** (270-450) | **6,000** (5,400-9,000) | 0.050x |
| alone | 1x3 | **2.00** (1.80-3.00) | - | - |

ms, p50 (p20-p80); A processor, 1 thread(s), float32, torch 2.0; commit abc, 2026-01-02

<!-- /bench -->
after
"""


def test_a_table(tmp_path):
    table.write(tmp_path / "toy.csv", ROWS)
    new = table.splice("before\n<!-- bench:toy -->\nold\n<!-- /bench -->\nafter\n", tmp_path)
    assert new == WANTED
    assert table.splice(new, tmp_path) == new


def peer(provider, **other):
    values = {"library": "timm", "model": "net", "ratio": "0.5", "macs_before": "200"}
    values |= {"shape": "1x3x8x8", "threads": "1", "device": "A processor", "torch": "2.0"}
    values |= {"commit": "abc", "date": "2026-01-02", "provider": provider}
    return dict.fromkeys(table.PEERS, "") | values | other


def test_a_table_of_peers():
    rows = [
        peer("fxprune", macs_after="100", error="2.0e-16", seconds="0.50"),
        peer("rival", macs_after="90", error="2.1e-01", seconds="0.25"),
        peer("fxprune", model="other", macs_after="50", error="0.0e+00", seconds="1.00"),
        peer("rival", model="other", failure="KeyError: a|b | at file.py:3 in f"),
    ]
    text = table.render_peers(rows)
    assert "| timm net | 0.5 | **2.1e-01** | 45% | 0.25 | 2.0e-16 | 50% | 0.50 |" in text
    assert "| timm other | 0.5 | fails: KeyError: a\\|b | - | - | 0.0e+00 | 25% | 1.00 |" in text
    assert text.endswith(
        "seconds; A processor, 1 thread(s), float64, torch 2.0; commit abc, 2026-01-02"
    )


def test_a_new_row_replaces_the_old_one_in_place(tmp_path):
    path = tmp_path / "toy.csv"
    table.write(path, ROWS)
    table.write(path, [row("small", "rival", 50), row("small", "rival", 1, device="Another")])
    again = table.read(path)
    assert [r["p50"] for r in again] == ["10", "50", "300", "6000", "2", "1"]
    assert table.render(again).count("**toy**") == 2  # a table for each device


def test_columns_are_checked(tmp_path):
    (tmp_path / "toy.csv").write_text("bench,case\na,b\n")
    with pytest.raises(ValueError, match="the columns are"):
        table.read(tmp_path / "toy.csv")


def test_a_table_without_rows_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="bench:toy"):
        table.splice("<!-- bench:toy -->\n<!-- /bench -->", tmp_path)


def test_a_slope():
    assert table.slope([(250, 1.0), (1000, 4.0), (4000, 16.0)]) == pytest.approx(1.0)
    assert table.slope([(10, 1.0), (100, 100.0)]) == pytest.approx(2.0)


# ---- latency: a table with a column per form, and a figure --------------------------------------

LATENCY = ROOT / "bench" / "results" / "latency.csv"
TIMES = {  # form: original, pruned, pruned+folded at batch 1; at batch 8
    "macs": ((200, 100, 100), (200, 100, 100)),
    "eager": ((10, 6, 5), (80, 79, 40)),
    "inductor": ((8, 9, 4), (70, 30, 20)),
}
GRAPHS = ("original", "pruned", "pruned+folded")
LATENCIES = [
    row("net", graph, ms, bench=form, shape=f"{batch}x3x8x8")
    for form, both in TIMES.items()
    for batch, values in zip((1, 8), both, strict=True)
    for graph, ms in zip(GRAPHS, values, strict=True)
]
WANTED_LATENCIES = """\
![Milliseconds per call, A processor](bench/results/latency-a-processor-1.svg)

| network | batch | MACs left | eager | inductor | fastest / fastest |
| --- | ---: | ---: | --- | --- | ---: |
| net | 1 | 50% | 10.0 → 6.00 (0.60x) → 5.00 (0.50x) | 8.00 → 9.00 (1.12x) → 4.00 (0.50x) | **0.50x** |
| net | 8 | 50% | 80.0 → 79.0 (0.99x) → 40.0 (0.50x) | 70.0 → 30.0 (0.43x) → 20.0 (0.29x) | **0.29x** |

Not faster than the original by 5 % or more: net at batch 1, inductor, pruned (1.12x); net at batch 8, eager, pruned (0.99x).

original → pruned → pruned+folded (share of the original's time), last the fastest pruned over the \
fastest original; ms, p50; A processor, 1 thread(s), float32, torch 2.0; commit abc, 2026-01-02"""


def test_a_table_of_latencies(tmp_path):
    assert table.render_latency(LATENCIES) == WANTED_LATENCIES
    table.write(tmp_path / "latency.csv", LATENCIES)
    text = "<!-- bench:latency -->\n<!-- /bench -->"
    assert WANTED_LATENCIES in table.splice(text, tmp_path)


def test_a_table_of_some_latencies():
    """One form left out on one machine, one graph in another: a dash, and no wrong ratio."""
    some = [r for r in LATENCIES if r["bench"] != "eager" or r["shape"][0] == "1"]
    some = [r for r in some if r["bench"] != "inductor" or r["provider"] != "original"]
    text = table.render_latency(some)
    assert (
        "| net | 1 | 50% | 10.0 → 6.00 (0.60x) → 5.00 (0.50x) | 9.00 → 4.00 | **0.40x** |" in text
    )
    assert "| net | 8 | 50% | - | 30.0 → 20.0 | - |" in text


def test_machines_stay_apart():
    gpu = [r | {"device": "NVIDIA H200", "threads": "0"} for r in LATENCIES]
    names = table.machines([*LATENCIES, *gpu])
    assert {name: len(rows) for name, rows in names.items()} == {
        "a-processor-1": len(LATENCIES),
        "nvidia-h200": len(gpu),
    }
    text = table.render_latency([*LATENCIES, *gpu])
    assert text.count("| network |") == 2
    assert "NVIDIA H200, float32" in text  # and no threads


def test_the_figures_are_current():
    stale = [path.name for path in table.stale_figures(ROOT / "bench" / "results")]
    assert not stale, "run `python bench/table.py`"
    wanted = table.machines(table.read(LATENCY)) if LATENCY.exists() else {}
    drawn = {path.name for path in LATENCY.parent.glob("latency-*.svg")}
    assert drawn == {f"latency-{name}.svg" for name in wanted}


def test_a_figure(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    monkeypatch.setitem(sys.modules, "table", table)
    spec = importlib.util.spec_from_file_location("bench_plot", ROOT / "bench" / "plot.py")
    plot = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plot)
    table.write(tmp_path / "latency.csv", LATENCIES)
    ((path, rows),) = table.stale_figures(tmp_path).items()
    plot.draw(rows, path)
    first = path.read_bytes()
    assert not table.stale_figures(tmp_path)
    plot.draw(rows, path)
    assert path.read_bytes() == first  # drawn again, nothing to commit
    table.write(tmp_path / "latency.csv", [LATENCIES[-1] | {"p50": "21"}])
    assert list(table.stale_figures(tmp_path)) == [path]


def test_latencies_are_measured(tmp_path):
    """The script itself, on its smallest network; the rows of another machine stay."""
    out = tmp_path / "latency.csv"
    table.write(out, LATENCIES)
    words = ["--only", "resnet56", "--forms", "eager", "channels_last", "--batches", "1"]
    script = [sys.executable, str(ROOT / "bench" / "latency.py"), *words, "--rounds", "1"]
    done = subprocess.run([*script, "--out", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = table.read(out)
    assert rows[: len(LATENCIES)] == LATENCIES
    (machine, theirs) = [*table.machines(rows).items()][1]
    assert len(theirs) == 9  # three graphs: MACs and two forms
    assert "| resnet56 | 1 | 50% |" in table.render_latency(theirs)
    assert machine.endswith("-1")
