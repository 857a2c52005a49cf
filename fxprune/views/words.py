"""How reports write numbers and names: one wording for the terminal, the page and the plots.

Names come from users. Control characters are spelled out, and the middle of a long name is left
out; escaping is left to whoever writes markup.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

_SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def clean(text: str) -> str:
    """Without control characters: a layer's name must not move the cursor."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def si(number: float) -> str:
    """1234567 -> "1.23 M": three digits and a suffix."""
    for size, suffix in _SUFFIXES:
        if abs(number) >= 0.9995 * size:
            digits = number / size
            return f"{digits:.{2 if digits < 9.995 else 1 if digits < 99.95 else 0}f} {suffix}"
    return f"{number:g}"


def percent(share: float | None, digits: int = 1) -> str:
    """0.5 -> "50.0 %"; "-" for None and numbers that are not finite."""
    return "-" if share is None or not math.isfinite(share) else f"{100 * share:.{digits}f} %"


def counted(number: int, noun: str) -> str:
    """(2, "layer") -> "2 layers"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def are_shares(values: Iterable[float]) -> bool:
    """Whether all of these scores can be shares, to be shown in percent."""
    return all(0 <= value <= 1 for value in values if math.isfinite(value))


def scorer(values: Sequence[float], digits: int = 2) -> Callable[[float], str]:
    """How these scores are written: all with as many digits behind the point."""
    if are_shares(values):
        return lambda value: percent(value, digits)
    most = max((abs(v) for v in values if math.isfinite(v)), default=0.0)
    if not 1e-3 <= most < 1e6:
        return lambda value: f"{value:.4g}"
    places = max(3 - math.floor(math.log10(most)), 0)
    return lambda value: f"{value:.{places}f}"


def dropped(drop: float, shares: bool) -> str:
    """A drop of the score: 0.01 -> "1 point" where scores are shares, else "0.01"."""
    points = 100 * drop
    return f"{points:g} point{'s' * (points != 1)}" if shares else f"{drop:g}"


def timer(medians: Iterable[float]) -> Callable[[float], str]:
    """How these milliseconds are written: all with as many digits behind the point."""
    least = min((m for m in medians if math.isfinite(m) and m > 0), default=1.0)
    digits = next(d for d, low in ((0, 100), (1, 10), (2, 0.1), (4, 0)) if least >= low)
    return lambda value: f"{value:.{digits}f}"


def as_fast(times: float) -> str:
    """The one wording for a speed in comparison."""
    return f"{times:.2f}x as fast"


def short(name: str, most: int = 44, dots: str = "…") -> str:
    """A long name with its middle left out; `most` counts cells of a terminal."""
    from rich.cells import cell_len

    name = clean(name)
    if cell_len(name) <= most:
        return name
    room = max(most - len(dots), 2)
    head, tail = _cells(name, room // 2), _cells(name[::-1], room - room // 2)[::-1]
    return f"{head}{dots}{tail}"


def _cells(text: str, most: int) -> str:
    """The start of a text, so much that it takes at most so many cells of a terminal."""
    from rich.cells import cell_len

    return text[: sum(total <= most for total in accumulate(map(cell_len, text)))]


def some(names: Sequence[str], most: int) -> str:
    """The first `most` names, and how many more there are."""
    shown = ", ".join(clean(n) for n in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


# ---- methods ------------------------------------------------------------------------------------

_NAMES = {
    "l1": "L1",
    "resrep": "ResRep",
    "tmi-gkp": "TMI-GKP",
    "reprune": "REPrune",
    "fpgm": "FPGM",
    "bn-scale": "BN scale",
    "manual": "hand",
}
_LATE = {"order": -1, "ratio": 1, "preset": 1}  # which first, how much last
_LISTED = 3  # ratios of patterns that the line names one by one


def method_line(name: str, options: Mapping[str, Any]) -> str:
    """A method and its options in one line: "L1, smallest first, preset ResNet-56-A".

    options: what the plan records, by name; values of any JSON type.
    """
    if not options:
        return clean(name)
    called = options.get("callable")
    parts = [_NAMES.get(name, clean(name)) + (f" ({short(str(called))})" if called else "")]
    ordered = sorted(options.items(), key=lambda item: _LATE.get(item[0], 0))
    for key, value in ordered:
        if key not in ("name", "callable") and value is not None:
            parts.append(_option(key, value))
    return ", ".join(parts)


def _option(key: str, value: Any) -> str:
    """One option in words."""
    if key == "order" and isinstance(value, str):
        return f"{short(value)} first"
    if key == "ratio":
        return _ratio(value)
    if key == "norm" and value in ("l1", "l2"):
        return f"{value[1]}-norm"
    if key == "scoring" and isinstance(value, str):
        return f"{short(value)} scores"
    if key == "steps" and isinstance(value, int):
        return f"in {counted(value, 'step')}"
    if key == "samples" and isinstance(value, int):
        return counted(value, "sample")
    name = short(key.replace("_", " "))
    if isinstance(value, bool):
        return name if value else f"no {name}"
    if isinstance(value, Mapping | list | tuple):
        return f"{name} with {counted(len(value), 'value')}"
    return f"{name} {short(str(value))}"


def _is_share(value: Any) -> bool:
    """A number that percent can be said of: a report may hold any, also one that no float holds."""
    return isinstance(value, int | float) and 0 <= value <= 1


def _ratio(value: Any) -> str:
    """How much goes: of all groups, or by pattern."""
    if _is_share(value):
        return f"{100 * value:g} % of every group"
    if not isinstance(value, Mapping):
        return f"ratio {short(str(value))}"
    shares = [v for v in value.values() if _is_share(v)]
    if len(value) <= _LISTED or len(shares) < len(value):
        listed = list(value.items())[:_LISTED]
        return " and ".join(
            f"{100 * v:g} % of {short(k)}" if _is_share(v) else short(str(k)) for k, v in listed
        )
    return f"{100 * min(shares):g} to {100 * max(shares):g} % of {len(value)} named parts"
