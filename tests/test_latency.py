"""Latency: candidates take turns; the numbers are what a clock says."""

from __future__ import annotations

import dataclasses
import gc
import math
import re
import time

import pytest
import torch
from torch import nn

from fxprune.errors import OptionError, OptionTypeError
from fxprune.latency import Timing, compare, environment, latency, remarks
from fxprune.report import TimingRow


def test_candidates_take_turns_in_rotating_order():
    calls = []
    latency({n: (lambda n=n: calls.append(n)) for n in "abc"}, rounds=3, warmup=2, min_seconds=0.0)
    assert "".join(calls) == "aabbcc" + "abc" + "abc" + "bca" + "cab"  # warm-up, sizing, rounds


def test_slower_is_slower():
    result = latency(
        {"short": lambda: time.sleep(0.001), "long": lambda: time.sleep(0.004)},
        rounds=5,
        min_seconds=0.0,
    )
    assert list(result) == ["short", "long"]
    assert 0.001 <= result["short"].median < result["long"].median
    for t in result.values():
        assert t.p20 <= t.median <= t.p80
        assert t.rounds == 5


def test_samples_are_filled_by_repeating():
    t = latency({"x": lambda: None}, rounds=3, min_seconds=0.002)["x"]
    assert t.calls > 1000
    assert t.median < 1e-5


def test_quantiles_interpolate(monkeypatch):
    clock = iter([0, 1, 0, 1, 0, 2, 0, 3, 0, 4, 0, 6])  # sizing, then samples of 1, 2, 3, 4, 6 s
    monkeypatch.setattr("fxprune.latency.time.perf_counter", lambda: next(clock))
    t = latency({"x": lambda: None}, rounds=5, warmup=0, min_seconds=0)["x"]
    assert (t.median, t.p20, t.p80) == (3, pytest.approx(1.8), pytest.approx(4.4))


def test_errors_pass_through_and_collection_goes_on():
    count = []

    def fail():
        count.append(1)
        if len(count) > 3:
            raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        latency({"x": fail}, min_seconds=0.0)
    assert gc.isenabled()


def test_refusals_and_a_frozen_result():
    with pytest.raises(OptionError, match="nothing to measure"):
        latency({})
    for bad in ({"rounds": 0}, {"warmup": -1}, {"min_seconds": float("nan")}):
        with pytest.raises(OptionError, match="bad measurement"):
            latency({"x": lambda: None}, **bad)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Timing(1.0, 1.0, 1.0).median = 2.0


# ---- networks -----------------------------------------------------------------------------------


class Seen(nn.Module):
    """Notes what it is called with."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.norm = nn.BatchNorm1d(2)
        self.calls = []

    def forward(self, x):
        self.calls.append((tuple(x.shape), x.dtype, self.norm.training, torch.is_grad_enabled()))
        return x


def test_networks_are_compared_in_eval_mode_at_each_batch_size():
    a, b = Seen().train(), Seen().eval()
    rows = compare({"a": a, "b": b}, torch.zeros(5, 2), batches=(4, 1), rounds=2, min_seconds=0)
    assert [(r.name, r.batch) for r in rows] == [("a", 1), ("b", 1), ("a", 4), ("b", 4)]
    assert set(a.calls) == {((n, 2), torch.float32, False, False) for n in (1, 4)}
    assert a.training
    assert a.norm.training
    assert not b.training
    for r in rows:
        assert 0 < r.p20_ms <= r.median_ms <= r.p80_ms


def test_whole_numbers_stay_whole():
    network = Seen()
    compare({"a": network}, torch.ones(1, 3, dtype=torch.int64), batches=[2], rounds=1)
    assert network.calls[0][:2] == ((2, 3), torch.int64)


def test_slow_networks_get_fewer_rounds():
    class Slow(Seen):
        def forward(self, x):
            time.sleep(0.01)
            return super().forward(x)

    def calls(seconds):
        network = Slow()
        compare(
            {"a": network}, torch.zeros(1, 2), batches=[1], rounds=9, min_seconds=0, seconds=seconds
        )
        return len(network.calls)

    assert calls(1e-6) == calls(0.03) < calls(10) == calls(math.inf) + 2  # two to see how slow


def test_modes_are_as_before_after_an_error():
    class Fails(Seen):
        def forward(self, x):
            raise RuntimeError("mine")

    network = Fails().train()
    with pytest.raises(RuntimeError, match="mine"):
        compare({"a": network}, torch.zeros(1, 2))
    assert network.norm.training


def test_batch_sizes_are_checked():
    with pytest.raises(OptionError, match="a batch size is 0"):
        compare({"a": Seen()}, torch.zeros(1, 2), batches=[0])
    with pytest.raises(OptionTypeError, match=r"a batch size is 1\.5"):
        compare({"a": Seen()}, torch.zeros(1, 2), batches=[1.5])


def test_what_it_was_measured_on():
    words = environment(nn.Linear(1, 1).double())
    assert re.fullmatch(r"\d+ threads? of .+, float64, torch .+", words)


def test_time_that_does_not_follow_the_macs_is_told():
    def rows(batch, before, after):
        return [TimingRow("a", batch, before, 0, 0), TimingRow("b", batch, after, 0, 0)]

    found = remarks([*rows(1, 2.0, 1.98), *rows(64, 8.0, 4.0)], 100, 50)
    assert len(found) == 1
    assert found[0].startswith(
        "50.0 % of the MACs remain, but at batch 1 the pruned network is only 1.01x as fast: "
    )
    assert remarks(rows(1, 2.0, 2.5), 100, 96) == []  # hardly any went
    assert remarks(rows(1, 2.0, 1.5), 100, 50) == []
    assert remarks([], 100, 50) == []
    assert remarks([TimingRow("a", 1, 1.0, 1.0, 1.0)], 100, 50) == []
