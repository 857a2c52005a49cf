"""The tables in the READMEs are what bench/table.py makes of the rows in bench/results/."""

import importlib.util
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


@pytest.mark.parametrize(
    "path", sorted((ROOT / "bench" / "results").glob("*.csv")), ids=lambda p: p.stem
)
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
