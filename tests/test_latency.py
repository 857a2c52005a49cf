"""Latency: candidates take turns; the numbers are what a clock says."""

from __future__ import annotations

import dataclasses
import gc
import time

import pytest

from fxprune.errors import OptionError
from fxprune.latency import Timing, latency


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
