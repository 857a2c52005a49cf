"""`fxprune scratch`: the architecture of a plan, fresh weights, and the scores to compare with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import fxprune
from fxprune.cli import specs
from fxprune.report import Report

QUICK = ("--no-latency", "--threads", "1")


@pytest.fixture
def pruned(net, document):
    found, _ = document(
        *("compile", net, "--data", "digits", "--epochs", "1", "--fold", "--out", "pruned", *QUICK)
    )
    return Path(found["out"])


def test_from_a_run(pruned, net, document):
    found, told = document("scratch", pruned, net, "--data", "digits", "--epochs", "2", *QUICK)
    out = Path("fxprune-out/make-scratch")
    assert found["out"] == str(out)
    before = json.loads((pruned / "run.json").read_text())["scores"]
    stages = found["report"]["stages"]
    assert list(stages) == ["pruned: before", "pruned: fine-tuned", "from scratch"]
    assert stages["pruned: fine-tuned"] == before["fine-tuned"]
    assert "Train for 2 epochs." in told

    # The widths are the plan's; batch norms are kept for training, although the plan folds them.
    plan = fxprune.Plan.from_json((pruned / "plan.json").read_text())
    network = fxprune.load(out / "net.safetensors", specs.build(net))
    assert network.plan.slices == plan.slices
    assert plan.folds
    assert not network.plan.folds
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 2
    report = Report.from_json((out / "report.json").read_text())
    assert any("folded batch norms are kept apart" in note for note in report.notes)

    again, _ = document(
        "scratch", pruned, net, "--data", "digits", "--epochs", "2", *QUICK, "--resume"
    )
    assert again["report"] == found["report"]


def test_the_weights_are_fresh(pruned, net, document):
    nets = []
    for file, seed in (("plan.json", 0), ("net.safetensors", 0), ("plan.json", 1)):
        out = Path(f"out-{len(nets)}")
        words = ("--data", "digits", "--epochs", "1", "--seed", seed, "--out", out, *QUICK)
        document("scratch", pruned / file, net, *words)
        nets.append((out / "net.safetensors").read_bytes())
    assert nets[0] == nets[1]
    assert nets[0] != nets[2]


def test_another_architecture_is_refused(pruned, run):
    code, _, err = run("scratch", pruned, "zoo:resnet20", "--data", "digits", *QUICK)
    assert code == 1
    assert "the plan belongs to another architecture than this CifarResNet" in err


def test_a_folder_with_the_network_alone(pruned, net, document, run):
    words = (net, "--data", "digits", "--epochs", "1", *QUICK)
    (pruned / "plan.json").unlink()
    found, _ = document("scratch", pruned, *words)
    assert "from scratch" in found["report"]["stages"]
    (pruned / "net.safetensors").unlink()
    code, _, err = run("scratch", pruned, *words)
    assert code == 2
    assert "the folder pruned holds no plan" in err


def test_no_file(net, run):
    code, _, err = run("scratch", "gone.json", net, "--data", "digits")
    assert code == 2
    assert "there is no file `gone.json`" in err
