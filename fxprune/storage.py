"""Save and load pruned networks: one safetensors file with weights, plan and checksum, no pickle."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from fxprune.checkpoint import MAX_DIMS, read_tensors, write_tensors
from fxprune.errors import CheckpointError, OptionTypeError, PlanError
from fxprune.plan import Plan
from fxprune.pruned import InputSpec, PrunedModule, plan_now
from fxprune.surgery import memory_format

MOST_ELEMENTS = 1 << 33  # of an example input; beyond that a file is not believed
_HEADER = {"plan", "front_end", "inputs"}


def save(pruned: PrunedModule, path: str | Path) -> None:
    """Write weights, plan and input shapes to one safetensors file, crash-safe.

    Saving twice gives the same bytes. A network trained since it was cut is recorded with
    `weights: "changed"`. Raises CheckpointError, with the old file intact.
    """
    if not isinstance(pruned, PrunedModule):
        raise OptionTypeError(
            f"save was given a {type(pruned).__name__}",
            where="pruned",
            why="it writes what fxprune.compile, apply or load returned",
            fix="save other models with safetensors.torch.save_model",
        )
    header = {
        "plan": plan_now(pruned).to_dict(),
        "front_end": pruned.origin.front_end,
        "inputs": [{"shape": list(s.shape), "dtype": s.dtype} for s in pruned.origin.inputs],
    }
    write_tensors(path, unique_tensors(pruned), header)


def unique_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a state_dict, each once, under its first name."""
    state = module.state_dict(keep_vars=True)
    seen: set[int] = set()
    unique: dict[str, Tensor] = {}
    for name, t in state.items():
        if isinstance(t, Tensor) and id(t) not in seen:
            seen.add(id(t))
            unique[name] = t
    return unique


def read(path: str | Path) -> tuple[Plan, str, tuple[InputSpec, ...], dict[str, Tensor]]:
    """Plan, front end, input specs and tensors of a file; CheckpointError for anything else."""
    header, tensors = read_tensors(path)
    try:
        if set(header) != _HEADER:
            raise PlanError(f"its header has the keys {sorted(header)}")
        if not isinstance(header["front_end"], str) or not isinstance(header["inputs"], list):
            raise PlanError("its header holds other things than a front end and a list of inputs")
        plan = Plan.from_dict(header["plan"])
        inputs = tuple(_input(spec) for spec in header["inputs"])
    except PlanError as error:
        raise CheckpointError(
            f"`{path}` holds no valid plan: {error.what}",
            where=str(path),
            why="the file was written by something else, or altered",
            fix="save the network again with fxprune.save",
        ) from error
    return plan, header["front_end"], inputs, tensors


def _input(spec: object) -> InputSpec:
    if isinstance(spec, dict) and set(spec) == {"shape", "dtype"}:
        shape, dtype = spec["shape"], spec["dtype"]
        if isinstance(shape, list) and len(shape) <= MAX_DIMS and _is_dtype(dtype):
            sizes_ok = all(type(n) is int and n >= 0 for n in shape)
            if sizes_ok and math.prod(max(n, 1) for n in shape) <= MOST_ELEMENTS:
                return InputSpec(tuple(shape), dtype)
    raise PlanError("it holds a bad input spec")


def _is_dtype(name: object) -> bool:
    return name in (
        [
            "float64",
            "float32",
            "float16",
            "bfloat16",
            "int64",
            "int32",
            "int16",
            "int8",
            "uint8",
            "bool",
            "complex64",
        ]
    )


def fill(pruned: PrunedModule, tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Put the file's tensors in place: its dtype, the network's device, layout and flags."""
    expected = unique_tensors(pruned)
    for name in [*expected, *tensors]:
        a, b = expected.get(name), tensors.get(name)
        fits = a is not None and b is not None and (a.shape, _kind(a)) == (b.shape, _kind(b))
        if not fits:  # guard: tensors fit -> tests/bad_input/test_files.py -k "fit"
            found, wanted = "missing", "no part of the network"
            if b is not None:
                found = f"{_kind(b)} of shape {tuple(b.shape)}"
            if a is not None:
                wanted = f"{_kind(a)} of shape {tuple(a.shape)}"
            raise CheckpointError(
                f"`{path}` does not fit: `{name}` is {found} in the file",
                where=f"tensor {name}",
                why=f"the plan makes it {wanted}",
                fix="load it with the architecture that it was saved from",
            )
    new = {id(old): tensors[name] for name, old in expected.items()}
    made: dict[int, Tensor] = {}
    dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), None)
    for module in pruned.modules():
        for store in (module._parameters, module._buffers):
            for key, old in store.items():
                if old is not None and id(old) in new:
                    if id(old) not in made:
                        made[id(old)] = _placed(new[id(old)], old)
                    store[key] = made[id(old)]  # type: ignore[assignment]
                elif old is not None:
                    store[key] = _unsaved(key, old, dtype)  # type: ignore[assignment]


def _kind(t: Tensor) -> str:
    """What kind of numbers: a file may change the precision of a network, but not that."""
    if t.is_complex():
        return "complex"
    return "floating point" if t.is_floating_point() else str(t.dtype).removeprefix("torch.")


def _unsaved(name: str, buffer: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A non-persistent buffer: no file holds it, so it stays the model's own, at the file's dtype."""
    if buffer.is_meta:
        raise CheckpointError(
            f"the buffer `{name}` holds no values",
            where=f"buffer {name}",
            why="it is not persistent, so the file has none, and the given model is on the meta device",
            fix="load with a model on a real device",
        )
    return buffer.to(dtype) if dtype is not None and buffer.is_floating_point() else buffer


def _placed(t: Tensor, like: Tensor) -> Tensor:
    t = t.to("cpu" if like.is_meta else like.device)
    if t.layout is torch.strided:
        t = t.contiguous(memory_format=memory_format(like))
    if isinstance(like, nn.Parameter):
        return nn.Parameter(t, requires_grad=like.requires_grad)
    return t
