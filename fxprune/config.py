"""Method configs: the registry, lookup by name, and the checks that all of them share."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor

from fxprune.errors import OptionError, OptionTypeError

Scores = Callable[[Any, Sequence[Tensor]], Tensor]  # (group, weights) -> scores [C]
F = TypeVar("F", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class Registered:
    """A method of the literature: its name, its config class, and its scoring function."""

    name: str
    config: type
    function: Callable[..., Tensor]


REGISTRY: dict[str, Registered] = {}


def register(name: str, config: type) -> Callable[[F], F]:
    """Register `function(group, weights, config) -> scores [C]` under a name and a config class."""

    def add(function: F) -> F:
        REGISTRY[name] = Registered(name, config, function)
        return function

    return add


@dataclass(frozen=True)
class Method:
    """What a call asked for: scores, the config's ratio, and how the plan records it."""

    record: dict[str, Any]
    scores: Scores
    ratio: float | None

    @property
    def name(self) -> str:
        """The method's name."""
        return str(self.record["name"])


def resolve(method: object) -> Method:
    """A name, a config, or a callable `(group, weights) -> scores` as one thing.

    Raises OptionError for unknown names (listing the known ones and the nearest).
    """
    if isinstance(method, str):
        if method not in REGISTRY:
            near = difflib.get_close_matches(method, REGISTRY, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise OptionError(
                f"there is no method {method!r}",
                where="method",
                why=f"known methods: {', '.join(sorted(REGISTRY))}",
                fix=hint + "a config or a callable (group, weights) -> scores works too",
            )
        return _of_config(REGISTRY[method], REGISTRY[method].config())
    for known in REGISTRY.values():
        if isinstance(method, known.config):
            return _of_config(known, method)
    if isinstance(method, type) or not callable(method):
        raise OptionTypeError(
            f"method is {method!r}",
            where="method",
            why="it must be a name, a config such as fxprune.methods.L1(), or a callable",
            fix="known names: " + ", ".join(sorted(REGISTRY)),
        )
    name = getattr(method, "__qualname__", type(method).__qualname__)
    return Method({"name": "custom", "callable": name}, method, None)


def _of_config(known: Registered, config: Any) -> Method:
    record = {"name": known.name, **dataclasses.asdict(config)}
    return Method(
        record, lambda group, weights: known.function(group, weights, config), config.ratio
    )


def check_share(
    name: str,
    value: object,
    *,
    least: float = 0.0,
    most: float = 1.0,
    least_ok: bool,
    most_ok: bool,
) -> float:
    """A finite number within bounds, as float; OptionError or OptionTypeError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise OptionTypeError(
            f"{name} is {value!r}", where=name, why="it must be a number", fix=f"{name}=0.5"
        )
    inside = (least <= value if least_ok else least < value) and (
        value <= most if most_ok else value < most
    )
    if math.isnan(value) or not inside:
        bounds = f"{least} {'<=' if least_ok else '<'} {name} {'<=' if most_ok else '<'} {most}"
        raise OptionError(
            f"{name} is {value}",
            where=name,
            why=f"it must lie in {bounds}",
            fix=f"{name} is a fraction, not percent"
            + (f": {value / 100:g}" if 1 < value <= 100 else ", such as 0.5"),
        )
    return float(value)
