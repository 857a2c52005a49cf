"""Sizes: numbers are pinned to the original's, entries given to views follow the cut."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Node

from fxprune.graph import arguments, constant, first_argument, op_name, value_of, varargs
from fxprune.labels import Label
from fxprune.rewrites.base import Cut, rewrite
from fxprune.rules.movement import merged


@rewrite("size", "getattr")
def size(cut: Cut, node: Node) -> Any:
    """x.size(1), x.shape: the original's numbers, where an axis is cut."""
    label = cut.label(first_argument(node))
    if label is None or not cut.is_cut(label):
        return None
    value = value_of(node)
    if op_name(node) == "size" and isinstance(value, int):
        axis = arguments(node, "input", "dim")["dim"] % len(label.shape)
        return _pinned(cut, label, axis, lambda: cut.graph.node_copy(node, cut.env.__getitem__))
    if not is_shape(node):
        return None
    shape = cut.graph.node_copy(node, cut.env.__getitem__)
    entries = []
    for d in range(len(label.shape)):
        entry = _pinned(cut, label, d, lambda d=d: cut.call(operator.getitem, shape, d))  # type: ignore[misc]
        entries.append(cut.call(operator.getitem, shape, d) if entry is None else entry)
    return tuple(entries)


def _pinned(cut: Cut, label: Label, axis: int, now: Callable[[], Node]) -> Any:
    """The original's size of a cut axis, else None; `now` gives the node of the size after the cut."""
    if cut.is_cut(label, axis):  # guard: sizes are pinned -> tests/test_groups.py -k number
        kept = int(cut.kept(label, axis).sum())
        return _scaled(cut, now(), label.shape[axis], kept) if merged(label, axis) else label.shape[axis]  # fmt: skip
    return None


def entry_of(cut: Cut, node: Node) -> Any:
    """shape[1], shape[-2:] of a shape that is pinned; None where it is not."""
    shape, index = cut.env[node.args[0]], constant(node.args[1])  # type: ignore[index]
    return shape[index] if isinstance(shape, tuple) else None


@rewrite("numel", "nelement")
def numel(cut: Cut, node: Node) -> Any:
    """The number of elements that the original's tensor (or shape) has."""
    source = first_argument(node)
    shape = cut.env[source]
    if isinstance(shape, tuple):
        return cut.call(math.prod, shape)
    label = cut.label(source)
    if label is None or not cut.is_cut(label):
        return None
    now = cut.graph.node_copy(node, cut.env.__getitem__)
    axes = [d for d in range(len(label.shape)) if cut.is_cut(label, d)]
    sizes = cut.sizes(label)
    return _scaled(
        cut, now, math.prod(label.shape[d] for d in axes), math.prod(sizes[d] for d in axes)
    )


def is_shape(node: Any) -> bool:
    """Whether a node is the shape of a tensor, or a part of one."""
    value = value_of(node) if isinstance(node, Node) else None
    return isinstance(value, tuple) and all(isinstance(n, int) for n in value)


RESHAPES = ("view", "reshape", "expand", "broadcast_to")


@rewrite("expand", "broadcast_to")
def view(cut: Cut, node: Node) -> Any:
    """view / reshape / expand: entries of cut axes follow the cut, the others stay as written."""
    label = cut.label(node)
    source = first_argument(node)
    if label is None or not (cut.is_cut(label) or cut.is_cut(cut.label(source))):
        return None
    entries = _follow(cut, _entries(cut, varargs(node), len(label.shape)), label)
    if node.op == "call_function":
        return cut.call(node.target, cut.new(source), tuple(entries))  # type: ignore[arg-type]
    return cut.graph.call_method(str(reshaping(node)), (cut.new(source), *entries))


def _entries(cut: Cut, sizes: Any, rank: int) -> list[Any]:
    """Sizes as new entries, one by one, also where they are given as one node."""
    if not isinstance(sizes, Node):
        return [cut.new(s) for s in sizes]
    shape = cut.env[sizes]
    if isinstance(shape, tuple):
        return list(shape)
    return [cut.call(operator.getitem, shape, axis) for axis in range(rank)]


@rewrite("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
def create(cut: Cut, node: Node) -> Any:
    """Constants made for cut channels: as many as are left."""
    label = cut.label(node)
    if label is None or not cut.is_cut(label):
        return None
    method = op_name(node).startswith("new_")
    start = 1 if method else 0
    filled = op_name(node) in ("full", "new_full")
    args = list(node.args)
    keyword = "size" if "size" in node.kwargs else "shape"
    given = node.kwargs.get(keyword, args[start] if filled else None)
    sizes = given if given is not None else varargs(node, start)
    entries = _follow(cut, _entries(cut, sizes, len(label.shape)), label)
    kwargs = {k: cut.new(v) for k, v in node.kwargs.items() if k != keyword}
    after = cut.new(tuple(args[start + 1 :])) if filled and keyword not in node.kwargs else ()
    new = (*cut.new(tuple(args[:start])), tuple(entries), *after)
    if node.op == "call_method":
        return cut.graph.call_method(str(node.target), new, kwargs)
    assert callable(node.target)
    return cut.graph.call_function(node.target, new, kwargs)


@rewrite("repeat", "tile")
def repeat(cut: Cut, node: Node) -> Any:
    """Copies of one entry that stand for cut channels: as many as are left."""
    label, source = cut.label(node), cut.label(first_argument(node))
    if label is None or source is None or not label.uncut or not cut.is_cut(label):
        return None
    times = varargs(node, keyword="repeats" if op_name(node) == "repeat" else "dims")
    counts = _entries(cut, times, len(label.shape))
    lead = len(label.shape) - len(source.shape)
    counts = [1] * (len(label.shape) - len(counts)) + counts
    sizes = cut.sizes(label)
    for d, size_ in enumerate((1,) * lead + source.shape):
        if size_ == 1 and sizes[d] != label.shape[d]:
            old = label.shape[d]
            counts[d] = sizes[d] if isinstance(counts[d], int) else _scaled(cut, counts[d], sizes[d], old)  # fmt: skip
    return cut.call(torch.tile, cut.new(first_argument(node)), tuple(counts))


def reshaping(node: Node) -> Any:
    """`view` becomes `reshape`: kernels pick memory formats by widths, which the cut has changed."""
    return "reshape" if node.target == "view" else node.target


def _scaled(cut: Cut, entry: Any, size: int, old: int) -> Any:
    """A computed entry times kept / all: it may hold other sizes, which stay free."""
    common = math.gcd(size, old)
    return cut.call(operator.floordiv, cut.call(operator.mul, entry, size // common), old // common)


@rewrite("unflatten")
def unflatten(cut: Cut, node: Node) -> Any:
    """Sizes of an axis taken apart."""
    label, source = cut.label(node), cut.label(first_argument(node))
    if label is None or source is None or not cut.is_cut(label):
        return None
    args = arguments(node, "input", "dim", "sizes")
    start = int(args["dim"]) % len(source.shape)
    count = len(label.shape) - len(source.shape) + 1
    new = _follow(cut, _entries(cut, args["sizes"], count), label, start)
    return cut.graph.call_method(
        "unflatten", (cut.new(first_argument(node)), args["dim"], tuple(new))
    )


def _follow(cut: Cut, entries: list[Any], label: Label, start: int = 0) -> list[Any]:
    """Sizes written for the axes from `start` on, with those of cut axes following the cut."""
    old = label.shape[start : start + len(entries)]
    new = cut.sizes(label)[start : start + len(entries)]
    return [
        e
        if n == o or (isinstance(e, int) and e == -1)
        else n
        if isinstance(e, int)
        else _scaled(cut, e, n, o)
        for e, n, o in zip(entries, new, old, strict=True)
    ]
