"""The command line: exit codes, one line per error, and JSON that stands alone on stdout.

The whole demo, with real training and a fresh process, is run by `make demo`.
"""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fxprune
from fxprune import cli, fit
from fxprune.errors import PlanError
from fxprune.report import Report, TimingRow


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_help_names_the_command(capsys):
    assert cli.main(["--help"]) == 0
    assert "demo" in capsys.readouterr().out
    assert cli.main(["demo", "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--out", "--seed", "--threads", "--json", "--debug"):
        assert option in text


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"fxprune {fxprune.__version__}\n"
    assert captured.err == ""


@pytest.mark.parametrize(
    "words",
    [[], ["dmeo"], ["demo", "--bogus"], ["demo", "--seed", "x"], ["demo", "--threads", "0"]],
)
def test_bad_usage_is_2(words, capsys):
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out + captured.err


def _raise(error):
    def fail(*_):
        raise error

    return fail


def test_an_error_is_1_and_one_line(monkeypatch, capsys):
    error = PlanError("cannot prune", where="fc", why="it is\nan output", fix="pass ignore=('fc',)")
    monkeypatch.setattr(cli, "_demo", _raise(error))
    assert cli.main(["demo", "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    expected = "cannot prune; at: fc; because: it is an output; fix: pass ignore=('fc',)"
    assert captured.err == f"fxprune: error: {expected}\n"


@pytest.mark.parametrize("words", [["--debug", "demo"], ["demo", "--debug"]])
def test_debug_shows_the_traceback(words, monkeypatch, capsys):
    monkeypatch.setattr(cli, "_demo", _raise(ZeroDivisionError("oh")))
    assert cli.main(words) == 1
    assert "Traceback" in capsys.readouterr().err
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_bad_folder_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--out", str(tmp_path / "file" / "x")]) == 1
    assert "Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals(number, code, monkeypatch, capsys):
    before = signal.getsignal(number)
    monkeypatch.setattr(cli, "_demo", lambda *_: os.kill(os.getpid(), number))
    assert cli.main(["demo"]) == code
    assert "stopped by SIG" in capsys.readouterr().err
    assert signal.getsignal(number) is before


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

    monkeypatch.setattr(fxprune, "compile", compile_stub, raising=False)
    monkeypatch.setattr(fxprune, "recalibrate", lambda p, loader, samples: p, raising=False)
    monkeypatch.setattr(fxprune, "save", write, raising=False)
    monkeypatch.setattr(fxprune, "export", write, raising=False)
    monkeypatch.setattr(fit, "train", lambda *_, **__: [])
    monkeypatch.setattr(cli, "_check_reload", lambda *_: None)
    rows = [TimingRow(n, 1, ms, ms, ms) for n, ms in (("original", 2.0), ("pruned", 1.0))]
    monkeypatch.setattr(cli, "_measure", lambda *_: rows)


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
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["demo", "--threads", "1", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "fxprune[export]" in out
    assert "50.0% remain" in out
    assert out.count("CifarResNet pruned by l1") == 2
    assert out.count("2.00x as fast") == 2
    assert "report.html" in out
    assert not (tmp_path / "net.onnx").exists()


def test_the_module_runs():
    done = subprocess.run(
        [sys.executable, "-m", "fxprune.cli", "nonsense"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "nonsense" in done.stderr
