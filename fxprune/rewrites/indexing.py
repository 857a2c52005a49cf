"""Parts of an axis taken by index: bounds become kept counts, places become new places."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.fx import Node

from fxprune.graph import arguments, first_argument, op_name
from fxprune.labels import Label, Pick
from fxprune.rewrites.base import Cut, rewrite
from fxprune.rewrites.sizes import entry_of, is_shape, view
from fxprune.rules.indexing import index_entries


def picked(cut: Cut, node: Node, source: Label | None) -> Any:
    """The source with axes taken at the new places of what is left; None where no place moves."""
    picks = cut.analysis.flow.ledger.picks.get(node, ())
    if source is None or not any(cut.is_cut(source, pick.axis) for pick in picks):
        return None
    new = cut.new(first_argument(node))
    for pick in picks:
        new = _selected(cut, node, new, source, pick)
    return new


def _selected(cut: Cut, node: Node, new: Any, source: Label, pick: Pick) -> Node:
    """index_select of the kept among `pick.places`, counted among the kept of the source."""
    kept = cut.kept(source, pick.axis)
    places = pick.places.numpy()
    moved = (np.cumsum(kept) - 1)[places[kept[places]]]
    index = cut.constant(f"{node.name}_index", torch.from_numpy(moved))
    return cut.call(torch.index_select, new, pick.axis, index)


@rewrite("getitem")
def getitem(cut: Cut, node: Node) -> Any:
    """x[:, a:b], x[:, ::2], x[:, [2, 0, 1]], x[:, 3]; entries of a shape."""
    source = node.args[0]
    if is_shape(source):
        return entry_of(cut, node)
    label = cut.label(source)
    if label is None or not cut.is_cut(label):
        return None
    new = picked(cut, node, label)
    items = _items(cut, node, label)
    if new is None and items is None:
        return None
    items = items or _written(cut, node, label)
    if all(isinstance(item, slice) and item == slice(None) for item in items):
        return new
    return cut.call(operator.getitem, cut.new(source) if new is None else new, tuple(items))


@rewrite("setitem")
def setitem(cut: Cut, node: Node) -> Any:
    """x[:, a:b] = y."""
    source, _, value = node.args
    label = cut.label(source)
    items = None if label is None else _items(cut, node, label)
    if items is None:
        return None
    return cut.call(operator.setitem, cut.new(source), tuple(items), cut.new(value))


def _written(cut: Cut, node: Node, label: Label) -> list[Any]:
    """The index, every axis named; the axes that were taken by place are whole."""
    taken = {pick.axis for pick in cut.analysis.flow.ledger.picks.get(node, ())}
    index = node.args[1]
    given = list(index) if isinstance(index, tuple) else [index]
    entries = index_entries(index, len(label.shape)) or []
    own = iter([i for i in given if not isinstance(i, type(Ellipsis))])
    count = sum(not isinstance(i, type(Ellipsis)) for i in given)
    dots = next((i for i, g in enumerate(given) if isinstance(g, type(Ellipsis))), len(given))
    items: list[Any] = []
    for at, (axis, _) in enumerate(entries):
        written = next(own) if at < dots or at >= len(entries) - (count - dots) else slice(None)
        items.append(slice(None) if axis in taken else _mapped(cut, written))
    return items


def _mapped(cut: Cut, item: Any) -> Any:
    """An item of an index whose slices may hold nodes."""
    if isinstance(item, slice):
        return slice(*(cut.new(v) for v in (item.start, item.stop, item.step)))
    return cut.new(item)


def _items(cut: Cut, node: Node, label: Label) -> list[Any] | None:
    """The index with counts of what is left, every axis named; None where it may stay as it is."""
    items = _written(cut, node, label)
    taken = {pick.axis for pick in cut.analysis.flow.ledger.picks.get(node, ())}
    changed = False
    for at, (axis, item) in enumerate(index_entries(node.args[1], len(label.shape)) or []):
        if axis is None or axis in taken or item == slice(None) or not cut.is_cut(label, axis):
            continue
        kept = cut.kept(label, axis)
        if isinstance(item, slice):
            start, stop, _ = item.indices(len(kept))
            items[at] = slice(int(kept[:start].sum()), int(kept[:stop].sum()))
            changed = True
        elif isinstance(item, int):
            items[at] = int(kept[: item % len(kept)].sum())
            changed = True
    return items if changed else None


@rewrite("index_select", "roll", "repeat_interleave")
def rearranged(cut: Cut, node: Node) -> Any:
    """Channels at constant places, by function: one axis after the other."""
    source = cut.label(first_argument(node))
    new = picked(cut, node, source)
    if new is None or op_name(node) != "roll":
        return new
    args = arguments(node, "input", "shifts", "dims")
    if args["dims"] is None or source is None:
        return new
    shifts, dims = (
        [v] if isinstance(v, int | Node) else list(v) for v in (args["shifts"], args["dims"])
    )
    taken = {pick.axis for pick in cut.analysis.flow.ledger.picks[node]}
    rest = [(s, d) for s, d in zip(shifts, dims, strict=True) if d % len(source.shape) not in taken]
    if not rest:
        return new
    return cut.call(torch.roll, new, [cut.new(s) for s, _ in rest], [d for _, d in rest])


@rewrite("select")
def select(cut: Cut, node: Node) -> Any:
    """One entry of an axis, counted among those that are left."""
    source = cut.label(first_argument(node))
    args = arguments(node, "input", "dim", "index")
    if source is None or not isinstance(args["index"], int):
        return None
    axis = args["dim"] % len(source.shape)
    if not cut.is_cut(source, axis):
        return None
    kept = cut.kept(source, axis)
    at = int(kept[: args["index"] % len(kept)].sum())
    return cut.call(torch.select, cut.new(first_argument(node)), axis, at)


@rewrite("view", "reshape", "flatten", "contiguous")
def shuffled(cut: Cut, node: Node) -> Any:
    """The end of a shuffle whose views are no rectangles any more; else the view itself."""
    before = cut.analysis.flow.ledger.shuffles.get(node)
    if before is not None and not all(_rectangle(cut, cut.label(link)) for link in before):
        source = before[0].args[0]
        pick = cut.analysis.flow.ledger.picks[node][0]
        label = cut.label(source)
        assert label is not None
        return _selected(cut, node, cut.new(source), label, pick)
    return view(cut, node) if op_name(node) in ("view", "reshape") else None


def _rectangle(cut: Cut, label: Label | None) -> bool:
    """Whether what is left of a tensor is whole rows and columns."""
    if label is None:
        return True
    kept = cut.keep[cut.analysis.classes(label.ids)]
    axes = [kept.any(axis=tuple(d for d in range(kept.ndim) if d != axis)) for axis in range(kept.ndim)]  # fmt: skip
    return int(kept.sum()) == int(np.prod([axis.sum() for axis in axes]))


@rewrite("channel_shuffle", "native_channel_shuffle", nn.ChannelShuffle)
def channel_shuffle(cut: Cut, node: Node) -> Any:
    """Shuffled channels: as before where every group keeps the same places, else by new places."""
    (pick,) = cut.analysis.flow.ledger.picks.get(node, (None,))
    source = cut.label(first_argument(node))
    if pick is None or source is None or not cut.is_cut(source, 1):
        return None
    kept = cut.kept(source, 1)
    groups = len(kept) // int(pick.places[1]) if len(kept) > 1 else 1
    blocks = kept.reshape(groups, -1)
    if bool((blocks == blocks[:1]).all()):
        return None
    return _selected(cut, node, cut.new(first_argument(node)), source, pick)
