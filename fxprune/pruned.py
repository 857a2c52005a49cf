"""PrunedModule: the network that is left, an ordinary GraphModule that knows its plan and report."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
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
    sums = []
    for name, t in sorted(module.state_dict().items()):
        if isinstance(t, Tensor) and not t.is_meta and t.numel() and t.layout is torch.strided:
            bits = t.detach().reshape(-1).view(torch.uint8) if t.dtype == torch.bool else t.detach()
            whole = bits.contiguous().view(_BITS[bits.element_size()]) if bits.element_size() in _BITS else bits  # fmt: skip
            sums.append((name, int(whole.sum(dtype=torch.int64))))
    return hash(tuple(value for _, value in sums))


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


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

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, arguments = super().__reduce__()
        return _rebuild, (rebuild, arguments, _modes(self))


def _modes(module: nn.Module) -> dict[str, bool]:
    return {name: m.training for name, m in module.named_modules()}


def _rebuild(rebuild: Any, arguments: tuple[Any, ...], modes: dict[str, bool]) -> PrunedModule:
    """Unpickle: the graph is traced again from its code, then everything else is put back."""
    plain = rebuild(*arguments)
    plain.graph._codegen = copy.copy(plain.graph._codegen)
    new = PrunedModule(plain, plain.graph, type(plain).__name__)
    state = arguments[0]
    for name, value in state.items():
        if name not in new.__dict__ and name not in ("_code", "_graph"):
            new.__dict__[name] = value
    for path, container in plain.named_modules():
        if path:  # containers lose their non-persistent marks when modules are rebuilt
            new.get_submodule(path)._non_persistent_buffers_set = set(
                container._non_persistent_buffers_set
            )
    new._non_persistent_buffers_set = set(state.get("_non_persistent_buffers_set", ()))
    for name, module in new.named_modules():
        module.training = modes.get(name, module.training)
    return new


def _carry(old: PrunedModule, new: PrunedModule, memo: dict[int, Any]) -> None:
    for name, value in vars(old).items():
        if name not in new.__dict__ and name not in ("_code", "_graph"):
            new.__dict__[name] = copy.deepcopy(value, memo)
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
    plain = set(vars(nn.Module())) | set(vars(new))
    for name, value in vars(model).items():
        if name in plain or name.startswith("__"):
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


def input_specs(inputs: tuple[Any, ...]) -> tuple[InputSpec, ...]:
    """The specs of the tensors among example inputs."""
    return tuple(
        InputSpec(tuple(t.shape), str(t.dtype).removeprefix("torch."))
        for t in pytree.tree_leaves(inputs)
        if isinstance(t, Tensor)
    )
