"""Small typed helpers over `torch.fx` graphs: what a node calls, and whose tensors it uses.

Nothing here knows about pruning.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_KNOWN_HOMES = {"torch", "_operator", "math", "builtins", "torchvision"}
_OPERATORS = (["aten"], ["prims"], ["torchvision"])  # namespaces of torch.ops that torch fills
_ALIASES = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "div",
    "truediv": "div",
    "ifloordiv": "floordiv",
    "floor_divide": "floordiv",
    "concat": "cat",
    "concatenate": "cat",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "moveaxis": "movedim",
    "multiply": "mul",
    "subtract": "sub",
    "divide": "div",
    "true_divide": "div",
}


@lru_cache(maxsize=4096)
def function_name(target: Any) -> str:
    """The plain name of a function of torch, operator or torchvision; "" for anybody else's."""
    home = (getattr(target, "__module__", None) or "torch").split(".")
    if home[0] not in _KNOWN_HOMES:
        return ""
    custom = home[:2] == ["torch", "_ops"] and home[2:3] not in _OPERATORS
    if custom:  # guard: operators of users -> tests/test_register_rule.py -k namesake
        return ""
    return plain_name(getattr(target, "__name__", ""))


@lru_cache(maxsize=4096)
def plain_name(name: str) -> str:
    """`add_`, `iadd` and `add` are one operation to the analysis."""
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return _ALIASES.get(name, name)


def own_key(target: Any) -> Any:
    """What a function is registered under by itself: an operator stands for its overloads."""
    return target.overloadpacket if isinstance(target, torch._ops.OpOverload) else target


def op_name(node: Node) -> str:
    """The operation of a call_function or call_method node, in plain words; "" if unknown."""
    if node.op == "call_method":
        return plain_name(str(node.target))
    return function_name(node.target) if node.op == "call_function" else ""


@dataclass(frozen=True)
class Arguments:
    """The arguments of a function or method node by name, whichever way they were passed."""

    values: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.values.get(name)

    def get(self, name: str, default: Any) -> Any:
        """The argument, or `default` where it was not passed."""
        value = self.values.get(name, default)
        return default if value is None else value


def arguments(node: Node, *names: str) -> Arguments:
    """Bind positional arguments to `names` in order; keyword arguments keep theirs.

    Methods and functions of torch take `self`/`input` first, so one list of names serves both.
    """
    values = dict(zip(names, node.args, strict=False))
    values.update(node.kwargs)
    if names and "input" in values and names[0] != "input":
        values.setdefault(names[0], values.pop("input"))
    return Arguments(values)


def first_argument(node: Node) -> Any:
    """The first argument of a call, however it was passed."""
    named = node.kwargs.get("input", next(iter(node.kwargs.values()), None))
    return node.args[0] if node.args else named


def varargs(node: Node, start: int = 1, keyword: str = "shape") -> list[Any] | Node:
    """Sizes passed as `f(x, 1, 2)`, `f(x, (1, 2))`, `f(x, size=...)`, or as one node."""
    rest = list(node.args[start:])
    if not rest:
        rest = [node.kwargs.get(keyword, node.kwargs.get("size"))]
    if len(rest) == 1 and isinstance(rest[0], list | tuple):
        return list(rest[0])
    if len(rest) == 1 and isinstance(rest[0], Node) and not isinstance(value_of(rest[0]), int):
        return rest[0]
    return rest


def value_of(node: Node) -> Any:
    """What the node gives on the example input: a meta tensor, a number, a tuple, ..."""
    return node.meta.get("val")


def constant(arg: Any) -> Any:
    """An argument with every node replaced by its value on the example input."""
    return torch.fx.node.map_arg(arg, value_of)


_PYTHONS_OWN = ("iadd", "imul", "isub", "itruediv", "ifloordiv", "ipow", "setitem")


def in_place(node: Node) -> bool:
    """Whether a call writes into its first argument, as far as its name or options tell."""
    name = getattr(node.target, "__name__", str(node.target))
    plain = name.endswith("_") and not name.endswith("__")
    option = node.kwargs.get("inplace") is True
    return node.op.startswith("call_") and (plain or option or name in _PYTHONS_OWN)


def place(node: Node) -> str:
    """The user's file:line that made the node, or "" where none is known."""
    return str(node.meta.get("where", ""))


@dataclass
class Tensors:
    """Parameters and buffers of a model, keyed by storage: one canonical name per tensor.

    A tensor that several modules share has the name that `named_parameters()` yields first.
    """

    by_id: dict[int, str] = field(default_factory=dict)
    tensor: dict[str, Tensor] = field(default_factory=dict)  # canonical name -> tensor
    names: dict[str, list[str]] = field(default_factory=dict)  # canonical -> every name
    overlapping: dict[str, str] = field(default_factory=dict)  # canonical -> the other tensor

    @classmethod
    def of(cls, model: nn.Module) -> Tensors:
        """Collect what `model` holds; views into one storage are recognised."""
        table = cls()
        storages: dict[int, list[str]] = {}
        for name, t in _named_tensors(model):
            known = table.by_id.get(id(t))
            if known is None:
                known = table._same_storage(name, t, storages)
            table.by_id[id(t)] = known
            table.names.setdefault(known, []).append(name)
        return table

    def _same_storage(self, name: str, t: Tensor, storages: dict[int, list[str]]) -> str:
        key = _storage(t)
        for other in storages.get(key, ()) if key else ():
            o = self.tensor[other]
            if (o.shape, o.stride(), o.storage_offset(), o.dtype) == (
                t.shape,
                t.stride(),
                t.storage_offset(),
                t.dtype,
            ):
                return other
            self.overlapping[other] = name
            self.overlapping[name] = other
        storages.setdefault(key, []).append(name)
        self.tensor[name] = t
        return name

    def name(self, t: Tensor | None) -> str | None:
        """The canonical name of a parameter or buffer, or None for any other tensor."""
        return None if t is None else self.by_id.get(id(t))

    def add(self, name: str, t: Tensor) -> str:
        """Admit a tensor that is neither parameter nor buffer (a plain attribute)."""
        if id(t) not in self.by_id:
            self.by_id[id(t)] = name
            self.tensor[name] = t
            self.names[name] = [name]
        return self.by_id[id(t)]


def _storage(t: Tensor) -> int:
    """A key that tensors sharing memory share; 0 where memory cannot be compared."""
    if t.device.type == "meta" or t.layout is not torch.strided or t.numel() == 0:
        return 0
    try:
        return t.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # subclasses without a storage of their own
        return 0


def _named_tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def get_path(root: nn.Module, path: str) -> Any:
    """The attribute at a dotted path."""
    return operator.attrgetter(path)(root) if path else root


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Give every module its training flag back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside, each module's own mode afterwards; not model.eval(), which users override."""
    with modes_kept(model):
        for module in model.modules():
            module.training = False
        yield
