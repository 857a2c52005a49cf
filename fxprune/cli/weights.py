"""Trained weights from a file into a model: `.safetensors`, or `.pth` / `.pt` without unpickling code.

Promise: strict. Every tensor of the model comes from the file and every tensor of the file goes
         into the model; after an error the model is as before.
Refuses: files with anything but plain tensors, and weights of another architecture or of other
         kinds of numbers, naming the tensors.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import CheckpointError, OptionError

_SUFFIXES = (".safetensors", ".pth", ".pt")
_WRAPPERS = ("state_dict", "model", "model_state_dict")  # under which trainers keep the weights
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel's and torch.compile's names
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # torch puts some into its messages
_NAMED = 4  # tensors that a message names


def load_weights(model: nn.Module, path: Path) -> None:
    """Fill `model` from a file of weights; CheckpointError names what is missing or does not fit."""
    state = read_weights(path)
    own = model.state_dict()
    missing = [n for n in own if n not in state and not n.endswith(".num_batches_tracked")]
    unexpected = [n for n in state if n not in own]
    shapes = [
        f"{n} is {tuple(state[n].shape)}, not {tuple(own[n].shape)}"
        for n in own
        if n in state and own[n].shape != state[n].shape
    ]
    kinds = [
        f"{n} is {_dtype(state[n])}, not {_dtype(own[n])}"
        for n in own
        if n in state and _kind(own[n]) != _kind(state[n])
    ]
    if (
        missing or unexpected or shapes or kinds
    ):  # guard: strict weights -> tests/cli/test_weights.py -k fit
        parts = (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
            ("of another kind", kinds),
        )
        raise CheckpointError(
            f"the weights do not fit this {type(model).__name__}",
            where=str(path),
            why="; ".join(f"{label}: {_some(names)}" for label, names in parts if names),
            fix=_advice(path, shapes, own),
        )
    model.load_state_dict(state, strict=False)  # only counters of batch norms may be missing


def read_weights(path: Path) -> dict[str, Tensor]:
    """Name -> tensor on the CPU, out of a trainer's wrapping; CheckpointError for anything else."""
    if path.suffix not in _SUFFIXES:
        raise OptionError(
            f"`{path.name}` is no file of weights",
            where="--weights",
            why=f"its name must end in {', '.join(_SUFFIXES)}",
        )
    if not path.is_file():
        raise OptionError(f"there is no file `{path}`", where="--weights")
    try:
        content: Any = _safetensors(path) if path.suffix == ".safetensors" else _torch(path)
    except Exception as error:  # a damaged file fails in many ways
        raise CheckpointError(
            "the weights cannot be read",
            where=str(path),
            why=f"{type(error).__name__}: {_first_line(error)}",
            fix="it must hold tensors only: save model.state_dict(), or a .safetensors file",
        ) from error
    seen: list[Any] = []  # a wrapper may hold itself
    while isinstance(content, Mapping) and not any(content is s for s in seen):
        seen.append(content)
        inner = next((content[k] for k in _WRAPPERS if isinstance(content.get(k), Mapping)), None)
        if inner is None:
            break
        content = inner
    if not isinstance(content, Mapping) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    ):
        raise CheckpointError(
            "this file holds no state_dict",
            where=str(path),
            why=f"it holds {_described(content)}",
            fix="save model.state_dict()",
        )
    for name, t in content.items():
        special = t.is_meta or t.layout != torch.strided or t.is_quantized
        if special:  # guard: plain tensors -> tests/cli/test_weights.py -k not_plain
            raise CheckpointError(
                f"`{name}` is no plain tensor",
                where=str(path),
                why=f"it is {_special(t)}",
                fix="save dense tensors that hold their numbers",
            )
    while content and (
        prefix := next((p for p in _PREFIXES if all(n.startswith(p) for n in content)), "")
    ):
        content = {name.removeprefix(prefix): t for name, t in content.items()}
    return dict(content)


def _safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(path)


def _torch(path: Path) -> Any:  # whatever the file holds
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what torch thinks of the pickle, before it refuses it
        return torch.load(path, map_location="cpu", weights_only=True)


def _first_line(error: Exception) -> str:
    return (_COLOURS.sub("", str(error)).splitlines() or [""])[0]


def _kind(tensor: Tensor) -> str:
    """What a tensor counts in; within a kind, numbers are converted."""
    if tensor.dtype.is_floating_point:
        return "float"
    if tensor.dtype.is_complex:
        return "complex"
    return "bool" if tensor.dtype == torch.bool else "integer"


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _special(tensor: Tensor) -> str:
    if tensor.is_meta:
        return "on the meta device, without numbers"
    return "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")


def _described(content: object) -> str:
    if isinstance(content, Mapping):
        odd = next((k for k in content if not isinstance(k, str)), None)
        if odd is not None:
            return f"the name {odd!r}, which is no string"
        other = next((k for k, v in content.items() if not isinstance(v, Tensor)), None)
        return f"a {type(content[other]).__name__} under `{other}`"
    return f"a {type(content).__name__}"


def _advice(path: Path, shapes: list[str], own: Mapping[str, Tensor]) -> str:
    if shapes and _is_pruned(path):
        return "it is a pruned network: fxprune report shows it; start from the original's weights"
    last = list(own)[-1:] + list(own)[-2:-1]  # the classifier, in most networks
    if shapes and all(any(s.startswith(f"{n} ") for n in last) for s in shapes):
        return "the number of classes differs: --set num_classes=N"
    return "name the model that these weights were trained with, and its options with --set"


def _is_pruned(path: Path) -> bool:
    if path.suffix != ".safetensors":
        return False
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return "fxprune" in (file.metadata() or {})


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"
