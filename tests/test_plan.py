"""Plans survive JSON unchanged, and the reader refuses all else with the place in its message."""

import copy
import json
import pickle
from dataclasses import replace

import pytest
from documents import plan_document
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fxprune.errors import PlanError
from fxprune.plan import (
    MAX_JSON_DEPTH,
    METRICS,
    Fold,
    Grouping,
    Note,
    Plan,
    Slice,
    parse_json,
    plain_json,
)

# ---- plans drawn at random ----------------------------------------------------------------------

WORDS = st.text(st.characters(codec="utf-8"), max_size=8)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)
SHARES = st.floats(0, 1, exclude_min=True) | st.just(1)


@st.composite
def keeps(draw, size):
    return tuple(sorted(draw(st.sets(st.integers(0, size - 1), min_size=1))))


@st.composite
def slices(draw, tensor, dim):
    size = draw(st.integers(1, 9))
    return Slice(tensor, dim, draw(st.sampled_from(["out", "in"])), size, draw(keeps(size)))


@st.composite
def grouped(draw, tensor):
    """Slices of both dimensions of a tensor, and a grouping of what they keep."""
    groups, rows, cols = (draw(st.integers(1, 3)) for _ in range(3))
    kept = draw(keeps(9).filter(lambda k: len(k) % groups == 0)) if groups < 3 else (0, 4, 8)
    rows = len(kept) // groups
    order = draw(st.permutations(kept))
    inputs = draw(keeps(9).filter(lambda k: len(k) >= cols))
    return (
        Slice(tensor, 0, "out", 9, kept),
        Slice(tensor, 1, "in", 9, inputs),
    ), Grouping(
        tensor,
        tuple(tuple(sorted(order[g * rows : (g + 1) * rows])) for g in range(groups)),
        tuple(tuple(sorted(draw(st.permutations(inputs))[:cols])) for _ in range(groups)),
    )


@st.composite
def plans(draw):
    names = draw(st.lists(WORDS, max_size=3, unique=True))
    cut = [draw(slices(name, dim)) for name in names for dim in range(draw(st.integers(1, 2)))]
    groupings = []
    for name in draw(st.lists(WORDS, max_size=2, unique=True)):
        if name not in names:
            both, grouping = draw(grouped(name))
            cut += both if draw(st.booleans()) else both[:1]
            groupings.append(grouping)
    return Plan(
        fxprune_version=draw(WORDS),
        method={"name": draw(WORDS), **draw(st.dictionaries(WORDS, VALUES, max_size=3))}
        | {"name": "l1"},
        budget=draw(
            st.none()
            | st.dictionaries(st.sampled_from(["macs", "params"]), SHARES, min_size=1, max_size=2)
        ),
        scope=draw(WORDS | st.lists(WORDS, max_size=2).map(tuple)),
        seed=draw(st.integers(-(1 << 63), (1 << 64) - 1)),
        fingerprint={"tensors": draw(WORDS), "graph": draw(WORDS)},
        weights=draw(st.sampled_from(["cut", "changed"])),
        slices=tuple(cut),
        groupings=tuple(groupings),
        folds=tuple(Fold(f"{n}.conv", f"{n}.bn", draw(st.booleans())) for n in names),
        inexact=tuple(Note(n, draw(WORDS)) for n in names),
        frozen=tuple(Note(draw(WORDS), n) for n in names),
        metrics={k: draw(st.integers(0, 1 << 60)) for k in METRICS},
    )


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(plan=plans())
def test_round_trip(plan):
    text = plan.to_json()
    assert Plan.from_json(text) == plan
    assert Plan.from_json(text.encode()) == plan
    assert Plan.from_json(plan.to_json(indent=1)) == plan
    assert Plan.from_dict(plan.to_dict()) == plan
    assert Plan.from_json(text).to_json() == text
    assert copy.deepcopy(plan).to_json() == text
    assert pickle.loads(pickle.dumps(plan)).to_json() == text
    # a file that sorts all keys (as ours do) changes nothing
    assert Plan.from_json(json.dumps(json.loads(text), sort_keys=True)).to_json() == text


# ---- one plan in full ---------------------------------------------------------------------------


def refused(call, *words):
    with pytest.raises(PlanError) as caught:
        call()
    text = str(caught.value)
    for word in words:
        assert word in text, text
    assert caught.value.fix
    return text


def at(path, value):
    """The document with one place changed (`...`: taken out)."""
    data = place = plan_document()
    *parents, last = path
    for key in parents:
        place = place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return data


def test_the_document_is_read_and_written_as_it_is():
    plan = Plan.from_dict(plan_document())
    assert plan.to_dict() == plan_document()
    assert plan.to_json() == json.dumps(plan_document(), separators=(",", ":"))
    assert plan.keep("conv.weight", 1) == (0, 1, 3)
    assert plan.keep("conv.weight", 2) is None
    assert plan.slices[0] == Slice("conv.weight", 0, "out", 6, (0, 2, 3, 5))
    assert plan.groupings[0].cols == ((0, 1), (1, 3))


def test_text_does_not_depend_on_the_order_in_which_mappings_were_made():
    plan = Plan.from_dict(plan_document())
    turned = replace(
        plan,
        method=dict(reversed(plan.method.items())),
        budget={"params": 1, "macs": 0.5},
        fingerprint=dict(reversed(plan.fingerprint.items())),
        metrics=dict(reversed(plan.metrics.items())),
    )
    again = replace(plan, budget={"macs": 0.5, "params": 1})
    assert turned == again
    assert turned.to_json() == again.to_json()


def test_what_to_dict_gives_is_a_copy():
    plan = Plan.from_dict(plan_document() | {"method": {"name": "x", "deep": {"list": [1]}}})
    text, data = plan.to_json(), plan.to_dict()
    data["folds"][0]["conv"] = data["frozen"][0]["node"] = data["slices"][0]["role"] = "changed"
    data["slices"][0]["keep"].clear()
    data["method"]["deep"]["list"].clear()
    data["metrics"].clear()
    assert plan.to_json() == text


def test_reading_copies_too():
    data = plan_document() | {"method": {"name": "x", "deep": {"list": [1]}}}
    plan = Plan.from_dict(data)
    data["method"]["deep"]["list"].append(2)
    assert plan.method == {"name": "x", "deep": {"list": [1]}}


def test_numbers_and_scopes_that_are_fine():
    for path, value in [
        (("budget",), None),
        (("budget",), {"params": 1}),
        (("scope",), ["layer1.*", "layer2.*"]),
        (("scope",), []),
        (("seed",), -(1 << 63)),
        (("seed",), (1 << 64) - 1),
        (("weights",), "changed"),
        (("method", "extra"), {"nested": [1, 2.5, None, True, "ü"]}),
        (("groupings", 0, "cols"), [[0, 1], [0, 1]]),
    ]:
        data = at(path, value)
        assert json.loads(Plan.from_dict(data).to_json()) == data


# ---- refusals -----------------------------------------------------------------------------------

LEVELS = [
    ((), "plan"),
    (("fingerprint",), "fingerprint"),
    (("slices", 1), "slices[1]"),
    (("groupings", 0), "groupings[0]"),
    (("folds", 0), "folds[0]"),
    (("inexact", 0), "inexact[0]"),
    (("frozen", 0), "frozen[0]"),
    (("metrics",), "metrics"),
]


@pytest.mark.parametrize(("path", "where"), LEVELS, ids=lambda v: str(v))
def test_unknown_and_missing_keys_at_every_level(path, where):
    refused(lambda: Plan.from_dict(at((*path, "x"), 1)), "unknown key 'x'", where, "the keys are")
    level = plan_document()
    for key in path:
        level = level[key]
    for key in level:
        gone = at((*path, key), ...)
        refused(lambda: Plan.from_dict(gone), f"key '{key}' is missing", where)  # noqa: B023


def test_method_without_a_name_and_budget_with_other_keys():
    refused(lambda: Plan.from_dict(at(("method", "name"), ...)), "'name' is missing", "method")
    refused(lambda: Plan.from_dict(at(("budget", "flops"), 0.5)), "`macs` or `params`")
    refused(lambda: Plan.from_dict(at(("budget",), {})), "`macs` or `params`")


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("schema_version",), True, "`schema_version` is True / an integer"),
        (("schema_version",), 0, "an integer >= 1"),
        (("schema_version",), "1", "an integer"),
        (("fxprune_version",), 1, "`fxprune_version` is 1 / a string"),
        (("method",), "l1", "`method` is 'l1' / an object"),
        (("method", "name"), None, "`method.name` is None / a string"),
        (("method", "ratio"), float("nan"), "`method.ratio` is nan / JSON can hold"),
        (("method", "ratio"), float("-inf"), "`method.ratio` is -inf"),
        (("method", "x"), [{"y": {1, 2}}], "`method.x[0].y`"),
        (("method", "x"), {1: 2}, "`a key of method.x` is 1"),
        (("method", "x"), 10**5000, "`method.x` is a huge integer"),
        (("method", "x"), "\udc00", "UTF-8"),
        (("budget",), 0.5, "`budget` is 0.5 / null or an object"),
        (("budget", "macs"), True, "`budget.macs` is True / a number above 0"),
        (("budget", "macs"), 0, "`budget.macs` is 0"),
        (("budget", "macs"), 1.5, "at most 1"),
        (("budget", "macs"), float("nan"), "`budget.macs` is nan"),
        (("budget", "macs"), 10**5000, "`budget.macs` is a huge integer"),
        (("budget", "macs"), "0.5", "`budget.macs` is '0.5'"),
        (("scope",), 1, "`scope` is 1 / a string"),
        (("scope",), ["a", 1], "`scope[1]` is 1"),
        (("seed",), 1.0, "`seed` is 1.0 / an integer"),
        (("seed",), False, "`seed` is False"),
        (("seed",), 1 << 64, "an integer <= 18446744073709551615"),
        (("seed",), -(10**5000), "`seed` is a huge integer"),
        (("fingerprint",), [], "`fingerprint` is [] / an object"),
        (("fingerprint", "graph"), 5, "`fingerprint.graph` is 5 / a string"),
        (("weights",), "kept", "`weights` is 'kept' / one of cut, changed"),
        (("weights",), ["cut"], "one of cut, changed"),
        (("slices",), {}, "`slices` is {} / a list"),
        (("slices", 0), 7, "`slices[0]` is 7 / an object"),
        (("slices", 0, "tensor"), 7, "`slices[0].tensor` is 7"),
        (("slices", 0, "tensor"), "\ud800", "UTF-8"),
        (("slices", 0, "dim"), True, "`slices[0].dim` is True"),
        (("slices", 0, "dim"), -1, "`slices[0].dim` is -1"),
        (("slices", 0, "role"), "both", "one of out, in"),
        (("slices", 0, "size"), 0, "`slices[0].size` is 0"),
        (("slices", 0, "size"), 1 << 63, "`slices[0].size`"),
        (("slices", 0, "keep"), 3, "`slices[0].keep` is 3 / a list"),
        (("slices", 0, "keep"), [], "at least one index"),
        (("slices", 0, "keep"), [0, 2.0, 3, 5], "`slices[0].keep[1]` is 2.0 / an integer"),
        (("slices", 0, "keep"), [False, 2, 3, 5], "`slices[0].keep[0]` is False"),
        (("slices", 0, "keep"), [-1, 2, 3, 5], "`slices[0].keep[0]` is -1"),
        (("slices", 0, "keep"), [0, 3, 2, 5], "`slices[0].keep[2]` is 2 / the index before it, 3"),
        (("slices", 0, "keep"), [0, 2, 2, 5], "`slices[0].keep[2]` is 2 / greater than"),
        (("slices", 0, "keep"), [0, 2, 3, 6], "`slices[0].keep[3]` is 6 / below the size, 6"),
        (("slices", 0, "keep"), [10**5000], "`slices[0].keep[0]` is a huge integer"),
        (("slices", 1, "dim"), 0, "('conv.weight', 0) appears twice / slices"),
        (("groupings",), None, "`groupings` is None / a list"),
        (("groupings", 0, "tensor"), 1, "`groupings[0].tensor` is 1"),
        (("groupings", 0, "rows"), [[0, 2, 3, 5]], "as many lists of rows as of cols"),
        (("groupings", 0, "rows"), [], "as many lists of rows as of cols"),
        (("groupings", 0, "rows"), [0, 3], "`groupings[0].rows[0]` is 0 / a list"),
        (("groupings", 0, "rows"), [[0], [2, 3, 5]], "lists of one length"),
        (("groupings", 0, "rows"), [[0, 3], [2, 3]], "a partition of the kept outputs"),
        (("groupings", 0, "rows"), [[0, 3], [2, 4]], "a partition of the kept outputs"),
        (("groupings", 0, "rows"), [[0], [2]], "a partition of the kept outputs"),
        (("groupings", 0, "rows"), [[3, 0], [2, 5]], "`groupings[0].rows[0][1]` is 0"),
        (("groupings", 0, "cols"), [[0], [1, 3]], "lists of one length"),
        (("groupings", 0, "cols"), [[0, 1], [2, 3]], "taken from the kept inputs"),
        (("groupings", 0, "cols"), [[], []], "at least one index"),
        (("groupings", 0, "cols"), [[1, 0], [1, 3]], "`groupings[0].cols[0][1]` is 0"),
        (("groupings", 0, "cols"), [[0, 1], [True, 3]], "is True"),
        (("folds",), "x", "`folds` is 'x' / a list"),
        (("folds", 0, "conv"), 1, "`folds[0].conv` is 1"),
        (("folds", 0, "bn"), 1, "`folds[0].bn` is 1"),
        (("folds", 0, "compactor"), 1, "`folds[0].compactor` is 1 / true or false"),
        (("inexact", 0, "node"), 1, "`inexact[0].node` is 1"),
        (("frozen", 0, "why"), None, "`frozen[0].why` is None"),
        (("metrics", "macs_after"), 0.5, "`metrics.macs_after` is 0.5 / an integer"),
        (("metrics", "macs_after"), -1, "an integer >= 0"),
        (("metrics", "macs_after"), True, "`metrics.macs_after` is True"),
    ],
    ids=lambda v: str(v)[:40] if isinstance(v, str | tuple) else "",
)
def test_wrong_values(path, value, words):
    refused(lambda: Plan.from_dict(at(path, value)), *words.split(" / "))


def test_rows_of_an_uncut_tensor_partition_all_outputs():
    data = plan_document()
    del data["slices"][0]
    refused(lambda: Plan.from_dict(data), "a partition of the kept outputs")
    data["groupings"][0]["rows"] = [[0, 3], [1, 2]]
    Plan.from_dict(data)


@pytest.mark.parametrize("key", ["slices", "groupings", "folds"])
def test_entries_that_appear_twice(key):
    data = plan_document()
    data[key].append(copy.deepcopy(data[key][0]))
    refused(lambda: Plan.from_dict(data), "appears twice", key)


@pytest.mark.parametrize("key", ["conv", "bn"])
def test_a_module_folds_once(key):
    data = plan_document()
    data["folds"].append({"conv": "other", "bn": "another", "compactor": True})
    Plan.from_dict(data)
    data["folds"][1][key] = data["folds"][0][key]
    refused(lambda: Plan.from_dict(data), f"'{key}' appears twice", "folds")


@pytest.mark.parametrize("value", [None, [], "x", 1, [plan_document()]], ids=str)
def test_a_document_that_is_no_object(value):
    refused(lambda: Plan.from_json(json.dumps(value)), "`plan` is", "an object")


def test_a_newer_plan_is_told_apart_also_when_it_has_other_keys():
    data = plan_document() | {"schema_version": 2, "novelty": 1}
    refused(lambda: Plan.from_dict(data), "schema_version 2, newer than 1", "upgrade fxprune")
    del data["metrics"]
    refused(lambda: Plan.from_json(json.dumps(data)), "upgrade fxprune")


def test_long_values_are_shortened_in_the_message():
    text = refused(lambda: Plan.from_dict(at(("seed",), list(range(10**5)))), "`seed` is [0, 1")
    assert len(text) < 400
    text = refused(lambda: Plan.from_dict(plan_document() | {"k" * 10**6: 1}), "unknown key")
    assert len(text) < 600


# ---- the text -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "not a JSON document"),
        (b"\xff\xfe", "not a JSON document"),
        ("\ufeff{}", "not a JSON document"),
        ("{'a': 1}", "not a JSON document"),
        ('{"a": 1,}', "not a JSON document"),
        ('{"a": 1} {}', "not a JSON document"),
        ('{"a": 1, "a": 1}', "'a' appears twice"),
        ('{"x": [{"b": 1, "\\u0062": 2}]}', "'b' appears twice"),
        ('{"a": NaN}', "cannot hold NaN"),
        ("[-Infinity]", "cannot hold -Infinity"),
        ('{"a": 1e999}', "cannot hold 1e999"),
        ("[" + "9" * 5000 + "]", "not a JSON document"),
        ("[" * 65 + "]" * 65, "nested too deeply"),
        ("[" * 10**6, "nested too deeply"),
        ('{"a":' * 10**5 + "1" + "}" * 10**5, "nested too deeply"),
        (json.dumps(plan_document()).encode("utf-16"), "not a JSON document"),
    ],
    ids=lambda v: str(v)[:20],
)
def test_text_that_is_refused(text, word):
    refused(lambda: Plan.from_json(text), word)


def test_depth_that_is_read():
    assert parse_json("[" * MAX_JSON_DEPTH + "]" * MAX_JSON_DEPTH)
    deep = parse_json('{"a":' * (MAX_JSON_DEPTH - 1) + "1" + "}" * (MAX_JSON_DEPTH - 1))
    assert plain_json(deep, "here") == deep
    for _ in range(10**5):
        deep = [deep]
    refused(lambda: Plan.from_dict(at(("method", "x"), deep)), "levels deep")
    while isinstance(deep, list):  # Python 3.11 may not free so deep a list by itself
        deep = deep[0]


def test_text_of_another_type_and_of_absurd_size(monkeypatch):
    with pytest.raises(TypeError, match="str or bytes, not NoneType"):
        Plan.from_json(None)
    monkeypatch.setattr("fxprune.plan.MAX_JSON_BYTES", 10)
    refused(lambda: Plan.from_json(b"[1,2,3,4,5]"), "has 11 bytes", "at most 10")


def test_every_truncation_is_refused():
    text = Plan.from_dict(plan_document()).to_json()
    for length in range(len(text)):
        refused(lambda: Plan.from_json(text[:length]), "not a JSON document", "truncated")  # noqa: B023


def test_a_plan_that_json_cannot_hold_is_not_written():
    plan = replace(Plan.from_dict(plan_document()), method={"name": "x", "scores": float("inf")})
    refused(plan.to_json, "`method.scores` is inf")
    plan = replace(plan, method={"name": "x", "pair": (1, 2)})
    assert Plan.from_json(plan.to_json()).method == {"name": "x", "pair": [1, 2]}
