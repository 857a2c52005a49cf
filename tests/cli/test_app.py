"""The program as a whole: exit codes, one line per error, help, and stops."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

import fxprune
from fxprune import cli
from fxprune.cli import demo
from fxprune.errors import OptionError, PlanError

COMMANDS = ("compile", "analyze", "report", "scratch", "demo")


def _raise(error):
    def fail(*_):
        raise error

    return fail


def test_help_names_the_commands(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    for command in COMMANDS:
        assert command in text


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_json_debug_and_examples_that_fit(command, width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    assert cli.main([command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "--json" in text
    assert "--debug" in text
    examples = text.partition("Examples")[2]
    assert f"fxprune {command} " in examples or f"fxprune {command}\n" in examples.replace(
        " \n", "\n"
    )
    for line in text.splitlines():
        assert len(line) <= width
        if "fxprune " in line and line.startswith("   fxprune"):
            assert len(line.rstrip()) < 80, line  # an example that wraps cannot be copied


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"fxprune {fxprune.__version__}\n"
    assert captured.err == ""


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["dmeo"],
        ["demo", "--bogus"],
        ["demo", "--seed", "x"],
        ["demo", "--threads", "0"],
        ["demo", "--data", "mnist"],
        ["compile"],
        ["compile", "zoo:resnet20", "--steps", "0"],
        ["scratch", "plan.json", "zoo:resnet20"],  # --data is missing
    ],
)
def test_bad_usage_is_2(words, capsys):
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.out + captured.err


def test_an_error_is_1_and_one_line(monkeypatch, capsys):
    error = PlanError("cannot prune", where="fc", why="it is\nan output", fix="pass ignore=('fc',)")
    monkeypatch.setattr(demo, "run_demo", _raise(error))
    assert cli.main(["demo", "--json"]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    expected = "cannot prune; at: fc; because: it is an output; fix: pass ignore=('fc',)"
    assert captured.err == f"fxprune: error: {expected}\n"


def test_an_option_that_makes_no_sense_is_2_and_one_line(monkeypatch, capsys):
    monkeypatch.setattr(demo, "run_demo", _raise(OptionError("bad", where="x")))
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == "fxprune: error: bad; at: x\n"


@pytest.mark.parametrize("words", [["--debug", "demo"], ["demo", "--debug"]])
def test_debug_shows_the_traceback(words, monkeypatch, capsys):
    monkeypatch.setattr(demo, "run_demo", _raise(ZeroDivisionError("oh")))
    assert cli.main(words) == 1
    assert "Traceback" in capsys.readouterr().err
    assert cli.main(["demo"]) == 1
    assert capsys.readouterr().err == (
        "fxprune: error: ZeroDivisionError: oh (--debug shows the traceback)\n"
    )


def test_a_bad_folder_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert cli.main(["demo", "--out", str(tmp_path / "file" / "x")]) == 1
    assert "Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stop_is_one_line(number, code, monkeypatch, capsys):
    before = signal.getsignal(number)
    monkeypatch.setattr(demo, "run_demo", lambda *_: os.kill(os.getpid(), number))
    assert cli.main(["demo"]) == code
    assert capsys.readouterr().err == f"fxprune: stopped by {number.name}\n"
    assert signal.getsignal(number) is before


def test_the_module_runs():
    done = subprocess.run(
        [sys.executable, "-m", "fxprune.cli", "nonsense"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "nonsense" in done.stderr


def test_names_that_the_terminal_cannot_show(tmp_path):
    (tmp_path / "\u2192.py").write_text("def make():\n    raise ValueError('\u2192')\n")
    done = subprocess.run(
        [sys.executable, "-m", "fxprune.cli", "analyze", "\u2192.py:make"],
        capture_output=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 1
    assert b"\\u2192.py" in done.stderr
    assert b"Traceback" not in done.stderr
