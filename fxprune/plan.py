"""The Plan: which channels stay, as pure data that survives JSON.

A Plan names tensors of the first original model's `state_dict()` and lists, per tensor and
dimension, the indices that stay. It holds no weights and no code. The reader is strict:
what it does not know, it refuses, and it says at which place of the document.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from fxprune.errors import OptionTypeError, PlanError

SCHEMA_VERSION = 1
ROLES = ("out", "in")
WEIGHTS = ("cut", "changed")
MAX_JSON_BYTES = 1 << 28
MAX_JSON_DEPTH = 64
METRICS = ("macs_before", "macs_after", "params_before", "params_after")
BUDGET = ("macs", "params")
FINGERPRINT = ("tensors", "graph")
KEYS = (
    "schema_version",
    "fxprune_version",
    "method",
    "budget",
    "scope",
    "seed",
    "fingerprint",
    "weights",
    "slices",
    "groupings",
    "folds",
    "inexact",
    "frozen",
    "metrics",
)
_INT64 = (1 << 63) - 1
_UINT64 = (1 << 64) - 1


@dataclass(frozen=True)
class Slice:
    """Indices kept along one dimension of one tensor, ascending, in the original's numbering."""

    tensor: str
    dim: int
    role: str  # "out": makes or transforms these channels; "in": reads them
    size: int  # channels of the original: shape[dim], or groups * shape[dim] in a grouped conv
    keep: tuple[int, ...]


@dataclass(frozen=True)
class Grouping:
    """Group g of a grouped convolution: it makes outputs `rows[g]` from inputs `cols[g]`."""

    tensor: str
    rows: tuple[tuple[int, ...], ...]
    cols: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Fold:
    """A batch norm (and perhaps a compactor) folded into the convolution before it."""

    conv: str
    bn: str
    compactor: bool = False


@dataclass(frozen=True)
class Note:
    """A node of the graph and what is to be said of it."""

    node: str
    why: str


@dataclass(frozen=True)
class Plan:
    """What to cut, and how much that saves. See `to_json` for the document."""

    fxprune_version: str
    method: Mapping[str, Any]  # the config's own fields: whatever JSON holds
    budget: Mapping[str, float] | None
    scope: str | tuple[str, ...]
    seed: int
    fingerprint: Mapping[str, str]
    weights: str = "cut"
    slices: tuple[Slice, ...] = ()
    groupings: tuple[Grouping, ...] = ()
    folds: tuple[Fold, ...] = ()
    inexact: tuple[Note, ...] = ()
    frozen: tuple[Note, ...] = ()
    metrics: Mapping[str, int] = field(
        default_factory=lambda: dict.fromkeys(METRICS, 0),
    )
    schema_version: int = SCHEMA_VERSION

    def keep(self, tensor: str, dim: int) -> tuple[int, ...] | None:
        """The kept indices of a tensor's dimension, or None where nothing is cut."""
        return next((s.keep for s in self.slices if (s.tensor, s.dim) == (tensor, dim)), None)

    def to_dict(self) -> dict[str, Any]:
        """The plan as fresh dicts and lists, in the order of the schema.

        Keys whose order the schema leaves open are sorted (a method's name comes first), so that
        a plan keeps its text through a file that sorts all keys.
        """
        return {
            "schema_version": self.schema_version,
            "fxprune_version": self.fxprune_version,
            "method": _method(dict(self.method)),
            "budget": None if self.budget is None else _ordered(self.budget, BUDGET),
            "scope": self.scope if isinstance(self.scope, str) else list(self.scope),
            "seed": self.seed,
            "fingerprint": _ordered(self.fingerprint, FINGERPRINT),
            "weights": self.weights,
            "slices": [{**vars(s), "keep": list(s.keep)} for s in self.slices],
            "groupings": [
                {
                    "tensor": g.tensor,
                    "rows": [list(r) for r in g.rows],
                    "cols": [list(c) for c in g.cols],
                }
                for g in self.groupings
            ],
            "folds": [dict(vars(f)) for f in self.folds],
            "inexact": [dict(vars(n)) for n in self.inexact],
            "frozen": [dict(vars(n)) for n in self.frozen],
            "metrics": _ordered(self.metrics, METRICS),
        }

    def to_json(self, *, indent: int | None = None) -> str:
        """The plan as a JSON document; the same plan always gives the same text."""
        separators = (",", ":") if indent is None else (",", ": ")
        return json.dumps(
            self.to_dict(), indent=indent, separators=separators, allow_nan=False, sort_keys=False
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Plan:
        """Read a plan; PlanError names the first place that is not as the schema says."""
        return cls.from_dict(parse_json(text))

    @classmethod
    def from_dict(cls, data: object) -> Plan:
        """Read a plan from plain dicts and lists, as strictly as `from_json`."""
        if not isinstance(data, dict):
            _bad("plan", data, "an object")
        if "schema_version" in data:  # first: a newer plan may well have other keys
            version = _integer(data["schema_version"], "schema_version", 1)
            if version > SCHEMA_VERSION:
                raise PlanError(
                    f"this plan has schema_version {version}, newer than {SCHEMA_VERSION}",
                    where="schema_version",
                    why="it was written by a newer fxprune",
                    fix="upgrade fxprune",
                )
        top = _object(data, "plan", KEYS)
        slices = tuple(
            _slice(s, f"slices[{i}]") for i, s in enumerate(_list(top["slices"], "slices"))
        )
        groupings = tuple(
            _grouping(g, f"groupings[{i}]")
            for i, g in enumerate(_list(top["groupings"], "groupings"))
        )
        folds = tuple(_fold(f, f"folds[{i}]") for i, f in enumerate(_list(top["folds"], "folds")))
        _unique([(s.tensor, s.dim) for s in slices], "slices")
        _unique([g.tensor for g in groupings], "groupings")
        _unique([f.conv for f in folds], "folds")
        _unique([f.bn for f in folds], "folds")
        kept = {(s.tensor, s.dim): s.keep for s in slices}
        for i, g in enumerate(groupings):
            _check_grouping(g, kept, f"groupings[{i}]")
        return cls(
            schema_version=top["schema_version"],
            fxprune_version=_text(top["fxprune_version"], "fxprune_version"),
            method=_method(top["method"]),
            budget=_budget(top["budget"]),
            scope=_scope(top["scope"]),
            seed=_integer(top["seed"], "seed", -_INT64 - 1, _UINT64),  # as torch.manual_seed
            fingerprint={
                k: _text(v, f"fingerprint.{k}")
                for k, v in _object(top["fingerprint"], "fingerprint", FINGERPRINT).items()
            },
            weights=_choice(top["weights"], "weights", WEIGHTS),
            slices=slices,
            groupings=groupings,
            folds=folds,
            inexact=_notes(top["inexact"], "inexact"),
            frozen=_notes(top["frozen"], "frozen"),
            metrics={
                k: _integer(v, f"metrics.{k}", 0)
                for k, v in _object(top["metrics"], "metrics", METRICS).items()
            },
        )


_FIX = "correct that place, or write the plan again with Plan.to_json()"


def parse_json(text: str | bytes) -> object:
    """JSON (bytes: UTF-8) of bounded size and depth, without duplicate keys, NaN or infinities.

    PlanError on anything else, and on nothing but that.
    """
    if not isinstance(text, str | bytes):
        raise OptionTypeError(f"a JSON document is str or bytes, not {type(text).__name__}")
    if len(text) > MAX_JSON_BYTES:
        raise PlanError(
            f"this JSON document has {len(text)} bytes",
            why=f"at most {MAX_JSON_BYTES} are read",
            fix="check that this is the right file",
        )
    try:
        value: object = json.loads(
            text if isinstance(text, str) else text.decode(),
            object_pairs_hook=_pairs,
            parse_constant=_finite,
            parse_float=_finite,
        )
    except (ValueError, RecursionError) as error:
        why = str(error) if isinstance(error, ValueError) else "it is nested too deeply"
        raise PlanError(
            "this is not a JSON document",
            why=why,
            fix="the file may be truncated or damaged; write it again",
        ) from error
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [v for c in level for v in _children(c) if isinstance(v, dict | list)]
        if not level:
            return value
    raise PlanError(
        "this JSON document is nested too deeply",
        why=f"at most {MAX_JSON_DEPTH} levels are read",
        fix="check that this is the right file",
    )


def plain_json(value: object, where: str, depth: int = 0) -> Any:  # whatever JSON holds
    """A copy in dicts and lists, keys sorted, that `parse_json` would read back as it is.

    PlanError names the first place that JSON cannot hold: NaN, keys that are no strings, a tensor.
    """
    if depth >= MAX_JSON_DEPTH:
        _bad(where[:40] + "...", value, f"at most {MAX_JSON_DEPTH} levels deep")
    if isinstance(value, dict):
        for key in value:
            _text(key, f"a key of {where}")
        return {k: plain_json(value[k], f"{where}.{k}", depth + 1) for k in sorted(value)}
    if isinstance(value, list | tuple):
        return [plain_json(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)]
    if isinstance(value, str):
        return _text(value, where)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return _integer(value, where, -_INT64 - 1, _UINT64)
    if isinstance(value, float) and math.isfinite(value):
        return value
    _bad(where, value, "something that JSON can hold")


def _ordered(mapping: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """A copy with `keys` first, in their order."""
    return {**{k: mapping[k] for k in keys if k in mapping}, **mapping}


def _children(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    _unique([key for key, _ in pairs], "the keys of an object")
    return dict(pairs)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise PlanError(
            f"JSON cannot hold {text[:40]}", why="numbers must be finite doubles", fix=_FIX
        )
    return number


def _bad(where: str, value: object, wanted: str) -> NoReturn:
    try:
        shown = reprlib.repr(value)
    except ValueError:  # an integer with more digits than Python prints
        shown = "a huge integer"
    raise PlanError(
        f"bad plan: `{where}` is {shown}", where=where, why=f"it must be {wanted}", fix=_FIX
    )


def _object(value: object, where: str, keys: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        _bad(where, value, "an object")
    unknown = sorted((k for k in value if k not in keys), key=repr)
    missing = [k for k in keys if k not in value]
    if unknown or missing:
        what = (
            f"unknown key {reprlib.repr(unknown[0])}"
            if unknown
            else f"key {missing[0]!r} is missing"
        )
        raise PlanError(
            f"bad plan: {what}", where=where, why=f"the keys are {', '.join(keys)}", fix=_FIX
        )
    return value


def _list(value: object, where: str) -> list[Any]:
    return value if isinstance(value, list) else _bad(where, value, "a list")


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        _bad(where, value, "a string")
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        _bad(where, value, "a string that UTF-8 can hold")  # half of a surrogate pair
    return value


def _choice(value: object, where: str, options: Sequence[str]) -> str:
    return value if value in options else _bad(where, value, "one of " + ", ".join(options))  # type: ignore[return-value]


def _integer(value: object, where: str, least: int, most: int = _INT64) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        _bad(where, value, "an integer")
    if value < least:
        _bad(where, value, f"an integer >= {least}")
    if value > most:
        _bad(where, value, f"an integer <= {most}")
    return value


def _unique(items: Sequence[object], where: str) -> None:
    seen: set[object] = set()
    for item in items:
        if item in seen:
            raise PlanError(
                f"bad plan: {reprlib.repr(item)} appears twice",
                where=where,
                why="nothing says which of the two holds",
                fix=_FIX,
            )
        seen.add(item)


def _indices(value: object, where: str, size: int | None = None) -> tuple[int, ...]:
    """A non-empty list of distinct ascending indices below `size`."""
    items = _list(value, where)
    if not items:
        _bad(where, value, "a list with at least one index")
    last = -1
    for i, item in enumerate(items):
        index = _integer(item, f"{where}[{i}]", 0)
        if index <= last:
            _bad(f"{where}[{i}]", index, f"greater than the index before it, {last}")
        last = index
    if size is not None and last >= size:
        _bad(f"{where}[{len(items) - 1}]", last, f"below the size, {size}")
    return tuple(items)


def _slice(value: object, where: str) -> Slice:
    s = _object(value, where, ("tensor", "dim", "role", "size", "keep"))
    size = _integer(s["size"], f"{where}.size", 1)
    return Slice(
        tensor=_text(s["tensor"], f"{where}.tensor"),
        dim=_integer(s["dim"], f"{where}.dim", 0),
        role=_choice(s["role"], f"{where}.role", ROLES),
        size=size,
        keep=_indices(s["keep"], f"{where}.keep", size),
    )


def _grouping(value: object, where: str) -> Grouping:
    g = _object(value, where, ("tensor", "rows", "cols"))
    rows, cols = _list(g["rows"], f"{where}.rows"), _list(g["cols"], f"{where}.cols")
    if not rows or len(rows) != len(cols):
        _bad(where, value, "as many lists of rows as of cols, at least one")
    if len({len(r) for r in rows if isinstance(r, list)}) > 1:
        _bad(f"{where}.rows", rows, "lists of one length")
    if len({len(c) for c in cols if isinstance(c, list)}) > 1:
        _bad(f"{where}.cols", cols, "lists of one length")
    return Grouping(
        tensor=_text(g["tensor"], f"{where}.tensor"),
        rows=tuple(_indices(r, f"{where}.rows[{i}]") for i, r in enumerate(rows)),
        cols=tuple(_indices(c, f"{where}.cols[{i}]") for i, c in enumerate(cols)),
    )


def _check_grouping(
    grouping: Grouping, kept: Mapping[tuple[str, int], tuple[int, ...]], where: str
) -> None:
    """Rows partition the kept outputs; columns lie among the kept inputs."""
    rows = sorted(i for r in grouping.rows for i in r)
    outputs = kept.get((grouping.tensor, 0), tuple(range(len(rows))))
    if rows != list(outputs):
        _bad(f"{where}.rows", rows, "a partition of the kept outputs")
    inputs = kept.get((grouping.tensor, 1))
    if inputs is not None and not {i for c in grouping.cols for i in c} <= set(inputs):
        _bad(f"{where}.cols", grouping.cols, "taken from the kept inputs")


def _fold(value: object, where: str) -> Fold:
    f = _object(value, where, ("conv", "bn", "compactor"))
    if not isinstance(f["compactor"], bool):
        _bad(f"{where}.compactor", f["compactor"], "true or false")
    return Fold(
        _text(f["conv"], f"{where}.conv"), _text(f["bn"], f"{where}.bn"), bool(f["compactor"])
    )


def _notes(value: object, where: str) -> tuple[Note, ...]:
    notes = []
    for i, item in enumerate(_list(value, where)):
        n = _object(item, f"{where}[{i}]", ("node", "why"))
        notes.append(
            Note(_text(n["node"], f"{where}[{i}].node"), _text(n["why"], f"{where}[{i}].why"))
        )
    return tuple(notes)


def _method(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        _bad("method", value, "an object")
    if "name" not in value:
        raise PlanError(
            "bad plan: key 'name' is missing",
            where="method",
            why="a method has a name, and its options",
            fix=_FIX,
        )
    return {"name": _text(value["name"], "method.name"), **plain_json(value, "method", 1)}


def _budget(value: object) -> dict[str, float] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not value or not set(value) <= set(BUDGET):
        _bad("budget", value, "null or an object with `macs` or `params`")
    for key, share in value.items():
        if not isinstance(share, int | float) or isinstance(share, bool) or not 0 < share <= 1:
            _bad(f"budget.{key}", share, "a number above 0 and at most 1")
    return dict(value)


def _scope(value: object) -> str | tuple[str, ...]:
    if isinstance(value, list):
        return tuple(_text(v, f"scope[{i}]") for i, v in enumerate(value))
    return _text(value, "scope")
