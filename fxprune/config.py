"""Method configs: the registry, lookup by name, and the checks that all of them share.

A method is a frozen config and a function `(group, weights, config, evidence) -> scores [C]`. It sees
a group's producers as tensors, and asks `evidence` for whatever else it looks at.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fxprune.errors import OptionError, OptionTypeError

Scores = Callable[..., Tensor]  # (group, weights, evidence) -> scores [C]
Ratio = float | Mapping[str, float]  # the share that goes, or shares by pattern of names
F = TypeVar("F", bound=Callable[..., Tensor])


class Evidence(Protocol):
    """What a method may ask about a group beside its weights."""

    def generator(self, name: str) -> torch.Generator:
        """A generator for draws about the group of that name; the same call seed, the same draws."""

    def maps(self, group: Any, samples: int) -> list[Mapping[str, Tensor]]:
        """Statistics of each producer's feature maps over `samples` images: name -> [C] float64."""


@dataclass(frozen=True)
class Preset:
    """A published network: what goes of its layers.

    network: what it is made for. convolutions: 4-D weights in that network, by which another one
    that has layers of these names is told apart. ratios: the share that goes, by exact module name.
    """

    network: str
    convolutions: int
    ratios: Mapping[str, float]


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
    """What a call asked for, and how the plan records it.

    shares: what the config itself says goes; None leaves it to the budget. greedy: scores leave out
    inputs that earlier groups lost. steps: in how many cuts. looks_at_data: whether scores need it.
    """

    record: dict[str, Any]
    scores: Scores
    shares: Ratio | Preset | None = None
    greedy: bool = False
    steps: int = 1
    looks_at_data: bool = False
    custom: bool = field(default=False, kw_only=True)

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
    scores = method
    return Method(
        {"name": "custom", "callable": name},
        lambda group, weights, evidence=None: scores(group, weights),
        custom=True,
    )


def _of_config(known: Registered, config: Any) -> Method:
    def scores(group: Any, weights: Sequence[Tensor], evidence: Evidence | None = None) -> Tensor:
        return known.function(group, weights, config, evidence)

    return Method(
        {"name": known.name, **_recorded(config)},
        scores,
        shares=getattr(config, "shares", config.ratio),
        greedy=getattr(config, "scoring", "independent") == "greedy",
        steps=getattr(config, "steps", 1),
        looks_at_data=getattr(config, "looks_at_data", False),
    )


def _recorded(config: Any) -> dict[str, Any]:
    """The options as plain data: how much and which always, the others where they were chosen."""
    default = {f.name: f.default for f in dataclasses.fields(config)}
    return {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name in ("ratio", "order") or value != default[name]
    }


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


def check_ratio(ratio: object) -> Ratio:
    """A share that goes, 0 <= ratio < 1, or a non-empty {pattern: share}."""
    if not isinstance(ratio, Mapping):
        return check_share("ratio", ratio, least_ok=True, most_ok=False)
    if not ratio:
        raise OptionError(
            "ratio is empty",
            where="ratio",
            why="it names no layer",
            fix='ratio={"layer1.*": 0.1, "layer2.*": 0.3}',
        )
    for pattern in ratio:
        if not isinstance(pattern, str):
            raise OptionTypeError(
                f"ratio has the key {pattern!r}",
                where="ratio",
                why="its keys are patterns of names of modules",
            )
    return {
        pattern: check_share(f"ratio[{pattern!r}]", share, least_ok=True, most_ok=False)
        for pattern, share in ratio.items()
    }


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """One of some words; OptionError with the nearest of them otherwise."""
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
    listed = ", ".join(f'"{c}"' for c in choices[:-1]) + f' or "{choices[-1]}"'
    raise OptionError(
        f"{name} is {value!r}",
        where=name,
        why=f"it must be {listed}",
        fix=f"did you mean {near[0]!r}?" if near else None,
    )


def check_whole(name: str, value: object, *, least: int) -> int:
    """A whole number of at least `least`; OptionError or OptionTypeError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise OptionTypeError(f"{name} is {value!r}", where=name, why="it must be a whole number")
    if value < least:
        raise OptionError(f"{name} is {value}", where=name, why=f"it must be at least {least}")
    return value
