"""What tests of commands share: a small network of a user's own, and the program in process."""

from __future__ import annotations

import json

import pytest
import torch

from fxprune import cli

NET = """
import torch
from torch import nn


def make(width=6, classes=10):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, classes),
    )
"""


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def net(tmp_path, monkeypatch):
    """Inside a folder of its own: `net.py:make`, a network for digits."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    return "net.py:make"


@pytest.fixture
def run(capsys):
    """Run a command in process: exit code, stdout, stderr."""

    def call(*words):
        code = cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def document(run):
    """Run a command with --json, which must succeed: its document, and what it told."""

    def call(*words):
        code, out, err = run(*words, "--json")
        assert code == 0, err
        return json.loads(out), err

    return call
