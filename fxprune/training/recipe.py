"""How to train, in numbers: what the reference trainer (`fxprune.fit`) is told."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch

from fxprune.errors import OptionError

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}
_SCHEDULES = ("cosine", "step", "constant")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train; OptionError for a value that makes no sense.

    `lr` is the peak learning rate. After `warmup` epochs of linear rise, "cosine" falls to 0 at
    the end, "step" multiplies by `gamma` at each of the `milestones` (shares of all epochs), and
    "constant" stays. `weight_decay` acts on every parameter. `clip_norm` bounds the 2-norm of the
    whole gradient; None leaves it. `seed` fixes dropout and the order of loaders that have no
    generator of their own. `amp` computes in "bf16" or, on CUDA, in "fp16" with scaled gradients,
    where torch.autocast finds it safe; weights and loss stay as they are. `channels_last` trains in
    that memory format: the same function, often faster.
    """

    epochs: int = 10
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    warmup: float = 0.0
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    label_smoothing: float = 0.0
    clip_norm: float | None = None
    seed: int = 0
    amp: Literal["bf16", "fp16"] | None = None
    channels_last: bool = False

    def __post_init__(self) -> None:
        shares = isinstance(self.milestones, tuple | list)
        for name, fine, wanted in (
            ("epochs", _whole(self.epochs) and self.epochs >= 0, "an integer of at least 0"),
            ("lr", _real(self.lr) and self.lr > 0, "a number above 0"),
            ("momentum", _real(self.momentum) and 0 <= self.momentum < 1, "at least 0 and below 1"),
            ("weight_decay", _real(self.weight_decay) and self.weight_decay >= 0, "at least 0"),
            ("schedule", self.schedule in _SCHEDULES, f"one of {', '.join(_SCHEDULES)}"),
            ("warmup", _real(self.warmup) and self.warmup >= 0, "a number of epochs, at least 0"),
            (
                "milestones",
                shares and all(_real(m) and 0 < m < 1 for m in self.milestones),
                "a tuple of shares between 0 and 1",
            ),
            ("gamma", _real(self.gamma) and 0 < self.gamma <= 1, "above 0 and at most 1"),
            (
                "label_smoothing",
                _real(self.label_smoothing) and 0 <= self.label_smoothing < 1,
                "at least 0 and below 1",
            ),
            (
                "clip_norm",
                self.clip_norm is None or (_real(self.clip_norm) and self.clip_norm > 0),
                "None or a number above 0",
            ),
            ("seed", _whole(self.seed) and -(2**63) <= self.seed < 2**64, "an integer of 64 bits"),
            ("amp", self.amp is None or self.amp in AMP, 'None, "bf16" or "fp16"'),
            ("channels_last", isinstance(self.channels_last, bool), "True or False"),
        ):
            if not fine:
                raise OptionError(
                    f"Recipe({name}={getattr(self, name)!r}) makes no sense",
                    where=name,
                    why=f"it must be {wanted}",
                )

    def learning_rate(self, epoch: float) -> float:
        """The rate after `epoch` epochs (2.5 is halfway through the third), 0 <= epoch <= epochs."""
        if epoch < self.warmup:
            return self.lr * epoch / self.warmup
        share = epoch / self.epochs if self.epochs else 0.0
        if self.schedule == "step":
            return self.lr * self.gamma ** sum(share >= m for m in self.milestones)
        if self.schedule == "cosine":
            rest = max(self.epochs - self.warmup, 1e-9)
            return self.lr * (1 + math.cos(math.pi * min((epoch - self.warmup) / rest, 1))) / 2
        return self.lr

    def optimizer(self, parameters: Iterable[Any]) -> torch.optim.SGD:
        """Fresh SGD over parameters or parameter groups, as this recipe says."""
        return torch.optim.SGD(
            parameters,
            lr=self.lr,
            momentum=self.momentum,
            weight_decay=self.weight_decay,
            nesterov=self.momentum > 0,
        )


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
