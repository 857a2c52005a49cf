"""What a log file and a terminal say of a long training."""

from __future__ import annotations

import io
import re

import pytest
import rich.console
import torch
from torch import nn

from fxprune.fit import Recipe, accuracy, train
from fxprune.training import meter as meters

BATCHES = [(torch.randn(4, 5), torch.arange(4) % 2)] * 3


def run(progress, **options):
    torch.manual_seed(0)
    return train(nn.Linear(5, 2), BATCHES, Recipe(epochs=2), progress=progress, **options)


def test_a_log_has_a_line_per_epoch(capsys):
    run("log", evaluate=BATCHES)
    lines = capsys.readouterr().err.splitlines()
    form = r"training: epoch {} of 2, loss \d\.\d{{3}}, accuracy \d+\.\d%, [\d,]+ images/s{}"
    assert re.fullmatch(form.format(1, r", \d:\d\d left"), lines[0])
    assert re.fullmatch(form.format(2, ""), lines[1])
    run("log", evaluate=lambda model: 0.5)
    assert "score 0.5," in capsys.readouterr().err


def test_nothing_is_said_of_short_work(capsys):
    run(True)  # stderr is no terminal here
    run(False)
    accuracy(nn.Linear(5, 2), BATCHES, progress=True)
    assert capsys.readouterr() == ("", "")


def test_long_work_speaks_up_now_and_then(capsys, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(meters.time, "perf_counter", lambda: clock[0])
    with meters.meter(True, "training", 10) as shown:
        for epoch in range(10):
            clock[0] += 12.0
            shown.step(epoch + 0.5, 600)
            shown.finish_round(epoch + 1, f"loss 0.{epoch}")
    assert capsys.readouterr().err.splitlines() == [
        "training: epoch 3 of 10, loss 0.2, 50 images/s, 1:24 left",
        "training: epoch 6 of 10, loss 0.5, 50 images/s, 0:48 left",
        "training: epoch 9 of 10, loss 0.8, 50 images/s, 0:12 left",
    ]


@pytest.fixture
def terminal(monkeypatch):
    """What a terminal of 100 columns shows on stderr."""
    out = io.StringIO()
    real = rich.console.Console
    monkeypatch.setattr(
        rich.console, "Console", lambda stderr: real(file=out, force_terminal=True, width=100)
    )
    return out


def test_a_bar_on_a_terminal(terminal):
    with meters.meter(True, "training", 3) as shown:
        shown.resume(1)
        shown.step(1.5, 64, "loss 0.500")
        shown.bar.refresh()
        text = terminal.getvalue()
        assert "training" in text
        assert re.search(r"epoch 2 of 3, loss 0\.500, [\d,]+ images/s", text)
    assert terminal.getvalue().endswith("\x1b[2K")  # the bar is gone


def test_the_bar_of_a_training(terminal):
    run(True)
    assert "loss" in terminal.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(7, "0:07"), (754, "12:34"), (3723, "1:02:03"), (3599.7, "1:00:00"), (float("inf"), "-:--")],
)
def test_a_clock(seconds, text):
    assert meters._clock(seconds) == text


def test_time_left_counts_only_what_this_run_did(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(meters.time, "perf_counter", lambda: clock[0])
    shown = meters.Meter("training", 10, "epoch")
    assert shown.left() == float("inf")
    shown.resume(6)
    clock[0] = 5.0
    shown.step(8.0, 100)
    assert shown.left() == pytest.approx(5.0)
    assert shown.rate() == pytest.approx(20.0)
