"""What shells complete: the scripts are there, and names are found, in bash around colons too."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from fxprune import cli
from fxprune.cli.completion import _joined


@pytest.fixture
def complete(capsys, monkeypatch):
    def ask(line, shell="zsh"):
        monkeypatch.setenv("_FXPRUNE_COMPLETE", f"complete_{shell}")
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
        assert cli.main([]) == 0
        return capsys.readouterr().out

    return ask


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("fxprune comp", "compile"),
        ("fxprune compile zoo:resnet2", "zoo\\\\:resnet20"),
        ("fxprune compile torchvision:mobilenet_v2", "torchvision\\\\:mobilenet_v2"),
        ("fxprune compile zoo:resnet56 --method l", "l1"),
        ("fxprune compile zoo:resnet56 --preset ResNet-56", "ResNet-56-A"),
        ("fxprune compile zoo:resnet56 --data cifar1", "cifar10"),
        ("fxprune compile zoo:resnet56 --order la", "largest"),
        ("fxprune compile zoo:resnet56 --sched", "--schedule"),
        ("fxprune demo --data di", "digits"),
    ],
)
def test_names_are_completed(line, name, complete):
    assert name in complete(line)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_scripts(shell, monkeypatch, capsys):
    monkeypatch.setenv("_FXPRUNE_COMPLETE", f"source_{shell}")
    assert cli.main([]) == 0
    assert "_FXPRUNE_COMPLETE=complete_" in capsys.readouterr().out


def test_words_around_a_colon_are_joined():
    assert _joined(["fxprune", "compile", "zoo", ":", "res"], 4) == (
        ["fxprune", "compile", "zoo:res"],
        2,
    )
    assert _joined(["fxprune", "compile", "zoo", ":", ""], 4) == (["fxprune", "compile", "zoo:"], 2)
    assert _joined(["fxprune", "compile", "zoo", ":"], 3) == (["fxprune", "compile", "zoo:"], 2)
    assert _joined(["fxprune", "co"], 1) == (["fxprune", "co"], 1)


@pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash on this machine")
def test_bash_completes_around_a_colon(tmp_path):
    """The script that bash is given, with the words as bash breaks them."""
    program = tmp_path / "fxprune"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fxprune.cli "$@"\n')
    program.chmod(0o755)
    script = """
        eval "$(_FXPRUNE_COMPLETE=source_bash fxprune)"
        COMP_WORDS=(fxprune compile zoo : resnet1) COMP_CWORD=4
        $(complete -p fxprune | sed 's/.*-F \\([^ ]*\\).*/\\1/') fxprune
        echo "${COMPREPLY[@]}"
    """
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": path},
        check=False,
    )
    assert done.stdout.strip() == "resnet110", done.stderr
