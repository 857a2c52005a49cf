"""PrunedModule: the network that is left, an ordinary GraphModule that knows its plan and report."""

from __future__ import annotations

import copy
import pickle
import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule
from torch.utils import _pytree as pytree

from fxprune.groups import Lineage
from fxprune.plan import Plan
from fxprune.report import Report


@dataclass(frozen=True)
class InputSpec:
    """Shape and dtype of one example input."""

    shape: tuple[int, ...]
    dtype: str

    def example(self, device: torch.device | str = "cpu") -> Tensor:
        """A tensor of this shape: seeded noise, or zeros for integers."""
        dtype = getattr(torch, self.dtype)
        if not dtype.is_floating_point:
            return torch.zeros(self.shape, dtype=dtype, device=device)
        generator = torch.Generator().manual_seed(0)
        return torch.randn(self.shape, generator=generator).to(device, dtype)

    def blank(self, floating: torch.dtype) -> Tensor:
        """Zeros of this shape that take no memory, whatever a file says; for tracing.

        floating: the dtype where this one is floating point, so that it fits the model's weights.
        """
        dtype = getattr(torch, self.dtype)
        dtype = floating if dtype.is_floating_point else dtype
        return torch.zeros((), dtype=dtype).expand(self.shape)


@dataclass(frozen=True)
class Origin:
    """What a pruned network must remember beside plan and report.

    stamp: a checksum of the tensors as they were cut; when it no longer holds, they were trained.
    """

    inputs: tuple[InputSpec, ...]
    lineage: Lineage
    front_end: str
    stamp: int


def stamp_of(module: nn.Module) -> int:
    """A cheap checksum of all tensors of a state_dict: any training changes it."""
    stamp = 0
    for name, t in sorted(module.state_dict().items()):
        if isinstance(t, Tensor) and not t.is_meta and t.layout is torch.strided:
            stamp = zlib.crc32(name.encode(), stamp)
            raw = t.detach().cpu().contiguous().view(-1).view(torch.uint8)
            stamp = zlib.crc32(raw.numpy(), stamp)  # type: ignore[arg-type]
    return stamp


def plan_now(pruned: PrunedModule) -> Plan:
    """The plan, which says so when the tensors have been trained since the cut."""
    if pruned.plan.weights == "cut" and stamp_of(pruned) != pruned.origin.stamp:
        return replace(pruned.plan, weights="changed")
    return pruned.plan


class PrunedModule(GraphModule):
    """A pruned network: call it, train it, compile it, export it.

    plan: the `fxprune.Plan` that made it from the first original. report: what was done, as a table
    (`print(pruned.report)`), `.to_json()` or `.to_html(path)`. Both survive copy.deepcopy and pickle.
    """

    plan: Plan
    report: Report
    origin: Origin

    def __init__(self, root: Any, graph: Graph, class_name: str = "PrunedModule") -> None:
        super().__init__(root, graph, class_name)

    def __deepcopy__(self, memo: dict[int, Any]) -> PrunedModule:
        new = super().__deepcopy__(memo)
        assert isinstance(new, PrunedModule)
        _carry(self, new, memo)
        return new

    def __copy__(self) -> PrunedModule:
        new = PrunedModule(self, self.graph, type(self).__name__)
        new.__dict__.update({k: v for k, v in vars(self).items() if k not in _OF_THE_CODE})
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (*super().__reduce__(), type(self).__name__)


def _modes(module: nn.Module) -> dict[str, bool]:
    return {name: m.training for name, m in module.named_modules()}


def _rebuild(rebuild: Any, arguments: tuple[Any, ...], name: str) -> PrunedModule:
    """Unpickle: the graph is traced again from its code; layers and all else are as they were."""
    plain = rebuild(*arguments)
    new = PrunedModule(plain, plain.graph, name)
    state = {k: v for k, v in arguments[0].items() if k not in _OF_THE_CODE}
    new.__dict__.update(state)
    return new


_OF_THE_CODE = (
    "_graph",
    "_code",
    "_lineno_map",
    "_prologue_start",
    "_tracer_cls",
    "_tracer_extras",
)


def _carry(old: PrunedModule, new: PrunedModule, memo: dict[int, Any]) -> None:
    for name, value in vars(old).items():
        if name not in _OF_THE_CODE and (name not in new.__dict__ or name.endswith("_hooks")):
            new.__dict__[name] = copy.deepcopy(value, memo)
    type(new).__name__ = type(old).__name__
    new._non_persistent_buffers_set = set(old._non_persistent_buffers_set)
    modes = _modes(old)
    for name, module in new.named_modules():
        module.training = modes.get(name, module.training)


def build(model: nn.Module, root: dict[str, Any], graph: Graph) -> PrunedModule:
    """Layers and graph as a PrunedModule that keeps modes and persistence of the model's own."""
    new = PrunedModule(
        root, graph, type(model).__name__ if _simple(type(model)) else "PrunedModule"
    )
    for path, module in new.named_modules():
        own = _submodule(model, path)
        if own is not None:
            module.training = own.training
            extra = set(module._buffers) - (set(own._buffers) - own._non_persistent_buffers_set)
            module._non_persistent_buffers_set = extra if module._buffers else set()
    return new


def _simple(kind: type) -> bool:
    return kind.__name__.isidentifier()


def _submodule(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def carry_attributes(model: nn.Module, new: PrunedModule) -> list[str]:
    """Copy the user's own attributes that hold no tensors; names those that cannot come along."""
    left = []
    plain = set(vars(nn.Module())) | {"forward", "_compiled_call_impl"}
    if isinstance(model, GraphModule):
        plain |= set(vars(new)) | set(PrunedModule.__annotations__)
    shared = {k: v for k, v in _of_class(type(model)).items() if not hasattr(new, k)}
    for name, value in {**shared, **vars(model)}.items():
        if name in plain or name.startswith("__"):
            continue
        if hasattr(type(new), name) or name in vars(new) or name in PrunedModule.__annotations__:
            left.append(name)
            continue
        if any(isinstance(v, Tensor | nn.Module) for v in pytree.tree_leaves(value)):
            left.append(name)
            continue
        try:
            copied = copy.deepcopy(value)
            pickle.dumps(copied)
        except Exception:  # whatever a user's object raises: it is named in the report instead
            left.append(name)
            continue
        new.__dict__[name] = copied
    return left


def _of_class(kind: type) -> dict[str, Any]:
    """Plain values that the user's class and its bases define: no methods, no properties."""
    own = kind.__mro__[: kind.__mro__.index(nn.Module)]
    return {
        name: value
        for base in reversed(own)
        for name, value in vars(base).items()
        if not callable(value) and not hasattr(value, "__get__")
    }


def input_specs(inputs: tuple[Any, ...]) -> tuple[InputSpec, ...]:
    """The specs of the tensors among example inputs."""
    return tuple(
        InputSpec(tuple(t.shape), str(t.dtype).removeprefix("torch."))
        for t in pytree.tree_leaves(inputs)
        if isinstance(t, Tensor)
    )
