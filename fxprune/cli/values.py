"""Words of the command line -> the values that fxprune takes: ratios, budgets, methods, sizes.

Refuses: what makes no sense, with an OptionError that names the option as it was written.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fxprune.budget import Budget
from fxprune.config import REGISTRY, Ratio, resolve
from fxprune.errors import OptionError
from fxprune.passes.methods.l1 import PRESETS


def method_of(name: str, options: Mapping[str, Any]) -> object:
    """The config of a method with these options; those that are None were not given.

    OptionError for a method or an option that does not exist.
    """
    resolve(name)  # names the nearest method when there is none of that name
    config = REGISTRY[name].config
    given = {key: value for key, value in options.items() if value is not None}
    known = [f.name for f in dataclasses.fields(config)]
    for key in given:
        if key not in known:
            raise OptionError(
                f"method {name} takes no --{key}",
                where=f"--{key}",
                why=f"its options are {', '.join('--' + k for k in known)}",
            )
    return config(**given)


def method_names(incomplete: str) -> list[str]:
    """For the shell's completion."""
    return [name for name in sorted(REGISTRY) if name.startswith(incomplete)]


def preset_names(incomplete: str) -> list[tuple[str, str]]:
    """For the shell's completion: each with the network that it is made for."""
    found = PRESETS.items()
    return [(name, f"for {p.network}") for name, p in found if name.startswith(incomplete)]


def ratio_of(words: Sequence[str]) -> Ratio | None:
    """["0.3"] -> 0.3; ["layer1.*=0.1", "0.3"] -> {"layer1.*": 0.1, "*": 0.3}; "@FILE" reads a JSON
    object of such pairs; nothing -> None. What the words name counts before what files name, and
    an earlier file before a later one."""
    shares: dict[str, float] = {}
    rest: float | None = None
    for word in words:
        if word.startswith("@"):
            continue
        pattern, equals, number = word.rpartition("=")
        share = _number(number, "--ratio", "--ratio 0.3, --ratio 'layer1.*=0.3' or --ratio @FILE")
        if equals and pattern in shares:
            raise OptionError(f"--ratio {pattern}= is given twice", where="--ratio", fix="drop one")
        if equals:
            shares[pattern] = share
        elif rest is not None:
            raise OptionError(
                f"two shares without a name were given, {rest:g} and {share:g}",
                where="--ratio",
                fix="say which layers: --ratio 'layer1.*=0.1' --ratio 'layer2.*=0.3'",
            )
        else:
            rest = share
    if rest is not None and "*" in shares:
        raise OptionError(
            f"two shares for all layers were given, {rest:g} and *={shares['*']:g}",
            where="--ratio",
            fix="drop one",
        )
    for file in ratio_files(words):
        for name, share in _ratios_in(file).items():
            if name != "*" or rest is None:
                shares.setdefault(name, share)
    if not shares:
        return rest
    return shares if rest is None else {**shares, "*": rest}


def ratio_files(words: Sequence[str]) -> list[Path]:
    """The files that --ratio reads."""
    return [Path(word[1:]) for word in words if word.startswith("@")]


def _ratios_in(file: Path) -> dict[str, float]:
    if not file.exists():
        raise OptionError(
            f"there is no file `{file}`",
            where=f"--ratio @{file}",
            fix="analyze --sensitivity writes one: ratios.json",
        )
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise OptionError(
            f"no ratios can be read from `{file}`",
            where="--ratio",
            why=str(error).splitlines()[0],
            fix='write a JSON object: {"layer1.0.conv1": 0.3}',
        ) from error
    numbers = isinstance(content, dict) and all(
        isinstance(v, int | float) and not isinstance(v, bool) for v in content.values()
    )
    if not content or not numbers:
        raise OptionError(
            f"`{file}` holds no ratios",
            where="--ratio",
            fix='write a JSON object of names and shares: {"layer1.0.conv1": 0.3}',
        )
    return dict(content)


def budget_of(words: Sequence[str]) -> Budget | None:
    """["0.5"] or ["macs=0.5", "params=0.4"] -> what may remain; nothing -> None."""
    limits: dict[str, float] = {}
    for word in words:
        name, equals, number = word.rpartition("=")
        name = name if equals else "macs"
        if name not in ("macs", "params"):
            raise OptionError(
                f"--budget {word} makes no sense",
                where="--budget",
                why="macs and params are what a budget counts",
                fix="--budget macs=0.5",
            )
        if name in limits:
            raise OptionError(f"--budget {name}= is given twice", where="--budget", fix="drop one")
        limits[name] = _number(number, "--budget", "--budget macs=0.5")
    return Budget(**limits) if limits else None


def scope_of(words: Sequence[str]) -> str | tuple[str, ...]:
    """["all"], ["free"], or patterns of names."""
    return words[0] if len(words) == 1 and words[0] in ("all", "free") else tuple(words)


def size_of(text: str) -> tuple[int, ...]:
    """ "1x3x224x224" -> (1, 3, 224, 224)."""
    parts = text.lower().split("x")
    if len(parts) < 2 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise OptionError(
            f"--input-size {text} makes no sense",
            where="--input-size",
            why="it is batch x channels x height x width",
            fix="--input-size 1x3x224x224",
        )
    return tuple(int(part) for part in parts)


def choice_of(text: str, option: str, choices: Mapping[str, Any]) -> Any:
    """The value of a word; OptionError lists the words."""
    if text not in choices:
        raise OptionError(
            f"{option} is {text!r}", where=option, why=f"it must be {' or '.join(choices)}"
        )
    return choices[text]


def _number(text: str, option: str, example: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise OptionError(
            f"{option} {text} is no number", where=option, fix=f"write {example}"
        ) from None
