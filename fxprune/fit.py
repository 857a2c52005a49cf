"""The reference trainer: SGD with Nesterov momentum, a schedule, cross-entropy, and nothing clever.

Promise: the same model, loader, recipe and thread count give the same weights, bit for bit on a
CPU; the global random state and every module's training flag are as before afterwards; after an
error the weights and buffers are as before too.
Refuses: an empty loader, batches that are not (input, target), a loss that is not finite.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxprune.errors import FxPruneError, OptionError, OptionTypeError

_CHECK_EVERY = 16  # steps between two looks at the loss; each look waits for the GPU


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train; OptionError for a value that makes no sense.

    `lr` is the peak learning rate. After `warmup` epochs of linear rise, "cosine" falls to 0 at
    the end, "step" multiplies by `gamma` at each of the `milestones` (shares of all epochs), and
    "constant" stays. `weight_decay` acts on every parameter. `clip_norm` bounds the 2-norm of the
    whole gradient; None leaves it. `seed` fixes dropout and the order of loaders that have no
    generator of their own.
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

    def __post_init__(self) -> None:
        for name, fine, wanted in (
            ("epochs", _whole(self.epochs) and self.epochs >= 0, "an integer of at least 0"),
            ("lr", 0 < self.lr < math.inf, "above 0"),
            ("momentum", 0 <= self.momentum < 1, "at least 0 and below 1"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "at least 0"),
            ("schedule", self.schedule in _SCHEDULES, f"one of {', '.join(_SCHEDULES)}"),
            ("warmup", 0 <= self.warmup < math.inf, "a number of epochs of at least 0"),
            ("milestones", all(0 < m < 1 for m in self.milestones), "shares between 0 and 1"),
            ("gamma", 0 < self.gamma <= 1, "above 0 and at most 1"),
            ("label_smoothing", 0 <= self.label_smoothing < 1, "at least 0 and below 1"),
            ("clip_norm", self.clip_norm is None or self.clip_norm > 0, "None or above 0"),
            ("seed", _whole(self.seed), "an integer"),
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


_SCHEDULES = ("cosine", "step", "constant")


def train(
    model: nn.Module,
    loader: Iterable[Sequence[Any]],
    recipe: Recipe,
    *,
    progress: bool = True,
    on_epoch: Callable[[int, float], None] | None = None,
) -> list[float]:
    """Train `model` in place; the mean cross-entropy of every epoch, `recipe.epochs` numbers.

    loader:   yields (input, target): float [N, ...] and int64 [N], moved to the model's device;
              iterated once per epoch.
    progress: a bar on stderr, where that is a terminal.
    on_epoch: called as on_epoch(epochs done, mean loss) after every epoch.
    OptionError when the loader is empty or yields something else, FxPruneError when the loss is
    not finite; the model is then as before. Ctrl-C keeps what was trained so far.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise OptionError(
            "this model has nothing to train",
            where="model",
            why="no parameter requires a gradient",
            fix="call model.requires_grad_()",
        )
    device = parameters[0].device
    optimizer = recipe.optimizer(parameters)
    before = {key: value.detach().clone() for key, value in _state(model).items()}
    losses: list[float] = []
    try:
        with _modes(model), _seeded(recipe.seed, device), _bar(progress, recipe.epochs) as show:
            model.train()
            for epoch in range(recipe.epochs):
                losses.append(_epoch(model, loader, recipe, optimizer, device, epoch, show))
                if on_epoch is not None:
                    on_epoch(epoch + 1, losses[-1])
    except Exception:
        with torch.no_grad():
            for key, value in _state(model).items():
                value.copy_(before[key])
        raise
    finally:
        optimizer.zero_grad(set_to_none=True)
    return losses


def accuracy(model: nn.Module, loader: Iterable[Sequence[Any]]) -> float:
    """The share of inputs whose largest logit is the target's: top-1, 0 to 1.

    loader yields (input, target): float [N, ...] and int64 [N]; the model gives [N, classes].
    Measured in eval mode; every module's mode is as before afterwards. OptionError when the
    loader is empty or yields something else.
    """
    device = _device(model)
    right, seen = torch.zeros((), dtype=torch.int64, device=device), 0
    with _modes(model), torch.no_grad():
        model.eval()
        for batch in loader:
            x, y = _pair(batch, device)
            right += (model(x).argmax(1) == y).sum()
            seen += len(y)
    if not seen:
        raise _empty()
    return right.item() / seen


_Show = Callable[[float, float], None]  # epochs done, loss


def _epoch(
    model: nn.Module,
    loader: Iterable[Sequence[Any]],
    recipe: Recipe,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    epoch: int,
    show: _Show,
) -> float:
    """One pass over the loader; the mean loss per sample."""
    steps = len(loader) if isinstance(loader, Sized) else 0
    total, seen, step = torch.zeros((), dtype=torch.float64, device=device), 0, 0
    for step, batch in enumerate(loader, 1):
        x, y = _pair(batch, device)
        done = epoch + min((step - 1) / steps, 1.0) if steps else float(epoch)
        # The first step of a warm-up would have rate 0: use the rate at the middle of the step.
        rate = recipe.learning_rate(min(done + (0.5 / steps if steps else 0.0), recipe.epochs))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = F.cross_entropy(model(x), y, label_smoothing=recipe.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(
                (p for g in optimizer.param_groups for p in g["params"]), recipe.clip_norm
            )
        optimizer.step()
        total += loss.detach().double() * len(y)
        seen += len(y)
        if step % _CHECK_EVERY == 1:
            show(done, _finite(total.item() / seen, epoch, step, recipe))
    if not step:
        raise _empty(epoch)
    mean = _finite(total.item() / seen, epoch, step, recipe)
    show(epoch + 1, mean)
    return mean


def _finite(loss: float, epoch: int, step: int, recipe: Recipe) -> float:
    if math.isfinite(loss):
        return loss
    raise FxPruneError(
        f"the loss became {loss}",
        where=f"epoch {epoch + 1}, at or before step {step}",
        why="training diverged, or an input or a weight is not finite",
        fix=f"use a smaller learning rate (now {recipe.lr:g}) or warmup=1 or clip_norm=1.0; "
        "check that inputs and weights are finite. The model is as it was before training",
    )


def _empty(epoch: int = 0) -> OptionError:
    if epoch:
        return OptionError(
            f"the loader gave nothing in epoch {epoch + 1}",
            where="loader",
            why="it can be iterated only once (a generator?)",
            fix="pass a DataLoader or a list of batches",
        )
    return OptionError(
        "the loader is empty",
        where="loader",
        why="it yields no batch",
        fix="pass an iterable of (input, target) batches that can be iterated once per epoch; "
        "a DataLoader with drop_last=True needs at least one full batch",
    )


def _pair(batch: object, device: torch.device) -> tuple[Tensor, Tensor]:
    """(input, target) on the device; OptionTypeError for anything else."""
    if (
        not isinstance(batch, list | tuple)
        or len(batch) != 2
        or not all(isinstance(part, Tensor) for part in batch)
    ):
        found = type(batch).__name__
        if isinstance(batch, list | tuple):
            found += f" of {', '.join(type(part).__name__ for part in batch)}"
        raise OptionTypeError(
            "a batch must be a pair of tensors, (input, target)",
            where="loader",
            why=f"it yields a {found}",
            fix="wrap the loader so that it yields such pairs",
        )
    return batch[0].to(device, non_blocking=True), batch[1].to(device, non_blocking=True)


def _device(model: nn.Module) -> torch.device:
    """Where the model lives: the device of its first parameter or buffer."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer, those left out of `state_dict()` too."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@contextmanager
def _modes(model: nn.Module) -> Iterator[None]:
    """Give every module its training flag back at the end."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch inside; the random state outside is untouched."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield


@contextmanager
def _bar(progress: bool, epochs: int) -> Iterator[_Show]:
    """What shows how far training is: a bar on a terminal, or nothing."""
    if not progress:
        yield lambda done, loss: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("training"),
        BarColumn(),
        TextColumn("epoch {task.fields[epoch]} of {task.total:.0f}, loss {task.fields[loss]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    quiet = not console.is_terminal  # a log file gets no bar, and no empty line in its place
    with Progress(*columns, console=console, transient=True, disable=quiet) as bar:
        task = bar.add_task("training", total=epochs, epoch=1, loss="-")

        def show(done: float, loss: float) -> None:
            epoch = min(int(done) + 1, epochs)
            bar.update(task, completed=done, epoch=epoch, loss=f"{loss:.3f}")

        yield show


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
