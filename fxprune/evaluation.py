"""How good a network is, by whatever measure the user passed: a function of it, or a loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from fxprune import fit
from fxprune.errors import OptionTypeError
from fxprune.graph import evaluating

Evaluate = Callable[[nn.Module], float] | Iterable[Any]


def score(model: nn.Module, evaluate: Evaluate) -> float:
    """`evaluate(model)`, or the top-1 accuracy over a loader, in eval mode; modes are as before.

    Raises OptionTypeError when `evaluate` gives anything but one number.
    """
    with evaluating(model):  # guard: eval -> tests/methods -k measured_in_eval
        given = evaluate(model) if callable(evaluate) else fit.accuracy(model, evaluate)
    try:
        return float(given)
    except (TypeError, ValueError, RuntimeError) as error:
        raise OptionTypeError(
            f"evaluate gave a {type(given).__name__}",
            where="evaluate",
            why=f"it must give one number, the higher the better: {error}",
            fix="return a float, such as the accuracy",
        ) from error


def check_evaluate(evaluate: object) -> None:
    """OptionTypeError for what is neither a callable nor a loader."""
    if isinstance(evaluate, str) or not (callable(evaluate) or isinstance(evaluate, Iterable)):
        raise OptionTypeError(
            f"evaluate is {evaluate!r}",
            where="evaluate",
            why="it must be a callable (model) -> float, or a loader of (input, target) batches",
        )
