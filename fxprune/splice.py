"""Put a pruned sub-module back into the model that it was taken from.

Promises: the model is left as it was, and the result shares no memory with it or with the pruned
          network; what is replaced is replaced under all its names, and its weights are not copied.
          Tensors that the sub-module shares with the rest stay shared where the cut left them whole.
Refuses:  another architecture than the plan's, tensors shared with the rest that were cut or folded,
          and a place inside another pruned network, whose plan would no longer hold.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fxprune.errors import OptionError, OptionTypeError, PlanError, UnsupportedOpError
from fxprune.graph import Tensors
from fxprune.groups import state_of, tensors_fingerprint
from fxprune.inputs import unwrap
from fxprune.plan import Plan
from fxprune.pruned import PrunedModule


def splice(model: nn.Module, path: str, pruned: PrunedModule) -> nn.Module:
    """A copy of `model` with a pruned network in the place of the sub-module at `path`.

    model: of any class, traceable or not; never modified. path: dotted, as `get_submodule` takes it
        ("backbone", "neck.blocks.0"). pruned: what `compile`, `apply` or `load` made of that
        sub-module; the result holds a copy, with its own mode, device and dtype (call `.train()` or
        `.eval()` on the result to set the mode of the whole).

    The outputs of a pruned network keep their channels, so the rest of the model fits as it is. Plain
    attributes of the sub-module (`model.backbone.out_channels`) are there, methods other than
    `forward` are not. `fxprune.save(result.get_submodule(path), ...)` saves the pruned part.

    Raises OptionError where there is no such path, PlanError where the pruned network was made from
    another architecture or the rest of the model shares tensors with it that are cut.
    """
    model, _ = unwrap(model)
    old = _target(model, path)
    if not isinstance(pruned, PrunedModule):
        raise OptionTypeError(
            f"pruned is a {type(pruned).__name__}",
            where="pruned",
            why="only a PrunedModule knows which sub-module it was made from",
            fix=f"fxprune.compile(model.get_submodule({path!r}), ...) makes one",
        )
    _check_origin(old, path, pruned)
    new = copy.deepcopy(pruned)
    memo: dict[int, Any] = {id(old): new}
    apart = _shared_with(model, path, old, new, memo)
    try:
        spliced: nn.Module = copy.deepcopy(model, memo)
    except Exception as error:
        raise UnsupportedOpError(
            f"{type(model).__name__} cannot be copied: {error}",
            where=f"copy.deepcopy of {type(model).__name__}",
            why="splice returns a copy of the model",
            fix="make the model survive copy.deepcopy",
        ) from error
    _refuse_ties(model, old, path, apart, memo)  # guard: ties -> tests/test_splice.py -k tied
    return spliced


def _target(model: nn.Module, path: object) -> nn.Module:
    """The sub-module at a path, which no pruned network holds."""
    if not isinstance(path, str):
        raise OptionTypeError(
            f"path is a {type(path).__name__}", where="path", fix='pass a name: "backbone"'
        )
    if not path:
        raise OptionError(
            "path is empty",
            where="path",
            why="that is the whole model, and the pruned network is then the result itself",
        )
    module = model
    done: list[str] = []
    for name in path.split("."):
        if isinstance(
            module, PrunedModule
        ):  # guard: plan of the outer -> tests/test_splice.py -k inside
            raise PlanError(
                f"`{path}` lies inside a pruned network",
                where=f"`{'.'.join(done)}`" if done else f"the model, a {type(module).__name__}",
                why="its plan would no longer say what it computes",
                fix="splice into the model as it was before that was pruned",
            )
        child = module._modules.get(name)
        if child is None:
            raise OptionError(
                f"{type(model).__name__} has no sub-module `{path}`",
                where=f"path, at `{name}`",
                why=f"the nearest names are {_nearest(model, path)}",
                fix="name it as model.named_modules() does",
            )
        module = child
        done.append(name)
    return module


def _nearest(model: nn.Module, path: str) -> str:
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    found = difflib.get_close_matches(path, names, 3, 0.3) or names[:5]
    return ", ".join(f"`{name}`" for name in found) or "none: it has no sub-modules"


def _check_origin(old: nn.Module, path: str, pruned: PrunedModule) -> None:
    """The sub-module has the tensors of the plan's original, or is pruned from the same one."""
    expected = pruned.plan.fingerprint["tensors"]
    if isinstance(old, PrunedModule):
        same = old.plan.fingerprint["tensors"] == expected
        differing: list[str] = []
    else:
        same = tensors_fingerprint(state_of(old)) == expected
        differing = _differing(state_of(old), state_of(pruned), pruned.plan)
    if not same:  # guard: another origin -> tests/test_splice.py -k another
        raise PlanError(
            f"the pruned network was not made from `{path}`, a {type(old).__name__}",
            where="; ".join(differing[:5]) or f"the tensors of `{path}`",
            why="names and shapes of its tensors differ from the plan's original (fingerprint)",
            fix=f"splice what fxprune.compile(model.get_submodule({path!r}), ...) returns",
        )


def _differing(here: Mapping[str, Tensor], left: Mapping[str, Tensor], plan: Plan) -> list[str]:
    """Tensors that the sub-module lacks, has in another shape, or has alone."""
    said = []
    for name, t in left.items():
        shape = _before(name, t, plan)
        if name not in here:
            said.append(f"`{name}` {shape} is missing")
        elif tuple(here[name].shape) != shape:
            said.append(f"`{name}` is {tuple(here[name].shape)}, not {shape}")
    return said + [f"`{name}` is not in the pruned network" for name in here if name not in left]


def _before(name: str, t: Tensor, plan: Plan) -> tuple[int, ...]:
    """The shape that a tensor had before the cut."""
    shape = list(t.shape)
    for s in plan.slices:
        if s.tensor == name and s.dim < len(shape) and shape[s.dim]:
            blocks = max(len(s.keep) // t.shape[s.dim], 1)
            shape[s.dim] = s.size // blocks
    return tuple(shape)


def _shared_with(
    model: nn.Module, path: str, old: nn.Module, new: PrunedModule, memo: dict[int, Any]
) -> dict[int, str]:
    """Let a deepcopy put the pruned network's tensors wherever the model holds the old ones.

    Returns those that cannot stand for one another, id -> name in the sub-module: cut, or folded.
    """
    here = _tensors(new)
    folded = {name for fold in new.plan.folds for name in (fold.conv, fold.bn)}
    whole = Tensors.of(model)
    by_name: dict[str, list[int]] = {}  # canonical name -> ids of the tensors over that memory
    for key, name in whole.by_id.items():
        by_name.setdefault(name, []).append(key)
    apart: dict[int, str] = {}
    for name, t in _tensors(old).items():
        first = whole.name(t) or name
        twin = here.get(name)
        merged = name.rpartition(".")[0] in folded
        for key in by_name.get(first, ()):
            if merged or (twin is not None and twin.shape != t.shape):
                apart.setdefault(key, name)
            elif twin is not None:
                memo.setdefault(key, twin)
    for key in apart:
        memo.pop(key, None)
    _refuse_overlaps(path, old, whole)
    return apart


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers under all their names."""
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _refuse_overlaps(path: str, old: nn.Module, whole: Tensors) -> None:
    """A tensor of the rest over a part of the memory of one that is replaced."""
    inside = {whole.name(t) for t in _tensors(old).values()}
    for name, other in whole.overlapping.items():
        if (
            name in inside and other not in inside
        ):  # guard: overlap -> tests/test_splice.py -k memory
            raise PlanError(
                f"`{other}` shares memory with a part of `{name}`",
                where=f"`{path}` and the rest of the model",
                why="the pruned network has memory of its own",
                fix=f"make it a tensor of its own: .clone() it before pruning `{path}`",
            )


def _refuse_ties(
    model: nn.Module, old: nn.Module, path: str, apart: Mapping[int, str], memo: Mapping[int, Any]
) -> None:
    """What a deepcopy met of the old tensors although their module was left out is held elsewhere."""
    met = {key: name for key, name in apart.items() if key in memo}
    if not met:
        return
    inside = {id(m) for m in old.modules()}
    names = {
        id(t): f"`{prefix}.{own}`".replace("`.", "`")
        for prefix, module in model.named_modules(remove_duplicate=False)
        if id(module) not in inside or not f"{prefix}.".startswith(f"{path}.")
        for own, t in [*module._parameters.items(), *module._buffers.items()]
    }
    key, name = next(iter(met.items()))
    raise PlanError(
        f"the rest of the model shares `{path}.{name}`, which was cut or folded",
        where=names.get(key, f"an attribute of {type(model).__name__}"),
        why="one tensor cannot have two widths, or be folded in one place only",
        fix=f"keep it whole: fxprune.compile(..., ignore=[{name.rpartition('.')[0]!r}])",
    )
