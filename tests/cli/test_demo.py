"""The demo's words, files and JSON; what is slow in it is replaced.

The whole demo, with real training and a fresh process, is run by `make demo`.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import fxprune
from fxprune import cli, fit, zoo
from fxprune.cli import demo
from fxprune.report import Report, TimingRow


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def _quick(monkeypatch):
    """The demo with everything slow, or not its own, replaced."""

    def compile_stub(model, example, **options):
        assert options["budget"] == 0.5
        print("noise on stdout")
        pruned = copy.deepcopy(model)
        pruned.report = Report(
            model="CifarResNet",
            method=options["method"],
            front_end="torch.fx",
            asked={"macs": 0.5},
            metrics={"macs_before": 8, "macs_after": 4, "params_before": 6, "params_after": 3},
            verified="equal",
        )
        return pruned

    def write(pruned, path):
        Path(path).write_bytes(b"x")

    monkeypatch.setattr(fxprune, "compile", compile_stub)
    monkeypatch.setattr(fxprune, "recalibrate", lambda p, loader, samples: p)
    monkeypatch.setattr(fxprune, "save", write)
    monkeypatch.setattr(fxprune, "export", write)
    monkeypatch.setattr(fit, "train", lambda *_, **__: [])
    monkeypatch.setattr(demo, "_check_reload", lambda *_: None)
    rows = [TimingRow(n, 1, ms, ms, ms) for n, ms in (("original", 2.0), ("pruned", 1.0))]
    monkeypatch.setattr(demo, "compare", lambda *_, **__: rows)


@pytest.mark.usefixtures("_quick")
def test_demo_json_is_one_document(tmp_path, capsys):
    assert cli.main(["demo", "--json", "--threads", "1", "--out", str(tmp_path / "a" / "b")]) == 0
    captured = capsys.readouterr()
    data = json.loads(captured.out)
    assert data["command"] == "demo"
    assert data["threads"] == 1
    assert data["fresh_process"] == {"bit_equal": True}
    assert list(data["report"]["stages"]) == [
        "before",
        "after the cut",
        "recalibrated",
        "fine-tuned",
    ]
    assert data["report"]["timings"][1]["median_ms"] == 1.0
    environment = data["report"]["environment"]
    assert environment.startswith("1 thread of ")
    assert environment.endswith(f", float32, torch {torch.__version__}")
    for path in data["files"].values():
        assert Path(path).is_file()
    assert "noise on stdout" in captured.err
    assert "Train a ResNet-20" in captured.err


@pytest.mark.usefixtures("_quick")
def test_demo_without_the_export_extra_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["demo", "--threads", "1", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "fxprune[export]" in out
    assert "50.0 % remain" in out or "50.0% remain" in out
    assert out.count("CifarResNet pruned by l1") == 2
    assert out.count("2.00x as fast") == 2
    assert "report.html" in out
    assert not (tmp_path / "net.onnx").exists()


@pytest.mark.usefixtures("_quick")
def test_demo_starts_from_weights(tmp_path, capsys):
    weights = tmp_path / "w.safetensors"
    save_file(zoo.resnet20(in_channels=1, width=32).state_dict(), weights)
    out = ["--out", str(tmp_path / "out")]
    assert cli.main(["demo", "--threads", "1", "--weights", str(weights), *out]) == 0
    told = capsys.readouterr().out
    assert "Load a ResNet-20 that has learnt to read digits" in told
    assert "of 360 unseen images are right" in told


def test_demo_knows_its_sets(capsys):
    assert cli.main(["demo", "--data", "imagenet"]) == 2
    assert "--data is 'imagenet'" in capsys.readouterr().err
