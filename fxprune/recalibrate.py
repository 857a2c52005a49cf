"""Recompute batch-norm statistics from data: what pruning shifts most, and mends cheapest."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fxprune.errors import OptionError, OptionTypeError
from fxprune.pruned import PrunedModule
from fxprune.training.batches import as_floats

M = TypeVar("M", bound=nn.Module)


def recalibrate(pruned: M, loader: Iterable[Any], samples: int = 1024) -> M:
    """A copy of `pruned` whose batch norms hold the mean statistics of `samples` inputs.

    loader: batches of inputs, or (input, target, ...) tuples; it is read until `samples` inputs
    were seen or it ends (a rest of one sample is left out). Every other layer stays in eval mode meanwhile; the argument is untouched.
    Raises OptionError for an empty loader. Its plan's weights are "changed" afterwards.
    """
    if isinstance(samples, bool) or not isinstance(samples, int):
        raise OptionTypeError(f"samples is {samples!r}", where="samples", why="it must be a whole number")  # fmt: skip
    if samples < 1:
        raise OptionError(f"samples is {samples}", where="samples", why="it must be at least 1")
    if not isinstance(pruned, nn.Module):
        raise OptionTypeError(f"pruned is a {type(pruned).__name__}", where="pruned", why="it must be a torch.nn.Module")  # fmt: skip
    if not isinstance(loader, Iterable) or isinstance(loader, nn.Module):
        raise OptionTypeError(
            f"loader is a {type(loader).__name__}",
            where="loader",
            why="it must be an iterable of inputs or (input, target) batches",
        )
    new = copy.deepcopy(pruned)
    norms = [
        m
        for m in new.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    modes = [(m, m.training) for m in new.modules()]
    momenta = [m.momentum for m in norms]
    for module, _ in modes:
        module.training = False
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum, norm.training = None, True  # None: the mean over batches
    seen = _run(new, loader, samples) if norms else 1
    if not seen:
        raise OptionError(
            "the loader for recalibration gave no batch",
            where="loader",
            fix="pass an iterable of (input, target) batches; a generator can be read only once",
        )
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for module, mode in modes:
        module.training = mode
    if isinstance(new, PrunedModule) and norms:
        new.plan = replace(new.plan, weights="changed")
        new.report.notes.append(f"batch norms were recalibrated on {seen} samples")
    return new


def _run(model: nn.Module, loader: Iterable[Any], samples: int) -> int:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    seen = largest = 0
    with torch.no_grad():
        for batch in loader:
            x = first_input(batch)[: samples - seen]
            if len(x) == 1 and largest > 1:
                break  # one sample has no variance of its own
            largest = max(largest, len(x))
            if len(x):
                model(as_floats(model, x.to(device)))
            seen += len(x)
            if seen >= samples:
                break
    return seen


def first_input(batch: Any) -> Tensor:
    """The input of a batch: the batch itself, or its first element."""
    x = batch[0] if isinstance(batch, tuple | list) and batch else batch
    if not isinstance(x, Tensor):
        raise OptionTypeError(
            f"a batch holds {type(x).__name__} where the input should be",
            where="data",
            why="batches must be tensors or (input, target) tuples",
            fix="wrap the loader so that it yields (input, target)",
        )
    return x
