"""`fxprune report`: every file of a run can be shown, as text, JSON and page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fxprune
from fxprune.report import Curve, Point, Report
from fxprune.sensitivity import Sensitivity


@pytest.fixture
def folder(net, document):
    found, _ = document("compile", net, "--input-size", "1x1x8x8", "--no-latency", "--ratio", "0.5")
    return Path(found["out"])


def test_a_folder_and_its_report(folder, run, document):
    code, by_folder, err = run("report", folder)
    assert (code, err) == (0, "")
    code, by_file, _ = run("report", folder / "report.json")
    assert by_folder == by_file
    assert "Sequential" in by_file
    found, _ = document("report", folder)
    assert found["report"] == json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("name", ["net.safetensors", "plan.json"])
def test_a_plan(name, folder, run, document):
    code, out, err = run("report", folder / name)
    assert (code, err) == (0, "")
    found, _ = document("report", folder / name)
    report = Report.from_json((folder / "report.json").read_text())
    assert found["report"]["metrics"] == report.metrics
    rows = {g["name"]: (g["before"], g["after"]) for g in found["report"]["groups"]}
    assert rows == {"0": (6, 3), "3": (12, 6)}  # no norms
    assert "channels by group" in out.lower()
    assert ("SHA-256" in out) == (name == "net.safetensors")


def test_a_scan(tmp_path, run, document):
    points = (Point(0.1, 9, 0.9), Point(0.5, 5, 0.4))
    scan = Sensitivity("Net", 0.92, (Curve("conv", 10, "l1 smallest", points),))
    (tmp_path / "sensitivity.json").write_text(scan.to_json())
    code, out, _ = run("report", tmp_path)
    assert code == 0
    assert "conv" in out
    found, _ = document("report", tmp_path / "sensitivity.json")
    assert found["report"] == scan.to_dict()


def test_the_page(folder, run, tmp_path):
    page = tmp_path / "page.html"
    code, out, _ = run("report", folder, "--html", page)
    assert code == 0
    assert f"written: {page}" in out
    assert page.stat().st_size > 0


def test_what_is_something_else(tmp_path, folder, run):
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "text.json").write_text("no")
    (tmp_path / "empty").mkdir()
    for name, code, text in (
        ("other.json", 1, "this is no file of fxprune's"),
        ("text.json", 1, "this is no file of fxprune's"),
        ("empty", 2, "holds no report"),
        ("gone.json", 2, "there is no file"),
    ):
        got, _, err = run("report", tmp_path / name)
        assert got == code
        assert text in err
        assert err.count("\n") == 1
    damaged = bytearray((folder / "net.safetensors").read_bytes())
    damaged[-1] ^= 1
    (folder / "net.safetensors").write_bytes(damaged)
    code, _, err = run("report", folder / "net.safetensors")
    assert code == 1
    assert "SHA-256" in err or "damaged" in err


def test_a_plan_that_is_wrong_says_where(folder, run):
    plan = json.loads((folder / "plan.json").read_text())
    plan["slices"][0]["keep"] = [99]
    (folder / "plan.json").write_text(json.dumps(plan))
    code, _, err = run("report", folder / "plan.json")
    assert code == 1
    assert "slices[0]" in err
    assert fxprune.PlanError.__name__ not in err


def test_a_page_that_cannot_be_written_is_named(folder, run, tmp_path):
    page = tmp_path / "none" / "x.html"
    code, out, err = run("report", folder, "--html", page)
    assert (code, out) == (1, "")
    assert f"the page cannot be written: No such file or directory; at: {page}; fix:" in err
