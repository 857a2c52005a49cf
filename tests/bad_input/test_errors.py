"""The errors themselves: one family, and each survives pickle and copy."""

import copy
import pickle

import pytest

import fxprune
from fxprune import (
    CheckpointError,
    FxPruneError,
    OptionError,
    OptionTypeError,
    PlanError,
    TraceError,
    UnsupportedOpError,
    VerifyError,
)


def test_kinds_of_errors():
    for kind in (TraceError, UnsupportedOpError, PlanError, CheckpointError, VerifyError,
                 OptionError, OptionTypeError, fxprune.DistributedMismatchError):  # fmt: skip
        assert issubclass(kind, FxPruneError)
    assert issubclass(OptionError, ValueError)
    assert issubclass(OptionTypeError, TypeError)
    assert issubclass(OptionError, PlanError)
    assert issubclass(OptionTypeError, PlanError)


@pytest.mark.parametrize(
    "kind", [TraceError, PlanError, OptionError, OptionTypeError, CheckpointError]
)
def test_errors_survive_pickle_and_copy(kind):
    error = kind("what", where="here", why="because", fix="do that")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is kind
        assert (again.what, again.where, again.why, again.fix) == (
            "what",
            "here",
            "because",
            "do that",
        )
        assert str(again) == "what\n  where: here\n  why:   because\n  fix:   do that"


def test_errors_hold_nothing_that_a_terminal_would_obey():
    error = PlanError("`\x1b[31m[bold]\r\nfix: rm -rf` is bad", where="\ud800", why="a\u202eb\x00")
    assert error.what == r"`\x1b[31m[bold]  fix: rm -rf` is bad"
    assert (error.where, error.why) == (r"\ud800", r"a\u202eb\x00")
    assert str(error).encode().decode() == str(error)
    assert len(str(error).splitlines()) == 3
    assert PlanError("größe 名前 🙂 é").what == "größe 名前 🙂 é"


def test_errors_are_not_endless():
    error = PlanError("x" * 10**6, why="a" + "b" * 10**5 + "c")
    assert len(str(error)) < 10_000
    assert "996000 more characters" in error.what
    assert error.why[0] == "a"
    assert error.why[-1] == "c"
