"""What a trainer and a score need of a batch and of the model's answer, checked in plain words.

Promise: `pair` and `logits_of` give tensors that cross-entropy accepts, or an error that says what
the loader or the model gives instead; nothing waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import OptionError, OptionTypeError

Loader = Iterable[Sequence[Any]]  # of (input, target)


def pair(batch: object) -> tuple[Tensor, Tensor]:
    """(input, target) of a batch; OptionTypeError for anything else."""
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
    x, y = batch
    if y.dtype != torch.int64 or y.dim() != 1 or not len(y) or x.shape[:1] != y.shape:
        dtype = str(y.dtype).removeprefix("torch.")
        raise OptionTypeError(
            "the targets of a batch must be int64 [N], the classes of its N >= 1 inputs",
            where="loader",
            why=f"it yields inputs {list(x.shape)} and targets {dtype} {list(y.shape)}",
            fix="wrap the loader so that it yields class numbers: y.long(), or y.argmax(1) of one-hot",
        )
    return x, y


def logits_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The model's output, [N, classes], when it is that and `y` fits it.

    x is cast to the floating type of the model, where that is another.
    """
    try:
        logits = model(as_floats(model, x))
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise OptionError(
            "a batch of one sample cannot train a batch norm",
            where="loader",
            why=f"one value per channel has no variance: {error}",
            fix="use a larger batch size (drop_last=True drops a rest of one)",
        ) from error
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(y):
        found = list(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise OptionTypeError(
            f"the model must give logits [{len(y)}, classes] for {len(y)} inputs",
            where="model",
            why=f"it gives {found}",
            fix="wrap it so that it gives only those (auxiliary outputs left out)",
        )
    # Only where it costs no wait for a device; there, CUDA's own error ends the process's use of it.
    if y.device.type == "cpu" and not 0 <= int(y.min()) <= int(y.max()) < logits.shape[1]:
        raise OptionError(
            f"the targets run from {int(y.min())} to {int(y.max())}",
            where="loader",
            why=f"the model has the classes 0 to {logits.shape[1] - 1}",
            fix="build the model with as many classes as the data has",
        )
    return logits


def as_floats(model: nn.Module, x: Tensor) -> Tensor:
    """`x` in the type of the model's first floating parameter; as it is where some parameter has
    its type, or where it holds no floats."""
    if not x.is_floating_point():
        return x
    own = (p.dtype for p in model.parameters() if p.is_floating_point())
    first = next(own, x.dtype)
    return x if x.dtype == first or x.dtype in own else x.to(first)


def empty(epoch: int = 0) -> OptionError:
    """The error for a loader that gave nothing in the epoch after `epoch` whole ones."""
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


def check_loader(loader: object, name: str) -> None:
    """OptionTypeError unless it can be iterated; `name` is the argument that holds it."""
    if isinstance(loader, nn.Module | Tensor) or not isinstance(loader, Iterable):
        raise OptionTypeError(
            f"{name} is a {type(loader).__name__}",
            where=name,
            why="it must be an iterable of (input, target) batches",
            fix="pass a DataLoader or a list of batches",
        )
