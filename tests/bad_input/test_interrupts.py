"""Interrupted, on a machine without GPU or triton, or run twice: nothing is left half done."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import Residual, X, facts, l1, net, untouched
from torch import nn

import fxprune
from fxprune.interrupts import Interrupts as Held


class Interrupts(nn.Module):
    """Its forward is interrupted at the given run."""

    def __init__(self, at: int):
        super().__init__()
        self.inner, self.at, self.runs = net(), at, 0

    def forward(self, x):
        self.runs += 1
        if self.runs == self.at:
            raise KeyboardInterrupt
        return self.inner(x)


def test_ctrl_c_while_forward_is_traced_leaves_the_model_alone():
    model = Interrupts(1)
    with untouched(model), pytest.raises(KeyboardInterrupt):
        fxprune.compile(model, X, progress=False)


def interrupts(*arguments):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "options", [{"method": interrupts}, {"evaluate": interrupts}, {"ignore": interrupts}]
)
def test_ctrl_c_in_the_users_own_function_leaves_the_model_alone(options):
    model = net().train()
    model[1].eval()
    with untouched(model), pytest.raises(KeyboardInterrupt):
        fxprune.compile(model, X, progress=False, **options)


def interrupted(delay: float, call: Callable[[], Any]) -> None:
    """Run `call`, and send SIGINT to this process after so many seconds, as Ctrl-C does."""
    sent = []

    def alarm(*arguments):
        sent.append(True)
        signal.raise_signal(signal.SIGINT)

    handler = signal.signal(signal.SIGALRM, alarm)
    try:
        signal.setitimer(signal.ITIMER_REAL, max(delay, 1e-6))
        call()
        while not sent:  # it was quicker this time
            time.sleep(1e-4)
    except KeyboardInterrupt:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def seconds(call: Callable[[], Any]) -> float:
    call()
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def test_ctrl_c_at_any_moment_leaves_the_model_alone():
    """At 40 moments of a compilation, spread evenly over it."""
    model = Residual().train()
    model.a.eval()

    def call():
        fxprune.compile(model, X, method=l1(0.5), progress=False)

    whole = seconds(call)
    before, noise = facts(model), torch.get_rng_state()
    for i in range(40):
        delay = whole * (i + random.random()) / 40
        interrupted(delay, call)
        assert facts(model) == before, f"after {delay:.4f} s of {whole:.4f} s"
        assert torch.equal(torch.get_rng_state(), noise)
    call()


def test_ctrl_c_during_a_save_leaves_the_old_file_or_the_new(tmp_path):
    path = tmp_path / "net.safetensors"
    first = fxprune.compile(net(), X, method=l1(0.25), progress=False)
    second = fxprune.compile(net(), X, method=l1(0.5), progress=False)
    versions = []
    for pruned in (second, first):
        fxprune.save(pruned, path)
        versions.append(path.read_bytes())
    whole = seconds(lambda: fxprune.save(first, path))
    for i in range(25):
        interrupted(whole * i / 25, lambda: fxprune.save(second, path))
        assert path.read_bytes() in versions
        fxprune.save(first, path)
        assert [p.name for p in tmp_path.iterdir()] == [path.name]


BARE = """
import sys, torch
torch.set_num_threads(1)
sys.modules["triton"] = None  # importing it raises ImportError
sys.path.insert(0, sys.argv[1])
import fxprune
from fxprune.interrupts import Interrupts as Held
from refusals import X, net
torch.manual_seed(0)
pruned = fxprune.compile(net(), X, progress=False)
fxprune.save(pruned, sys.argv[2])
loaded = fxprune.load(sys.argv[2], net())
assert torch.equal(loaded(X), pruned(X))
assert pruned.report.verified and not torch.cuda.is_available()
sys.stdout.write(pruned.plan.to_json())
"""


def test_without_triton_and_gpu_another_process_does_the_same(tmp_path):
    """Another hash seed, another process, no triton: the same plan and file, byte for byte."""
    here, path = str(Path(__file__).parents[1]), tmp_path / "there.safetensors"
    environment = {**os.environ, "PYTHONHASHSEED": "4321", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", BARE, here, str(path)], env=environment,
                          capture_output=True, text=True, timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    torch.manual_seed(0)
    pruned = fxprune.compile(net(), X, progress=False)
    fxprune.save(pruned, tmp_path / "here.safetensors")
    assert done.stdout == pruned.plan.to_json()
    assert path.read_bytes() == (tmp_path / "here.safetensors").read_bytes()


@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_handlers_stand_again_when_another_handler_raises_between(monkeypatch, at):
    """As the one for a loader's dying worker does: it may run at any moment."""
    before, install, calls = signal.getsignal(signal.SIGINT), signal.signal, []

    def interrupted(number, handler):
        calls.append(number)
        if len(calls) == at:
            raise RuntimeError("a worker died")
        return install(number, handler)

    monkeypatch.setattr(signal, "signal", interrupted)
    with pytest.raises(RuntimeError, match="a worker died"), Held():
        assert at > 2
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGINT) is before
