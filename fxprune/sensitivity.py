"""Which layers bear pruning: each group cut alone, at several ratios, and scored without training.

Promise: the model is never modified; every score is kept in `cache` the moment it is known, so that
an interrupted scan goes on where it stopped, and a finished one costs one evaluation.
Source: Li et al. 2017 (arXiv:1608.08710), section 3.2 and figure 2(b); its section 4.4 compares the
smallest filters with random and with the largest ones.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from fxprune import pipeline
from fxprune.api import Inputs, analyze
from fxprune.budget import Ranked, by_ratio, keep_mask
from fxprune.config import Method, check_share, resolve
from fxprune.cost import Cost
from fxprune.errors import CheckpointError, FxPruneError, OptionError, OptionTypeError
from fxprune.evaluation import Evaluate, check_evaluate, score
from fxprune.groups import Analysis, Array
from fxprune.inputs import find_inputs, unwrap
from fxprune.plan import Plan
from fxprune.planning import write_plan
from fxprune.pruned import stamp_of
from fxprune.report import Curve, Point
from fxprune.scope import Ignore, check_scope, choose_groups
from fxprune.selection import check_finite, evidence_of, protect, rank

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_ROUNDING = 1e-9  # 0.07 - 0.01 is above 0.06
RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Sensitivity:
    """What a scan found; prints as a table.

    model: the class name. baseline: the score of the whole network. curves: one per group and
    method, groups in graph order, the methods in the order asked.
    """

    model: str
    baseline: float
    curves: tuple[Curve, ...]

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods' labels, in the order asked."""
        return tuple(dict.fromkeys(c.method for c in self.curves))

    def propose(self, drop: float = 0.01, method: str | None = None) -> dict[str, float]:
        """{group: ratio}: the largest ratio up to which no score lies more than `drop` below the
        baseline; groups that bear none are left out. It is what `L1(ratio=...)` takes.

        method: a label of `methods`; None takes the first.
        """
        check_share("drop", drop, least_ok=True, most_ok=False, most=math.inf)
        chosen = self.methods[0] if method is None and self.curves else method
        if self.curves and chosen not in self.methods:
            raise OptionError(
                f"the scan has no method {method!r}",
                where="method",
                why=f"it has {', '.join(self.methods)}",
            )
        found = {}
        for curve in self.curves:
            bearable = 0.0
            for point in sorted(curve.points, key=lambda p: p.ratio):
                if not point.score >= self.baseline - drop - _ROUNDING:
                    break
                bearable = point.ratio
            if curve.method == chosen and bearable:
                found[curve.name] = bearable
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain dicts and lists; a score that is not finite becomes None."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "sensitivity",
            "model": self.model,
            "baseline": _finite(self.baseline),
            "curves": [
                {
                    "name": c.name,
                    "channels": c.channels,
                    "method": c.method,
                    "points": [
                        {"ratio": p.ratio, "kept": p.kept, "score": _finite(p.score)}
                        for p in c.points
                    ],
                }
                for c in self.curves
            ],
        }

    def to_json(self, *, indent: int | None = 2) -> str:
        """Everything as a strict JSON document."""
        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, text: str | bytes) -> Sensitivity:
        """The scan that `to_json` wrote; FxPruneError when the text is something else."""
        try:
            data = json.loads(text)
            if _whole(data["schema_version"]) != SCHEMA_VERSION or data["kind"] != "sensitivity":
                raise ValueError("kind or schema_version differ")
            curves = [
                Curve(
                    _text(c["name"]),
                    _whole(c["channels"]),
                    _text(c["method"]),
                    tuple(
                        Point(_ratio(p["ratio"]), _whole(p["kept"]), _number(p["score"]))
                        for p in _listed(c["points"])
                    ),
                )
                for c in _listed(data["curves"])
            ]
            return cls(_text(data["model"]), _number(data["baseline"]), tuple(curves))
        except (ValueError, TypeError, KeyError, RecursionError, OverflowError) as error:
            raise FxPruneError(
                "this is not a sensitivity scan of fxprune",
                why=f"{type(error).__name__}: {error}",
                fix="pass the text that Sensitivity.to_json() wrote",
            ) from error

    def to_html(self, path: str | os.PathLike[str], drop: float = 0.01) -> None:
        """Write one self-contained page with the curves; the file is whole or not there."""
        from fxprune.views.page import write_sensitivity

        write_sensitivity(self, path, drop)

    def to_figure(self, path: str | os.PathLike[str], drop: float = 0.01) -> None:
        """Draw the curves into a file of matplotlib's, by its suffix: .svg, .png, .pdf."""
        from fxprune.views.page import sensitivity_figure

        figure = sensitivity_figure(
            title=f"{self.model}: each group cut alone",
            baseline=self.baseline,
            curves=self.curves,
            drop=drop,
        )
        figure.savefig(path)

    def __str__(self) -> str:
        from fxprune.views.tables import sensitivity_text

        return sensitivity_text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table for rich."""
        from fxprune.views.tables import sensitivity_terminal

        return sensitivity_terminal(self, options.max_width, options.ascii_only)


def sensitivity(
    model: nn.Module,
    example_inputs: Inputs = None,
    *,
    evaluate: Evaluate,
    method: str | object | Sequence[object] = "l1",
    ratios: Sequence[float] = RATIOS,
    scope: str | Sequence[str] = "all",
    ignore: Ignore = (),
    data: Iterable[Any] | None = None,
    cache: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Sensitivity:
    """Cut each group of `model` alone, at each ratio, and score what is left; nothing is trained.

    evaluate: `(model) -> float`, the higher the better, or a loader for top-1 accuracy.
    method: as in `compile`, or several of them: `[L1(order="smallest"), L1(order="random")]`. Their
        own ratios do not matter here.
    ratios: shares of a group's channels that go, 0 < ratio < 1.
    scope, ignore, seed: as in `compile`. data: for methods that look at data, and example inputs.
    cache: a file that gets a line per score. A scan with the same model, method and seed goes on
        from it; OptionError when the whole network scores differently than it did for the cache.

    Raises OptionError, TraceError, PlanError as `compile` does.
    """
    check_evaluate(evaluate)
    check_scope(scope, ignore)
    if not isinstance(ratios, Sequence) or isinstance(ratios, str):
        raise OptionTypeError(
            f"ratios is {ratios!r}", where="ratios", why="it must be a list of shares that go"
        )
    listed = [check_share("ratio", r, least_ok=False, most_ok=False) for r in ratios]
    asked = list(method) if isinstance(method, list | tuple) else [method]
    methods = _labelled(map(resolve, asked))
    model, _ = unwrap(model)
    inputs, data = find_inputs(model, example_inputs, data)
    analysis = analyze(model, inputs)
    groups = choose_groups(analysis, scope, ignore)
    check_finite(analysis)
    evidence = evidence_of(analysis, seed, data)
    ranked = {
        label: protect(analysis, groups, [rank(analysis, g, m, evidence) for g in groups], 1)
        for label, m in methods.items()
    }
    store = _Cache(cache, analysis)
    total = len(methods) * len(groups) * len(listed)
    with _bar(progress, total) as done:
        baseline = score(model, evaluate)
        store.check_baseline(baseline)
        cost = Cost.of(analysis)
        curves = []
        for label, m in methods.items():
            for i, r in enumerate(ranked[label]):
                points: list[Point] = []
                for ratio in listed:
                    (kept,) = by_ratio([r], [ratio], [len(r.group)])
                    plan, keep = _cut_alone(analysis, cost, m, ranked[label], i, kept)
                    key = store.key(plan)
                    known = store.find(key)
                    if known is None:
                        known = _score_of(analysis, plan, keep, evaluate)
                    point = Point(ratio, kept, known)
                    store.add(
                        key,
                        known,
                        {"method": label, "group": r.group.name, "ratio": ratio, "kept": kept},
                    )
                    points.append(point)
                    done(f"{label}, {r.group.name}")
                curves.append(Curve(r.group.name, len(r.group), label, tuple(points)))
    return Sensitivity(type(model).__name__, baseline, tuple(curves))


def label_of(record: dict[str, Any]) -> str:
    """A method in a few words, from what the plan records of it: "l1 smallest"."""
    words = [str(record.get("callable", record["name"]))]
    words += [str(record["order"])] if "order" in record else []
    said = ("name", "callable", "order", "ratio", "preset")
    more = [f"{key} {value}" for key, value in record.items() if key not in said]
    return ", ".join([" ".join(words), *more])


def _labelled(methods: Iterable[Method]) -> dict[str, Method]:
    """Methods by label; functions of one name get a number, configs that rank alike are one."""
    found: dict[str, Method] = {}
    for m in methods:
        label, count = label_of(m.record), 1
        while m.custom and label in found:
            count += 1
            label = f"{label_of(m.record)} {count}"
        found[label] = m
    return found


def _cut_alone(
    analysis: Analysis, cost: Cost, method: Method, ranked: list[Ranked], index: int, kept: int
) -> tuple[Plan, Array]:
    """The plan in which one group keeps so many channels and the others stay whole."""
    counts = [len(other.order) for other in ranked]
    counts[index] = kept
    keep = keep_mask(analysis, ranked, counts)
    return write_plan(analysis, keep, cost, method=method.record), keep


def _score_of(analysis: Analysis, plan: Plan, keep: Array, evaluate: Evaluate) -> float:
    steps = pipeline.Progress(False)
    return score(pipeline.cut(analysis, plan, keep, steps, check=False, notes=[]), evaluate)


class _Cache:
    """Scores on disk, a line each; a line torn by a crash is left out when it is read."""

    def __init__(self, path: str | os.PathLike[str] | None, analysis: Analysis) -> None:
        self._path = None if path is None else Path(path)
        weights = f"{analysis.fingerprint}:{stamp_of(analysis.traced.model)}"
        self._of = hashlib.sha256(weights.encode()).hexdigest()[:16]
        self._scores: dict[str, float] = {}
        self._torn = False
        if self._path is not None and self._path.exists():
            self._read(self._path)

    def _read(self, path: Path) -> None:
        try:
            text = path.read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"the cache cannot be read: {error.strerror}", where=str(path)
            ) from error
        self._torn = bool(text) and not text.endswith(b"\n")
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self._scores[str(entry["key"])] = _number(entry["score"])
            except (ValueError, TypeError, KeyError, RecursionError):
                continue

    def key(self, plan: Plan | None) -> str:
        """Which network a score is of: its channels say it, whatever method chose them."""
        cut = [] if plan is None else [(s.tensor, s.dim, s.keep) for s in plan.slices]
        return hashlib.sha256(json.dumps([self._of, cut]).encode()).hexdigest()[:24]

    def find(self, key: str) -> float | None:
        """A score that is known already."""
        return self._scores.get(key)

    def add(self, key: str, value: float, what: dict[str, Any]) -> None:
        """Keep a score, on disk before the next one is measured."""
        if key not in self._scores and self._path is not None:
            self._write(key, value, what)
        self._scores[key] = value

    def check_baseline(self, baseline: float) -> None:
        """The whole network must score what it scored when the cache was begun."""
        key = self.key(None)
        before = self._scores.get(key)
        same = before is None or before == baseline or math.isclose(before, baseline, rel_tol=1e-4)
        same = same or not (math.isfinite(before or 0.0) or math.isfinite(baseline))
        if not same:  # guard: same measure -> tests/test_sensitivity.py -k another_measure
            raise OptionError(
                f"the whole network scores {baseline:g}, and {before:g} in the cache",
                where=str(self._path),
                why="the cache was made with other data, another number of samples or another measure",
                fix="pass the same evaluate as then, or another cache file",
            )
        self.add(key, baseline, {"group": None})

    def _write(self, key: str, value: float, what: dict[str, Any]) -> None:
        assert self._path is not None
        line = json.dumps({**what, "score": _finite(value), "key": key}, allow_nan=False)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("\n" * self._torn + line + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CheckpointError(
                f"the score could not be written: {error.strerror}",
                where=str(self._path),
                fix="free the disk, or pass another cache file; what is in it stays",
            ) from error
        self._torn = False


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: object) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return float(value)


def _whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TypeError(f"{value!r} is not a count")
    return value


def _ratio(value: object) -> float:
    ratio = _number(value)
    if not 0 <= ratio < 1:
        raise ValueError(f"{value!r} is not a ratio")
    return ratio


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not text")
    return value


def _listed(value: object) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{value!r} is not a list")
    return value


@contextmanager
def _bar(progress: bool, total: int) -> Iterator[Any]:
    """Yields a function to call after each score, with what was scored."""
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("sensitivity"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    quiet = not progress or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task("the whole network", total=total)
        yield lambda what: bar.update(task, advance=1, description=escape(what))
