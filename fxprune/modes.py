"""Train and eval: both are traced, and must be one graph but for arguments and auxiliary heads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from fxprune.errors import TraceError
from fxprune.graph import get_path, op_name, place
from fxprune.symbolic import Capture

Flags = dict[int | str, tuple[Any, Any]]


class ModeCall(nn.Module):
    """A function call whose arguments differ between modes: it follows `self.training`.

    `flags[arg] = (value in eval, value in train)`, where arg is a position or a keyword.
    """

    def __init__(
        self, function: Callable[..., Any], flags: dict[int | str, tuple[Any, Any]]
    ) -> None:
        super().__init__()
        self.function = function
        self.flags = flags

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function with the arguments of the present mode."""
        changed = list(args)
        for key, values in self.flags.items():
            value = values[1] if self.training else values[0]
            if isinstance(key, int):
                changed[key] = value
            else:
                kwargs[key] = value
        return self.function(*changed, **kwargs)

    def extra_repr(self) -> str:
        """Name the function in `print(model)`."""
        return getattr(self.function, "__name__", repr(self.function))


@dataclass
class Modes:
    """flags: arguments that differ between the modes, by eval node. notes: what was dropped."""

    flags: dict[Node, Flags]
    notes: list[str]
    dropped: frozenset[str] = frozenset()  # children used in training only


def compare_modes(evaluating: Capture, training: Capture) -> Modes:
    """Match every eval node with a train node; what is left over exists only in training."""
    found = Modes({}, [])
    twins: dict[Node, Node] = {}
    by_key: dict[Any, list[Node]] = {}
    for node in training.graph.nodes:
        by_key.setdefault((node.op, node.target, _shape_of_args(node)), []).append(node)
    unmatched = set(training.graph.nodes)
    for node in evaluating.graph.nodes:
        if node.op == "output":
            _compare_outputs(node, training, twins)
            continue
        for other in by_key.get((node.op, node.target, _shape_of_args(node)), ()):
            if other in unmatched and (flags := _differing_flags(node, other, twins)) is not None:
                twins[node] = other
                unmatched.remove(other)
                if flags:
                    found.flags[node] = flags
                break
        else:
            if not _holds_tensors(node):
                continue  # a number or a check of its own; what computes with it does not match
            raise TraceError(
                "the model computes different things in train and eval mode",
                where=f"node {node.name} at {place(node) or 'unknown line'}, in eval mode only",
                why="a branch on `self.training` that is more than a `training` argument "
                "or an auxiliary head would be frozen into one of its sides",
                fix="move the branch into a module of its own and keep it out of the traced part, "
                "or prune a sub-module without it",
            )
    left = [
        n for n in training.graph.nodes if n in unmatched and n.op != "output" and _holds_tensors(n)
    ]
    _refuse_writing(left, training, set(twins.values()))
    if left:
        heads = sorted({str(n.target).split(".")[0] for n in left if n.op == "call_module"})
        named = ", ".join(heads) or f"{len(left)} operations at {place(left[0])}"
        found.dropped = frozenset(heads)
        found.notes.append(f"branches that exist only in training were dropped: {named}")
    _compare_constants(evaluating, training, twins)
    return found


_VIEWS = {
    "getitem", "view", "reshape", "permute", "transpose", "flatten", "unflatten", "squeeze",
    "unsqueeze", "chunk", "split", "unbind", "narrow", "select", "expand", "detach", "contiguous", "t",
}  # fmt: skip


def _refuse_writing(left: Sequence[Node], training: Capture, shared: set[Node]) -> None:
    """What only train mode does must not change, in place, a tensor that both modes go on with."""
    order = {node: i for i, node in enumerate(training.graph.nodes)}
    for node in left:
        base = node.args[0] if node.args and _writes(node, training) else None
        while isinstance(base, Node) and base not in shared and op_name(base) in _VIEWS:
            base = base.args[0]
        if not isinstance(base, Node) or base not in shared or base.op == "get_attr":
            continue
        if any(user in shared or user.op == "output" for user in base.users if order[user] > order[node]):  # fmt: skip
            raise TraceError(  # guard: writes -> tests/test_reader_front_ends.py -k in_place
                "the model computes different things in train and eval mode",
                where=f"node {node.name} at {place(node) or 'unknown line'}, in train mode only",
                why="it changes a tensor in place that both modes use afterwards",
                fix="move the branch into a module of its own and keep it out of the traced part, "
                "or prune a sub-module without it",
            )


def _writes(node: Node, capture: Capture) -> bool:
    """Whether a call changes its first argument."""
    if node.op == "call_module":
        model = capture.hints.model if capture.hints is not None else None
        module = None if model is None else get_path(model, str(node.target))
        return bool(getattr(module, "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    flag = node.kwargs.get("inplace", op_name(node) in _INPLACE_AT and node.args[_INPLACE_AT[op_name(node)] :][:1] == (True,))  # fmt: skip
    return name == "setitem" or (name.endswith("_") and not name.endswith("__")) or bool(flag)


_INPLACE_AT = {"dropout": 3, "relu": 1, "relu6": 1, "silu": 1, "hardswish": 1, "mish": 1}


def _holds_tensors(node: Node) -> bool:
    """Whether a node is more than arithmetic with sizes, or a check of them."""
    if node.target is torch._assert:
        return False
    leaves = pytree.tree_leaves(node.meta.get("val"))
    of_numbers = node.op.startswith("call_") and bool(leaves)
    return not of_numbers or any(isinstance(v, Tensor | None) for v in leaves)


def _compare_constants(evaluating: Capture, training: Capture, twins: dict[Node, Node]) -> None:
    """Tensors that forward makes without its input must be the same each time it runs."""
    for node, other in twins.items():
        a = evaluating.constants.get(str(node.target)) if node.op == "get_attr" else None
        b = training.constants.get(str(other.target))
        if a is not None and (b is None or not torch.equal(a, b)):
            raise TraceError(
                "forward makes a tensor whose values differ from call to call",
                where=f"a tensor of shape {tuple(a.shape)}, used at {place(node) or 'unknown line'}",
                why="a graph would hold the values of one call for ever",
                fix="make it from the input (torch.rand_like(x)), or register it as a buffer",
            )


def _shape_of_args(node: Node) -> tuple[int, tuple[str, ...]]:
    return len(node.args), tuple(node.kwargs)


def _differing_flags(node: Node, other: Node, twins: dict[Node, Node]) -> Flags | None:
    """The arguments in which two calls differ, if all are plain flags; None otherwise.

    Flags are booleans, and the probabilities of dropping (`p=0.1 if self.training else 0`).
    """
    flags: Flags = {}
    pairs = [*enumerate(zip(node.args, other.args, strict=True))]
    pairs += [(k, (node.kwargs[k], other.kwargs[k])) for k in node.kwargs]  # type: ignore[misc]
    for key, (a, b) in pairs:
        if _same(a, b, twins):
            continue
        if node.op != "call_function" or not (_are(bool, a, b) or _are_probabilities(node, a, b)):
            return None
        flags[key] = (a, b)
    return flags


def _are(kind: type | UnionType, *values: Any) -> bool:
    return all(isinstance(value, kind) for value in values)


def _are_probabilities(node: Node, a: Any, b: Any) -> bool:
    """Whether two values are numbers given to a dropout, or to an attention that drops."""
    name = op_name(node)
    return ("drop" in name or "attention" in name) and _are(int | float, a, b)


def _same(a: Any, b: Any, twins: dict[Node, Node]) -> bool:
    if isinstance(a, Node) or isinstance(b, Node):
        return isinstance(a, Node) and twins.get(a) is b
    if isinstance(a, list | tuple) and type(a) is type(b):
        return len(a) == len(b) and all(_same(x, y, twins) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k], twins) for k in a)
    if isinstance(a, slice) and isinstance(b, slice):
        return _same((a.start, a.stop, a.step), (b.start, b.stop, b.step), twins)
    return type(a) is type(b) and bool(a == b)


def _compare_outputs(output: Node, training: Capture, twins: dict[Node, Node]) -> None:
    """The eval output must be the train output, or its first part (an auxiliary head follows)."""
    (theirs,) = next(n for n in reversed(training.graph.nodes) if n.op == "output").args
    (ours,) = output.args
    if _same(ours, theirs, twins):
        return
    parts: Sequence[Any] = ()
    if isinstance(theirs, Node) and hasattr(theirs.target, "_fields"):  # a named tuple
        parts = [*theirs.args, *theirs.kwargs.values()]
    elif isinstance(theirs, tuple | list):
        parts = list(theirs)
    elif isinstance(theirs, dict):
        parts = list(theirs.values())
        if isinstance(ours, dict) and all(
            k in theirs and _same(v, theirs[k], twins) for k, v in ours.items()
        ):
            return
    if any(_same(ours, part, twins) for part in parts):
        return
    raise TraceError(
        "the model returns different things in train and eval mode",
        where=f"forward of {type(output.graph.owning_module).__name__}"
        if output.graph.owning_module
        else "the output of forward",
        why="the eval output is not among the train outputs",
        fix="return the same thing in both modes, or prune the sub-module before the branch",
    )
