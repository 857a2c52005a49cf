"""docs/models.md is what its rows say, and its rows are what the tool measures today."""

from __future__ import annotations

import csv
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MACHINE = {"seconds", "version", "threads", "device", "torch", "commit", "date"}
ROUNDING = {"verified", "checked"}  # as small as another processor's rounding makes them
CHEAP = {
    "torchvision": ["squeezenet1_1", "mobilenet_v3_small"],
    "timm": ["lcnet_100"],
}


@pytest.fixture
def models(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    for name in ("table", "where", "subjects", "bench_models"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location("bench_models", ROOT / "bench" / "models.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(path: Path) -> dict[tuple[str, str, str], dict[str, str]]:
    with path.open(newline="") as stream:
        return {(r["library"], r["model"], r["asked"]): r for r in csv.DictReader(stream)}


def test_the_document_is_current(models):
    assert models.document(models.read(models.RESULTS)) == models.DOCUMENT.read_text(), (
        "run `python bench/models.py --table`"
    )


@pytest.mark.parametrize("library", CHEAP)
def test_rows_can_be_made_again(library, tmp_path):
    pytest.importorskip(library, reason=f"rows of {library} need it")
    script = [sys.executable, str(ROOT / "bench" / "models.py"), "--out", str(tmp_path / "m.csv")]
    words = [f"{library}:{name}" for name in CHEAP[library]]
    done = subprocess.run([*script, "--only", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    fresh, kept = rows(tmp_path / "m.csv"), rows(ROOT / "bench" / "results" / "models.csv")
    assert len(fresh) == len(words)
    for key, row in fresh.items():
        for column in row.keys() - MACHINE - ROUNDING - {"change"}:
            now, then = (without_lines(r[column]) for r in (row, kept[key]))
            assert now == then, (key, column)
        assert all(float(row[column]) <= 1e-9 for column in ROUNDING)
        assert float(row["change"]) == pytest.approx(float(kept[key]["change"]), rel=0.1)


def without_lines(text: str) -> str:
    """Lines of a library's file move with its version."""
    return re.sub(r"(\.py):\d+", r"\1", text)


def test_a_document_of_few_rows(models):
    """Counts, a network that was cut, one that was not, a reason, and nothing measured twice."""
    own = dict.fromkeys(models.COLUMNS, "") | {"library": "timm", "asked": "macs=0.5"}
    own |= {"version": "1.0", "device": "A processor", "threads": "1", "torch": "2.0"}
    cut = own | {"status": "ok", "shape": "1x3x8x8", "front_end": "fx", "groups": "3"}
    cut |= {"layers": "10", "cut_layers": "6", "rows": "64", "frozen_rows": "8", "inexact": "0"}
    cut |= {"macs_before": "2000000", "macs_after": "1000000", "seconds": "0.10"}
    cut |= {"verified": "1e-16", "checked": "3e-16", "reasons": "no rule for `f` (a.py:3) (2)"}
    failed = own | {"model": "resnet50d", "status": "refused", "error": "TraceError: a|b"}
    text = models.document([cut | {"model": "resnet18"}, failed])
    assert "| timm | **1** of 143 | 141 | 1 | 1 refused | 73 of 143 |" in text
    assert "| resnet18 | 1x3x8x8 | fx | 3 | 6/10 | 8/64 | 2 → 1 (50%) | 0 | 3e-16 | 0.10 |" in text
    assert "| no rule for `f` | 1 | resnet18 |" in text
    assert "| timm | resnet50d | macs=0.5 | refused | TraceError: a\\|b |" in text
    at = cut | {"model": "resnet18", "asked": "ratio=0.3"}
    assert "| resnet18 | 50%, 3e-16 |" in models.document([at])


def test_a_sweep_goes_on_where_it_stopped(models, tmp_path):
    path = tmp_path / "m.csv"
    first = dict.fromkeys(models.COLUMNS, "") | {"library": "timm", "model": "a", "asked": "x"}
    models.append(path, first | {"status": "crash"})
    models.append(path, first | {"model": "b"})
    models.append(path, first | {"status": "ok"})  # made anew
    assert [(r["model"], r["status"]) for r in models.read(path)] == [("a", "ok"), ("b", "")]
    path.write_text("library,model\n")
    with pytest.raises(ValueError, match="the columns are"):
        models.read(path)
