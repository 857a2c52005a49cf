"""`fxprune analyze`: the groups, and the scan of what they bear."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fxprune
from fxprune import zoo
from fxprune.cli import specs
from fxprune.report import AnalysisRow
from fxprune.sensitivity import Sensitivity
from fxprune.views.tables import analysis_text


def test_the_groups_and_their_cost(run, document):
    code, out, err = run("analyze", "zoo:resnet20", "--input-size", "1x3x32x32")
    assert (code, err) == (0, "")
    assert "40,551,040 MACs per sample of 1x3x32x32, 269,722 parameters" in out
    assert "layer1.0.conv1" in out
    found, _ = document("analyze", "zoo:resnet20", "--input-size", "1x3x32x32")
    analysis = fxprune.analyze(zoo.resnet20(), torch.zeros(1, 3, 32, 32))
    assert found["macs"] == 40_551_040
    assert found["params"] == 269_722
    assert [g["name"] for g in found["groups"]] == [g.name for g in analysis.groups]
    assert [g["kind"] for g in found["groups"]] == [g.kind for g in analysis.groups]
    assert all(0 < g["macs_share"] <= 1 for g in found["groups"])
    assert found["frozen"] == analysis.frozen
    assert found["files"] == {}


def test_kinds_and_shares_in_the_table(monkeypatch):
    """Only what tells something has a column, and only where there is room."""
    rows = [
        AnalysisRow("embed.proj", 192, 192, True, ("embed.proj.weight",), "embedding", 0.857),
        AnalysisRow("blocks.0.qkv", 576, 3, False, ("blocks.0.qkv.weight",), "heads", 0.035),
    ]
    monkeypatch.setenv("COLUMNS", "100")
    lines = analysis_text(rows, {}).splitlines()
    assert lines[3].split()[:6] == ["group", "channels", "cuttable", "kind", "%", "of"]
    assert lines[5].split()[:6] == ["embed.proj", "192", "192", "embedding", "85.7", "yes"]
    assert lines[6].split()[:5] == ["blocks.0.qkv", "576", "3", "heads", "3.5"]
    assert lines[-1] == "In all: 2 groups, 195 cuttable units"
    monkeypatch.setenv("COLUMNS", "60")
    narrow = analysis_text(rows, {})
    assert "MACs" not in narrow
    assert max(map(len, narrow.splitlines())) <= 60
    stages = [
        replace(row, kind=kind) for row, kind in zip(rows, ("stage", "channels"), strict=True)
    ]
    assert "kind" not in analysis_text(stages, {})
    assert "195 cuttable channels" in analysis_text(stages, {})


def test_the_drawing(net, run, document):
    code, out, err = run("analyze", net, "--out", "drawn")
    assert (code, err) == (0, "")
    assert "coupling.svg  the groups; open it in a browser" in out
    text = Path("drawn/coupling.svg").read_text(encoding="utf-8")
    assert "Coupled channels of Sequential" in text
    found, _ = document("analyze", net, "--out", "drawn")  # one that is there is written anew
    assert found["files"] == {"coupling.svg": str(Path("drawn/coupling.svg"))}
    assert Path("drawn/coupling.svg").read_text(encoding="utf-8") == text
    assert [p.name for p in Path("drawn").iterdir()] == ["coupling.svg"]
    assert [n["name"] for n in found["coupling"]["nodes"]] == ["0", "3", "8"]
    assert found["coupling"]["nodes"][2]["frozen"] == "outputs of the model keep their channels"
    assert found["coupling"]["edges"] == [
        {"from": "0", "to": "3", "layers": ["3"]},
        {"from": "3", "to": "8", "layers": ["8"]},
    ]


def test_a_folder_that_cannot_be_made(net, run):
    Path("file").write_text("")
    code, _, err = run("analyze", net, "--out", "file/drawn")
    assert code == 1
    assert err.count("\n") == 1


def test_what_is_frozen_is_told(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    Path("odd.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Odd(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)\n"
        "        self.c = nn.Conv2d(8, 4, 1)\n"
        "    def forward(self, x):\n"
        "        return self.c(self.b(x) * torch.cumsum(self.a(x), 1))\n"
    )
    code, out, _ = run("analyze", "odd.py:Odd")
    assert code == 0
    assert "Frozen" in out
    assert "cumsum" in out


SCAN = ("--data", "digits", "--sensitivity", "--samples", "60", "--threads", "1")


def test_a_scan(net, run, document):
    found, _ = document("analyze", net, *SCAN, "--order", "smallest,largest", "--drop", "0.2")
    out = Path("fxprune-out/make-sensitivity")
    assert sorted(path.name for path in out.iterdir()) == [
        "ratios.json",
        "run.json",
        "sensitivity.html",
        "sensitivity.json",
        "sensitivity.jsonl",
    ]
    scan = Sensitivity.from_json((out / "sensitivity.json").read_text())
    assert scan.methods == ("l1 smallest", "l1 largest")
    assert {c.name for c in scan.curves} == {"0", "3"}
    assert [p.ratio for p in scan.curves[0].points] == [k / 10 for k in range(1, 10)]
    assert found["ratios"] == {label: scan.propose(0.2, label) for label in scan.methods}
    assert json.loads((out / "ratios.json").read_text()) == scan.propose(0.2)

    # What is proposed can be had: as a file, and as arguments.
    words = ("compile", net, "--input-size", "1x1x8x8", "--no-latency")
    document(*words, "--ratio", f"@{out / 'ratios.json'}", "--out", "a")
    document(*words, *found["arguments"], "--out", "b")
    assert Path("a/net.safetensors").read_bytes() == Path("b/net.safetensors").read_bytes()

    # Shown again with another drop, and in words; nothing is scored again.
    lines = (out / "sensitivity.jsonl").read_bytes()
    code, told, err = run(
        "analyze", net, *SCAN, "--order", "smallest,largest", "--resume", "--drop", "0"
    )
    assert (code, err) == (0, "")
    assert "Ratios that cost at most 0.0 % each, by method" in told
    assert "A proposal ends before the first ratio that costs more" in " ".join(told.split())
    line = "fxprune compile net.py:make --data digits --ratio @fxprune-out/make-sensitivity/ratios.json"
    assert line in told
    assert (out / "sensitivity.jsonl").read_bytes() == lines


def test_a_scan_that_was_stopped_goes_on(net, run, document, monkeypatch):
    measured = []

    def stopping(model, loader):
        measured.append(1)
        if len(measured) == 8:
            raise KeyboardInterrupt
        return len(measured) / 100

    monkeypatch.setattr("fxprune.fit.accuracy", stopping)
    code, _, err = run("analyze", net, *SCAN)
    assert code == 130
    assert "the same command goes on from there" in err
    lines = Path("fxprune-out/make-sensitivity/sensitivity.jsonl").read_text().splitlines()
    kept = [json.loads(line) for line in lines][1:]  # the first is the whole network's
    assert len(kept) >= 6
    monkeypatch.setattr("fxprune.fit.accuracy", lambda model, loader: 0.01)
    found, _ = document("analyze", net, *SCAN)
    assert found["resumed"]
    scores = {(c["name"], p["kept"]): p["score"] for c in found["curves"] for p in c["points"]}
    for line in kept:
        assert scores.pop((line["group"], line["kept"])) == line["score"]
    assert scores
    assert set(scores.values()) == {0.01}


def test_images_are_drawn_from_all_of_the_test_set(net):
    from fxprune.cli.analyze import _images
    from fxprune.cli.source import Source

    opened = Source(model=net, data="digits", batch_size=32).open()
    batches = _images(opened, 50)
    assert [len(x) for x, _ in batches] == [32, 18]
    assert torch.equal(batches[0][0], _images(opened, 50)[0][0])
    assert sum(len(x) for x, _ in _images(opened, 10_000)) == 360


def test_a_drop_of_more_than_everything(net, run):
    code, _, err = run("analyze", net, *SCAN, "--drop", "2")
    assert code == 2
    assert "--drop" in err


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--sensitivity"], "--sensitivity needs data"),
        (["--order", "smallest,best"], "order is 'best'"),
        (["--method", "l0"], "there is no method 'l0'"),
    ],
)
def test_bad_options(words, text, net, run):
    code, _, err = run("analyze", net, *words)
    assert code == 2
    assert text in err
    assert err.count("\n") == 1


def test_a_model_without_input_is_guessed(net, document):
    found, _ = document("analyze", net)
    assert found["input"] == [1, 1, 224, 224]
    assert specs.build(net) is not None
