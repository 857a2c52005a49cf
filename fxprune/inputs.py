"""What the user passed -> what the compiler works on: the bare model and its example inputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxprune.admission import refuse_sharded
from fxprune.errors import OptionError, OptionTypeError, TraceError
from fxprune.recalibrate import first_input


def unwrap(model: object) -> tuple[nn.Module, list[str]]:
    """The module inside wrappers (torch.compile, DDP, DataParallel), and notes naming them."""
    if not isinstance(model, nn.Module):
        raise OptionTypeError(
            f"model is a {type(model).__name__}",
            where="model",
            why="fxprune prunes instances of torch.nn.Module",
            fix="pass the model itself, not its class, path or state_dict",
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TraceError(
            "the model is a TorchScript module",
            where=type(model).__name__,
            why="scripted code cannot be traced",
            fix="compile the Python model it was scripted from",
        )
    notes: list[str] = []
    while True:
        kind = type(model).__name__
        refuse_sharded(model)
        inner = getattr(model, "_orig_mod", None)
        if inner is None and kind in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model, notes
        notes.append(f"the {kind} wrapper was taken off; wrap the pruned network again")
        model = inner


def find_inputs(
    model: nn.Module, example_inputs: object, data: Iterable[Any] | None
) -> tuple[tuple[Any, ...], Iterable[Any] | None]:
    """Example inputs as a tuple, and `data` unconsumed: given, or the first batch of `data`, or the
    model's `example_input_array`, or timm's input size, or (1, C, 224, 224)."""
    if example_inputs is not None:
        return _as_tuple(example_inputs), data
    if data is not None:
        first, data = _peek(data)
        return (first_input(first),), data
    array = getattr(model, "example_input_array", None)
    if array is not None:
        return _as_tuple(array), data
    config = getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, dict) else None
    if size is not None:
        return (torch.zeros(1, *size, dtype=_dtype(model)),), data
    conv = next((m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)), None)
    if conv is None:
        raise OptionError(
            "the shape of the input is not known",
            where="example_inputs",
            why="the model has no convolution to guess it from",
            fix="pass example_inputs=..., a tensor or a tuple of what forward takes",
        )
    spatial = {1: (224,), 2: (224, 224), 3: (16, 112, 112)}[len(conv.kernel_size)]
    return (torch.zeros(1, conv.in_channels, *spatial, dtype=_dtype(model)),), data


def guessed(model: nn.Module, example_inputs: object, data: object) -> bool:
    """Whether `find_inputs` has nothing to go by but the first convolution."""
    known = getattr(model, "example_input_array", None) is not None
    known = known or bool((getattr(model, "default_cfg", None) or {}).get("input_size"))
    return example_inputs is None and data is None and not known


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def _as_tuple(inputs: object) -> tuple[Any, ...]:
    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    tensors = [v for v in pytree.tree_leaves(inputs) if isinstance(v, Tensor)]
    if not isinstance(inputs, tuple | list) or not tensors:
        raise OptionTypeError(
            f"example_inputs is a {type(inputs).__name__}",
            where="example_inputs",
            why="it must be a tensor, or a tuple of what forward takes with a tensor in it",
            fix="example_inputs=torch.randn(1, 3, 224, 224)",
        )
    if any(v.dim() > 1 and v.numel() == 0 for v in tensors):
        raise OptionError(
            "example_inputs holds an empty tensor",
            where="example_inputs",
            why="sizes and costs are read off one sample",
            fix="pass at least one sample",
        )
    return tuple(inputs)


def _peek(data: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    try:
        iterator: Iterator[Any] = iter(data)
    except TypeError as error:
        raise OptionTypeError(
            f"data is a {type(data).__name__}",
            where="data",
            why="it must be an iterable of (input, target) batches",
        ) from error
    nothing = object()
    first = next(iterator, nothing)
    if first is nothing:
        raise OptionError("data gave no batch", where="data", fix="pass a loader with at least one batch")  # fmt: skip
    return first, itertools.chain([first], iterator) if iterator is data else data
