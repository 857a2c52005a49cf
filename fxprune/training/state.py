"""A training in a file: all that it takes to go on as if it had never stopped.

Promise: what `save` wrote, `load` puts back bit for bit: parameters, buffers (those left out of
         `state_dict()` too), momentum, the gradient scaler, random states, losses and scores (one
         that is not finite comes back as nan). The file is crash-safe safetensors with a SHA-256 (`fxprune.checkpoint`), never a pickle.
Refuses: a file of another recipe, model or loader, with CheckpointError that names the difference;
         nothing has been changed then.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sized
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.checkpoint import StrPath, read_tensors, write_tensors
from fxprune.errors import CheckpointError

_KIND = "training state"


@dataclass
class Position:
    """How far a training is: whole epochs, and steps of the epoch under way."""

    epoch: int = 0
    step: int = 0  # batches of this epoch that are done
    seen: int = 0  # samples in them
    total: float = 0.0  # and the sum of their losses
    losses: list[float] = field(default_factory=list)  # of whole epochs
    scores: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Parts:
    """What a training works with. The optimizer is SGD over parameters of the model."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    loader: Iterable[Any]
    recipe: Mapping[str, Any]  # plain numbers, strings and tuples
    device: torch.device


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by its first name, those left out of `state_dict()` too."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def save(
    path: StrPath,
    parts: Parts,
    position: Position,
    start: Mapping[str, Tensor],
    now: Mapping[str, Tensor],
) -> None:
    """Write the training as it stands between two steps; CheckpointError, the old file intact.

    start: the random states at the beginning of this epoch, `randomness.capture(device, loader)`:
    from there the batches that are done are drawn once more when the training goes on.
    now: those after the last step, of which the loader's are not needed.
    """
    tensors = {f"model.{key}": value for key, value in tensors_of(parts.model).items()}
    for name, p in _trained(parts).items():
        buffer = parts.optimizer.state[p].get("momentum_buffer") if p in parts.optimizer.state else None  # fmt: skip
        if buffer is not None:
            tensors[f"momentum.{name}"] = buffer
    tensors |= {f"start.{key}": value for key, value in start.items()}
    tensors |= {f"now.{key}": value for key, value in now.items()}
    header = {
        "kind": _KIND,
        "epoch": position.epoch,
        "step": position.step,
        "seen": position.seen,
        "total": _finite(position.total),
        "losses": position.losses,
        "scores": [_finite(score) for score in position.scores],
        "recipe": _plain(parts.recipe),
        "frozen": _frozen(parts),
        "batches": _length(parts.loader),
        "scaler": parts.scaler.state_dict(),
    }
    write_tensors(path, tensors, header)


def load(path: StrPath, parts: Parts) -> tuple[Position, dict[str, Tensor], dict[str, Tensor]]:
    """Put a saved training back; its position, and the random states of then.

    Returns (position, states at the start of its epoch, states at its step). Model, optimizer and
    scaler hold what they held when it was saved; the random states are for the caller to restore.
    CheckpointError for a file that is damaged or belongs to another training.
    """
    try:
        header, tensors = read_tensors(path)
    except CheckpointError as error:
        raise CheckpointError(
            error.what,
            where=error.where,
            why=error.why,
            fix="give the path of a training's checkpoint; or delete this file, or pass "
            "resume=False, to begin anew",
        ) from error
    groups: dict[str, dict[str, Tensor]] = {"model": {}, "momentum": {}, "start": {}, "now": {}}
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        groups.setdefault(kind, {})[name] = value
    if header.get("kind") != _KIND:
        raise _foreign(path, "it holds no training" + (", but a pruned network" if "plan" in header else ""))  # fmt: skip
    differences = _differences(header, groups["model"], parts)
    if differences:  # guard: another training -> tests/training/test_state.py -k refused
        more = len(differences) - 3
        why = "; ".join(differences[:3]) + (f"; and {more} more" if more > 0 else "")
        raise _foreign(path, why)
    position = Position(*(header[key] for key in ("epoch", "step", "seen", "total", "losses", "scores")))  # fmt: skip
    position.total = _number(position.total)
    position.scores = [_number(score) for score in position.scores]
    _fill(parts, groups["model"], groups["momentum"], header["scaler"])
    return position, groups["start"], groups["now"]


def _differences(header: Mapping[str, Any], saved: Mapping[str, Tensor], parts: Parts) -> list[str]:
    """What the file and this training do not share, each in a few words: then, and now."""
    recipe: Mapping[str, Any] = _plain(parts.recipe)
    found = [
        f"Recipe.{key} was {header['recipe'].get(key)!r} and is {recipe.get(key)!r}"
        for key in sorted({*recipe, *header["recipe"]})
        if header["recipe"].get(key) != recipe.get(key)
    ]
    now = tensors_of(parts.model)
    for name in [*now, *(name for name in saved if name not in now)]:
        a, b = (_words(t) for t in (saved.get(name), now.get(name)))
        if a != b:
            found.append(f"the model's `{name}` was {a} and is {b}")
    if header["frozen"] != _frozen(parts):
        changed = sorted({*header["frozen"]} ^ {*_frozen(parts)})[0]
        trained = "was trained and is frozen", "was frozen and is trained"
        found.append(f"the parameter `{changed}` {trained[changed in header['frozen']]}")
    if header["batches"] != _length(parts.loader):
        found.append(f"the loader had {header['batches']} batches and has {_length(parts.loader)}")
    return found


def _fill(
    parts: Parts,
    model: Mapping[str, Tensor],
    momentum: Mapping[str, Tensor],
    scaler: dict[str, Any],
) -> None:
    with torch.no_grad():
        for name, value in tensors_of(parts.model).items():
            value.copy_(model[name])
    for name, p in _trained(parts).items():
        if name in momentum:
            buffer = torch.empty_like(p, memory_format=torch.preserve_format)
            parts.optimizer.state[p]["momentum_buffer"] = buffer.copy_(momentum[name]).detach()
    parts.scaler.load_state_dict(scaler) if scaler else None


def _foreign(path: StrPath, why: str) -> CheckpointError:
    return CheckpointError(
        f"`{os.path.basename(os.fspath(path))}` is no checkpoint of this training",
        where=os.path.abspath(os.fsdecode(path)),
        why=why,
        fix="train with the same recipe, model and data; or give another path; or delete the file, "
        "or pass resume=False, to begin anew",
    )


def _trained(parts: Parts) -> dict[str, nn.Parameter]:
    mine = {id(p) for group in parts.optimizer.param_groups for p in group["params"]}
    return {name: p for name, p in parts.model.named_parameters() if id(p) in mine}


def _frozen(parts: Parts) -> list[str]:
    trained = _trained(parts)
    return [name for name, _ in parts.model.named_parameters() if name not in trained]


def _words(tensor: Tensor | None) -> str:
    if tensor is None:
        return "absent"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _finite(number: float) -> float | None:
    """As JSON has it, which knows neither nan nor infinity."""
    return number if math.isfinite(number) else None


def _number(stored: float | None) -> float:
    return math.nan if stored is None else stored


def _plain(recipe: Mapping[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in recipe.items()}


def _length(loader: object) -> int | None:
    return len(loader) if isinstance(loader, Sized) else None
