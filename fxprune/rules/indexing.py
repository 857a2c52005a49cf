"""Entries of an axis taken by number, slice or list. At constant places the axis can still be cut.

Places are constant when they are written in the code or stand in a buffer. Taken so, an axis keeps
the ids at its places (`Ledger.picks`), and the rewrite takes the kept ones at their new places.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.flow import Flow, Value, opaque, rule, uncut_like, writers
from fxprune.graph import arguments, constant, op_name, value_of
from fxprune.labels import Label, Part, Pick, compact
from fxprune.rules.elementwise import join
from fxprune.rules.movement import all_stay, merged, move, run_on

Entries = list[tuple[int | None, Any]]  # per axis: int, slice, list or node; None: a new axis

_REARRANGING = {
    "view", "reshape", "flatten", "ravel", "squeeze", "unsqueeze", "permute", "transpose", "t",
    "contiguous", "clone", "detach", "to", "long", "flip", "roll", "getitem",
}  # fmt: skip


def known(flow: Flow, arg: Any) -> Tensor | None:
    """The values of an index, int64: a list, a buffer, or one rearranged; None where unknown."""
    if isinstance(arg, list | tuple):
        whole = all(isinstance(i, int) and not isinstance(i, bool) for i in arg)
        return torch.tensor(arg, dtype=torch.int64) if whole else None
    if not isinstance(arg, Node) or any(_in_place(user) for user in arg.users):
        return None
    if arg.op == "get_attr":
        value = flow.traced.attribute(arg)
        usable = isinstance(value, Tensor) and not value.is_meta and not _inexact(value)
        return value.detach().cpu().long() if usable else None
    if op_name(arg) in _REARRANGING and len(arg.all_input_nodes) == 1 and arg.args:
        before = known(flow, arg.args[0])
        return None if before is None else run_on(arg, before).long()
    return None


def _inexact(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex() or value.dtype == torch.bool


def _in_place(node: Node) -> bool:
    return str(node.target).endswith("_") or op_name(node) == "setitem"


def carrying(x: Label) -> list[int]:
    """The axes along which a tensor has ids, or gets them when it meets channels."""
    return sorted({*x.varying, *(d for p in x.parts for d in _axes(p))})


def index_entries(index: Any, rank: int) -> Entries | None:
    """What an index does to each axis, every axis named; None for masks and what is no index."""
    items = list(index) if isinstance(index, tuple) else [index]
    items = [value_of(i) if isinstance(i, Node) and isinstance(value_of(i), int) else i for i in items]  # fmt: skip
    if any(isinstance(i, bool) or not _is_index(i) for i in items):
        return None
    items += [Ellipsis] if Ellipsis not in [i for i in items if isinstance(i, type(Ellipsis))] else []  # fmt: skip
    spread = rank - sum(i is not None and not isinstance(i, type(Ellipsis)) for i in items)
    entries: Entries = []
    axis = 0
    for item in items:
        if item is None:
            entries.append((None, None))
            continue
        whole = isinstance(item, type(Ellipsis))
        for _ in range(spread if whole else 1):
            entries.append((axis, slice(None) if whole else constant_slice(item)))
            axis += 1
    return entries


def constant_slice(item: Any) -> Any:
    """A slice with numbers in place of nodes; anything else as it is."""
    return slice(*constant((item.start, item.stop, item.step))) if isinstance(item, slice) else item


def _is_index(item: Any) -> bool:
    if isinstance(item, list | Node):
        value = value_of(item) if isinstance(item, Node) else torch.zeros(1, dtype=torch.int64)
        return isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32)
    return isinstance(item, int | slice | type(None) | type(Ellipsis))


@rule("getitem")
def getitem(flow: Flow, node: Node) -> Value:
    """x[...]: slices and constant lists are rewritten; a single channel that is picked stays."""
    source, index = node.args
    value = flow.labels.get(source)  # type: ignore[arg-type]
    if isinstance(value, tuple | list):
        return value[index] if isinstance(index, int | slice) else None
    x = flow.of(source)
    if x is None:
        return None
    entries = index_entries(index, len(x.shape))
    if entries is None:
        return opaque(flow, node, "an index that is a mask, or computed")
    return take(flow, node, x, entries)


@rule("select", "index_select")
def along(flow: Flow, node: Node) -> Value:
    """One entry of an axis, or those that a list names."""
    x = flow.first(node)
    args = arguments(node, "input", "dim", "index")
    entries: Entries = [(d, slice(None)) for d in range(len(x.shape))]
    axis = constant(args["dim"]) % len(x.shape)
    item = args["index"]
    entries[axis] = (axis, constant(item) if op_name(node) == "select" else item)
    return take(flow, node, x, entries)


def take(flow: Flow, node: Node, x: Label, entries: Entries) -> Value:
    """The label of what an index takes of x."""
    out = value_of(node)
    if x.uncut and not x.parts:
        return uncut_like(out)
    places, single, broken = _places(flow, x, entries)
    stepped = [d for d in places if isinstance(dict(entries)[d], slice)]
    if stepped and writers(flow, node):  # guard: written -> tests/test_reader_core.py -k steps
        broken = [*broken, *stepped]
        places = {d: at for d, at in places.items() if d not in stepped}
    ledger = flow.ledger
    if single and set(x.varying) <= {*single, *broken}:
        ids, why = _run(flow, entries, x)(x.ids), "it is picked by its index"
        ledger.freeze(ids, node, why)  # guard: picked -> tests/test_movement.py -k "one and of"
        rest = [d for d in x.varying if merged(x, d) or d in broken]
        ledger.complete(x, rest, node, "channels are picked beside positions")
        return uncut_like(out)
    why = "channels are picked by an index that is not constant"
    why = "single channels are picked by index" if single else why
    if ledger.complete(x, [*broken, *single], node, why).uncut and not x.uncut:
        return uncut_like(out)
    taken = _run(flow, entries, x)
    ledger.picks[node] = tuple(Pick(d, at) for d, at in places.items())
    parts = [
        Part(p.tensor, p.dim, compact(taken(p.index)))
        for p in x.parts
        if not any(p.index.shape[d] > 1 for d in broken)
    ]
    kept = tuple(p for p in parts if p.index.numel() > 1)
    label = Label(tuple(out.shape), compact(taken(x.ids)), kept)
    shortened = places or any(shortens(item) for _, item in entries)
    return all_stay(flow, label) if shortened else label


def _places(
    flow: Flow, x: Label, entries: Entries
) -> tuple[dict[int, Tensor], list[int], list[int]]:
    """Axes with ids: those taken at constant places, at a single one, and in other ways."""
    places: dict[int, Tensor] = {}
    single, broken = [], []
    lists = [d for d, item in entries if isinstance(item, list | Node)]
    for axis, item in entries:
        if axis is None or axis not in carrying(x):
            continue
        if isinstance(item, int):
            single.append(axis)
        elif isinstance(item, slice) and item.step in (None, 1):
            if shortens(item) and merged(x, axis):
                broken.append(axis)
        else:
            at = torch.arange(x.shape[axis])[item] if isinstance(item, slice) else known(flow, item)
            stepped = isinstance(item, slice) and lists
            if at is None or at.dim() != 1 or merged(x, axis) or stepped or len(lists) > 1:
                broken.append(axis)
            else:
                places[axis] = at % x.shape[axis]
    return places, [d for d in single if d in x.varying], broken


def shortens(item: Any) -> bool:
    """Whether a slice can leave something out."""
    return isinstance(item, slice) and (item.start, item.stop) != (None, None)


def _run(flow: Flow, entries: Entries, x: Label) -> Callable[[Tensor], Tensor]:
    """The index itself, for compact ids: axes that it leaves alone keep their size 1."""
    index: list[Any] = []
    for _, item in entries:
        if isinstance(item, list | Node):
            at = known(flow, item)
            shape = value_of(item).shape if isinstance(item, Node) else (len(item),)
            item = torch.zeros(shape, dtype=torch.int64) if at is None else at
        index.append(item)
    touched = [d for d, item in entries if d is not None and item != slice(None)]

    def run(ids: Tensor) -> Tensor:
        wide = [x.shape[d] if d in touched else n for d, n in enumerate(ids.shape)]
        return ids.expand(wide)[tuple(index)]

    return run


@rule("unbind")
def unbind(flow: Flow, node: Node) -> Value:
    """All entries of an axis, one by one: the axis stays whole, the others keep their channels."""
    x = flow.first(node)
    axis = constant(arguments(node, "input", "dim").get("dim", 0)) % len(x.shape)
    completed = flow.ledger.complete(x, [axis], node, "`unbind` picks single channels")
    if completed.uncut and not x.uncut:
        return uncut_like(value_of(node))
    return move(flow, node)


@rule("setitem")
def setitem(flow: Flow, node: Node) -> Value:
    """x[...] = y: what is written over lives or dies with what is written."""
    source, index, value = node.args
    x, y = flow.of(source), flow.of(value)
    entries = None if x is None else index_entries(index, len(x.shape))
    if x is None or entries is None:
        return opaque(flow, node, "an assignment under a mask, or a computed index")
    places, single, broken = _places(flow, x, entries)
    if places or single or broken:
        return opaque(flow, node, "channels are written one by one")
    taken = _run(flow, entries, x)
    parts = tuple(Part(p.tensor, p.dim, compact(taken(p.index))) for p in x.parts)
    into = taken(x.ids)
    shape = _shape_of(x, entries)
    view = Label(shape, compact(into), parts)
    for part in parts:
        flow.ledger.claimed.add((*part.key, node))
    all_stay(flow, view)
    if y is not None:
        join(flow, node, [view, y], shape)
        met = {d for p in x.parts if p.key in flow.ledger.bound for d in _axes(p)}
        flow.labels[source] = flow.bind(node, x, sorted(met))  # type: ignore[index]
    return None


def _axes(part: Part) -> list[int]:
    return [d for d, n in enumerate(part.index.shape) if n > 1]


def _shape_of(x: Label, entries: Entries) -> tuple[int, ...]:
    """The true shape of what an index without lists takes."""
    index = tuple(item for _, item in entries)
    return tuple(torch.empty(x.shape, device="meta")[index].shape)


@rule("zero", "fill")
def overwrite(flow: Flow, node: Node) -> Value:
    """Every element becomes a constant, in place; a view of channels is still these channels."""
    return flow.first(node)


@rule("roll")
def roll(flow: Flow, node: Node) -> Value:
    """Channels rolled along their axis are taken at constant places; positions do not matter."""
    x = flow.first(node)
    args = arguments(node, "input", "shifts", "dims")
    shifts, dims = constant(args["shifts"]), constant(args["dims"])
    if dims is None or dims == []:
        return _flat_roll(flow, node, x)
    shifts = [shifts] if isinstance(shifts, int) else list(shifts)
    dims = [d % len(x.shape) for d in ([dims] if isinstance(dims, int) else dims)]
    places: dict[int, Tensor] = {}
    for shift, d in zip(shifts, dims, strict=True):
        at = places.get(d, torch.arange(x.shape[d]))
        places[d] = at.roll(shift)
    return rearranged(flow, node, x, places)


def _flat_roll(flow: Flow, node: Node, x: Label) -> Value:
    if len(x.shape) == 1:
        shift = constant(arguments(node, "input", "shifts")["shifts"])
        return rearranged(flow, node, x, {0: torch.arange(x.shape[0]).roll(shift)})
    return opaque(flow, node, "`roll` without an axis mixes all of them")


def rearranged(flow: Flow, node: Node, x: Label, places: dict[int, Tensor]) -> Value:
    """The label of x with some axes taken at constant places."""
    out = value_of(node)
    if x.uncut and not x.parts:
        return uncut_like(out)
    here = {d: at for d, at in places.items() if d in carrying(x)}
    beside = [d for d in here if merged(x, d)]
    why = "channels change places beside positions"
    if flow.ledger.complete(x, beside, node, why).uncut and not x.uncut:
        return uncut_like(out)
    flow.ledger.picks[node] = tuple(Pick(d, at) for d, at in here.items() if d not in beside)

    def moved(ids: Tensor) -> Tensor:
        for d, at in here.items():
            ids = ids.index_select(d, at) if ids.shape[d] > 1 else ids
        return compact(ids)

    parts = tuple(Part(p.tensor, p.dim, moved(p.index)) for p in x.parts)
    return Label(tuple(out.shape), moved(x.ids), parts)


@rule("repeat_interleave")
def repeat_interleave(flow: Flow, node: Node) -> Value:
    """Copies beside each other: a number of each, or a constant number for every entry."""
    x = flow.first(node)
    args = arguments(node, "input", "repeats", "dim")
    dim, repeats = constant(args["dim"]), args["repeats"]
    if dim is None:
        return opaque(flow, node, "`repeat_interleave` without an axis")
    axis = dim % len(x.shape)
    if axis not in carrying(x):
        return Label(tuple(value_of(node).shape), x.ids, x.parts)
    each = torch.arange(x.shape[axis])
    if isinstance(constant(repeats), int):
        result = rearranged(flow, node, x, {axis: each.repeat_interleave(constant(repeats))})
        flow.ledger.picks.pop(node, None)  # what is left of an entry is repeated as before
        return result
    counts = known(flow, repeats)
    if counts is None:
        return opaque(flow, node, "channels are repeated by numbers that are not constant")
    return rearranged(flow, node, x, {axis: each.repeat_interleave(counts)})


@rule("flip", "fliplr", "flipud")
def flip(flow: Flow, node: Node) -> Value:
    """The order of an axis turned round: what is left of it turns round as well."""
    x = flow.first(node)
    dims: Any = {"fliplr": [1], "flipud": [0]}.get(op_name(node))
    dims = constant(arguments(node, "input", "dims")["dims"]) if dims is None else dims
    dims = [dims] if isinstance(dims, int) else list(dims)
    if len(node.args) > 2:  # x.flip(1, 2)
        dims = [constant(d) for d in node.args[1:]]
    dims = [d % len(x.shape) for d in dims]
    parts = tuple(Part(p.tensor, p.dim, p.index.flip(dims)) for p in x.parts)
    return Label(x.shape, x.ids.flip(dims), parts)


@rule("gather", "take_along_dim")
def gather(flow: Flow, node: Node) -> Value:
    """Positions picked channel by channel: the index has the channels of what it picks from."""
    args = arguments(node, "input", "dim", "index")
    x, index = flow.of(args["input"]), flow.of(args["index"] or args["indices"])
    out, dim = value_of(node), constant(args["dim"])
    if x is None or index is None or not isinstance(dim, int):
        return opaque(flow, node, f"`{op_name(node)}` without an axis")
    axis = dim % len(x.shape)
    fits = all(out.shape[d] == x.shape[d] for d in carrying(x) if d != axis)
    if not fits:
        return opaque(flow, node, "an index that picks from a part of the channels")
    why = f"`{op_name(node)}` picks among the channels"
    x = flow.ledger.complete(x, [axis], node, why)
    index = flow.ledger.complete(index, [axis], node, why)
    return join(flow, node, [x, index], tuple(out.shape))
