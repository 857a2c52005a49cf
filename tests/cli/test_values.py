"""Words of options -> values, and each way to write them wrongly."""

from __future__ import annotations

import json

import pytest

import fxprune
from fxprune import methods
from fxprune.cli import values
from fxprune.errors import OptionError


def test_ratios(tmp_path):
    assert values.ratio_of([]) is None
    assert values.ratio_of(["0.3"]) == 0.3
    assert values.ratio_of(["layer1.*=0.1", "layer2.*=0.3"]) == {"layer1.*": 0.1, "layer2.*": 0.3}
    mixed = values.ratio_of(["0.2", "layer1.*=0.1"])
    assert list(mixed.items()) == [("layer1.*", 0.1), ("*", 0.2)]  # the first that fits counts
    file = tmp_path / "ratios.json"
    file.write_text(json.dumps({"a": 0.5, "b": 0.6}))
    assert values.ratio_of([f"@{file}"]) == {"a": 0.5, "b": 0.6}
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"b": 0.7, "*": 0.2}))
    for words in (["a=0.1", f"@{file}"], [f"@{file}", "a=0.1"]):  # what is named here counts
        assert values.ratio_of(words) == {"a": 0.1, "b": 0.6}
    both = values.ratio_of(["0.3", f"@{file}", f"@{other}", "c=0.1"])
    assert list(both.items()) == [("c", 0.1), ("a", 0.5), ("b", 0.6), ("*", 0.3)]


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["half"], "--ratio half is no number"),
        (["a=b"], "--ratio b is no number"),
        (["0.1", "0.2"], "two shares without a name"),
        (["a=0.1", "a=0.2"], "--ratio a= is given twice"),
        (["@nowhere.json"], "there is no file `nowhere.json`"),
        (["@."], "no ratios can be read from `.`"),
        (["*=0.3", "0.5"], r"two shares for all layers were given, 0.5 and \*=0.3"),
    ],
)
def test_ratios_that_make_no_sense(words, text):
    with pytest.raises(OptionError, match=text):
        values.ratio_of(words)


@pytest.mark.parametrize("content", ["[0.1]", "{}", '{"a": "b"}', '{"a": true}'])
def test_files_without_ratios(content, tmp_path):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(OptionError, match="holds no ratios"):
        values.ratio_of([f"@{tmp_path / 'r.json'}"])


def test_budgets():
    assert values.budget_of([]) is None
    assert values.budget_of(["0.5"]) == fxprune.Budget(macs=0.5)
    assert values.budget_of(["params=0.4", "macs=0.5"]) == fxprune.Budget(macs=0.5, params=0.4)
    for words, text in (
        (["ms=3"], "--budget ms=3 makes no sense"),
        (["macs=half"], "--budget half is no number"),
        (["0.5", "macs=0.4"], "given twice"),
        (["macs=2"], "budget macs is 2"),
    ):
        with pytest.raises(OptionError, match=text):
            values.budget_of(words)


def test_methods():
    made = values.method_of("l1", {"ratio": 0.3, "order": None, "norm": "l2"})
    assert made == methods.L1(ratio=0.3, norm="l2")
    with pytest.raises(OptionError, match="there is no method 'l3'"):
        values.method_of("l3", {})
    with pytest.raises(OptionError, match="method l1 takes no --bogus"):
        values.method_of("l1", {"bogus": 1})


def test_scopes_and_sizes():
    assert values.scope_of(["free"]) == "free"
    assert values.scope_of(["layer1.*"]) == ("layer1.*",)
    assert values.scope_of(["all", "free"]) == ("all", "free")
    assert values.size_of("1x3x32X32") == (1, 3, 32, 32)
    for bad in ("32", "1x3xa", "1x0x3", "1x-3x3", ""):
        with pytest.raises(OptionError, match="makes no sense"):
            values.size_of(bad)


def test_names_for_the_shell():
    assert values.method_names("l") == ["l1"]
    assert ("ResNet-56-A", "for zoo.resnet56") in values.preset_names("ResNet-56")
