"""R1: remove channels along coupling groups.

Promise:  in eval mode the result equals the original whose removed inputs are zeroed; kept entries
          are bit for bit the original's; the input graph and model are untouched.
Rewrites: constants that name a channel count (views, splits, slices, pads) follow the cut; sizes
          used as numbers keep their original value, since the masked original has it too.
Refuses:  nothing: what cannot be cut was frozen by the analysis.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from fxprune.graph import arguments, constant, first_argument, op_name, value_of, varargs
from fxprune.groups import Analysis, Array
from fxprune.labels import Label
from fxprune.modes import ModeCall
from fxprune.plan import Slice
from fxprune.rules.movement import index_steps, merged, pad_amounts
from fxprune.rules.per_channel import channel_axis
from fxprune.surgery import Surgeon, refit


@dataclass(frozen=True)
class SliceReport:
    """slices: what was cut of each tensor. rewritten: nodes whose constants follow the cut."""

    slices: tuple[Slice, ...]
    rewritten: tuple[str, ...]


@dataclass
class Cut:
    """A graph being rewritten: which classes stay, and the new node (or number) for each old one."""

    analysis: Analysis
    keep: Array  # bool [classes]
    graph: Graph
    env: dict[Node, Any]

    def label(self, arg: Any) -> Label | None:
        """The label of an original node."""
        value = self.analysis.flow.labels.get(arg) if isinstance(arg, Node) else None
        return value if isinstance(value, Label) else None

    def kept(self, label: Label, axis: int) -> Array:
        """Which indices of `axis` stay: bool, of the axis' true length."""
        kept = self.keep[self.analysis.classes(label.ids)]
        others = tuple(d for d in range(kept.ndim) if d != axis)
        return np.broadcast_to(kept.any(axis=others), (label.shape[axis],))

    def sizes(self, label: Label) -> list[int]:
        """The shape on the example input after the cut."""
        return [int(self.kept(label, d).sum()) for d in range(len(label.shape))]

    def is_cut(self, label: Label | None, axis: int | None = None) -> bool:
        """Whether a tensor (or one axis of it) loses anything."""
        if label is None or label.uncut or not label.shape:
            return False
        if axis is not None:
            return not bool(self.kept(label, axis).all())
        return not bool(self.keep[self.analysis.classes(label.ids)].all())

    def new(self, arg: Any) -> Any:
        """An argument in terms of the new graph."""
        return map_arg(arg, self.env.__getitem__)

    def call(self, function: Callable[..., Any], *args: Any) -> Node:
        """A new call_function node."""
        return self.graph.call_function(function, args)


Rewrite = Callable[[Cut, Node], Any]  # gives the new node or number, or None for an unchanged copy


def slices_of(analysis: Analysis, keep: Array) -> tuple[Slice, ...]:
    """What the mask of kept classes, bool [classes], cuts of each tensor, in graph order."""
    slices = []
    shared: dict[bytes, tuple[int, ...]] = {}  # coupled tensors keep the same indices
    for s in analysis.slots:
        kept = keep[analysis.classes(s.ids)]
        if not kept.all():
            key = kept.tobytes()
            if key not in shared:
                shared[key] = tuple(np.flatnonzero(kept).tolist())
            slices.append(Slice(s.tensor, s.dim, s.role, s.size, shared[key]))
    return tuple(slices)


def slice_channels(analysis: Analysis, keep: Array) -> tuple[dict[str, Any], Graph, SliceReport]:
    """Cut the classes outside `keep`; returns the new layers by name, the new graph, the report."""
    traced = analysis.traced
    slices = slices_of(analysis, keep)
    surgeon = Surgeon(traced.tensors, slices)
    cut = Cut(analysis, keep, Graph(), {})
    root: dict[str, Any] = {}
    rewritten = []
    for node in traced.graph.nodes:
        rewrite = REWRITES.get(op_name(node)) if node.op.startswith("call_") else None
        new = rewrite(cut, node) if rewrite else None
        if new is not None:
            rewritten.append(node.name)
        elif node in traced.mode_flags:
            new = _mode_call(cut, node, root)
        else:
            if node.op == "call_module":
                _layer(cut, node, surgeon, root)
            elif node.op == "get_attr":
                value = traced.attribute(node)
                root[str(node.target)] = (
                    surgeon.tensor(value) if isinstance(value, Tensor) else value
                )
            new = cut.graph.node_copy(node, cut.env.__getitem__)
            if rewrite is _view and slices:  # guard: view strides -> tests/test_law.py -k stride
                new.target = _reshaping(node)
            kept = ("where", "is_wrapped")  # the latter: torch.fx.wrap, for unpickling
            new.meta = {key: node.meta[key] for key in kept if key in node.meta}
            if isinstance(value_of(node), Tensor):
                new.meta["rank"] = value_of(node).dim()
        cut.env[node] = new
    _drop_unused(traced.graph, cut)
    cut.graph.lint()
    return root, cut.graph, SliceReport(slices, tuple(rewritten))


def _layer(cut: Cut, node: Node, surgeon: Surgeon, root: dict[str, Any]) -> None:
    """Copy the layer a node calls, once, and make its attributes fit."""
    name = str(node.target)
    if name in root:
        return
    module = cut.analysis.traced.module(node)
    new = surgeon.module(module)
    root[name] = new
    if isinstance(module, nn.Unflatten):
        label = cut.label(node)
        assert isinstance(new, nn.Unflatten)
        if label is not None and cut.is_cut(label):
            start = module.dim % len(value_of(first_argument(node)).shape)  # type: ignore[arg-type]
            stop = start + len(module.unflattened_size)
            sizes = cut.sizes(label)[start:stop]
            new.unflattened_size = tuple(
                w if w == -1 else n for w, n in zip(module.unflattened_size, sizes, strict=True)
            )
        return
    label = cut.label(first_argument(node))
    channels = None if label is None else _channels(cut, module, label)
    groups = {new: _groups(cut, module)} if isinstance(module, nn.modules.conv._ConvNd) else {}
    refit(new, groups, channels)


def _channels(cut: Cut, module: nn.Module, label: Label) -> int | None:
    """The channels that reach a norm."""
    axis = channel_axis(module, len(label.shape))
    return cut.sizes(label)[axis] if len(label.shape) > axis >= 0 else None


def _groups(cut: Cut, module: nn.modules.conv._ConvNd) -> int:
    name = cut.analysis.traced.tensors.name(module.weight) or ""
    return _groups_left(cut, name, module.groups)


def _groups_left(cut: Cut, weight: str, groups: int) -> int:
    """Groups left of a grouped convolution."""
    ledger = cut.analysis.flow.ledger
    if groups == 1 or not ledger.whole_groups.get(weight, False):
        return groups
    kept = cut.keep[cut.analysis.classes(ledger.slots[weight, 0].ids)]
    return int(kept.sum()) * groups // len(kept)


def _mode_call(cut: Cut, node: Node, root: dict[str, Any]) -> Node:
    """A call that differs between the modes becomes a module that follows `training`."""
    name = f"mode_{node.name}"
    while hasattr(cut.analysis.traced.model, name) or name in root:
        name += "_"
    call = ModeCall(node.target, cut.analysis.traced.mode_flags[node])  # type: ignore[arg-type]
    call.train(cut.analysis.traced.model.training)
    root[name] = call
    return cut.graph.call_module(name, cut.new(node.args), cut.new(node.kwargs))


def _drop_unused(old: Graph, cut: Cut) -> None:
    """Remove size queries that pinning left without a reader."""
    for node in reversed(old.nodes):
        new = cut.env[node]
        query = node.op.startswith("call_") and op_name(node) in ("size", "getattr", "getitem")
        if query and isinstance(new, Node) and node.users and not new.users:
            cut.graph.erase_node(new)


# One rewrite per kind of operation that names sizes


def _size(cut: Cut, node: Node) -> Any:
    """x.size(1), x.shape[1]: the original number, where the axis is cut."""
    if op_name(node) == "size" and isinstance(value_of(node), int):
        source, axis = first_argument(node), arguments(node, "input", "dim")["dim"]
    elif (
        op_name(node) == "getitem"
        and isinstance(node.args[1], int)
        and _is_shape(first_argument(node))
    ):
        source, axis = first_argument(node).args[0], node.args[1]  # type: ignore[union-attr]
    else:
        return None
    label = cut.label(source)
    pinned = label is not None and cut.is_cut(label, axis % len(label.shape))
    if label is not None and pinned:  # guard: sizes are pinned -> tests/test_groups.py -k number
        if not merged(label, axis % len(label.shape)):
            return value_of(node)
        kept = int(cut.kept(label, axis % len(label.shape)).sum())
        new = cut.graph.node_copy(node, cut.env.__getitem__)
        return cut.call(operator.floordiv, cut.call(operator.mul, new, value_of(node)), kept)
    return None


def _is_shape(node: Any) -> bool:
    return isinstance(node, Node) and isinstance(value_of(node), torch.Size)


def _getitem(cut: Cut, node: Node) -> Any:
    """x[:, a:b]: bounds become kept counts."""
    source, index = node.args
    if _is_shape(source):
        return _size(cut, node)
    label = cut.label(source)
    if label is None or not cut.is_cut(label):
        return None
    steps = index_steps(constant(index), len(label.shape)) or {}
    items = list(index) if isinstance(index, tuple) else [index]
    axes = iter(steps)
    changed = False
    for i, item in enumerate(items):
        if item is None or item is Ellipsis:
            continue
        axis = next(axes)
        step = steps[axis]
        if isinstance(step, slice) and cut.is_cut(label, axis) and step != slice(None):
            kept = cut.kept(label, axis)
            start, stop, _ = step.indices(len(kept))
            items[i] = slice(int(kept[:start].sum()), int(kept[:stop].sum()), None)
            changed = True
    if not changed:
        return None
    new = tuple(items) if isinstance(index, tuple) else items[0]
    return cut.call(operator.getitem, cut.new(source), _map_slices(cut, new))


def _map_slices(cut: Cut, index: Any) -> Any:
    """map_arg for an index whose old slices may hold nodes."""
    if isinstance(index, tuple):
        return tuple(_map_slices(cut, i) for i in index)
    if isinstance(index, slice):
        return slice(*(cut.new(v) for v in (index.start, index.stop, index.step)))
    return cut.new(index)


def _view(cut: Cut, node: Node) -> Any:
    """view / reshape / expand: entries of cut axes follow the cut, the others stay as written."""
    label = cut.label(node)
    source = first_argument(node)
    sizes = varargs(node)
    if label is None or not (
        cut.is_cut(label) or cut.is_cut(cut.label(source)) or _needs_pin(cut, sizes)
    ):
        return None
    if isinstance(sizes, Node):
        entries: list[Any] = [_entry_of(cut, sizes, d, label) for d in range(len(label.shape))]
    else:
        entries = [cut.new(s) for s in sizes]
    entries = _follow(cut, entries, label)
    if node.op == "call_function":
        return cut.call(node.target, cut.new(source), tuple(entries))  # type: ignore[arg-type]
    return cut.graph.call_method(str(_reshaping(node)), (cut.new(source), *entries))


def _reshaping(node: Node) -> Any:
    """`view` becomes `reshape`: kernels pick memory formats by widths, which the cut has changed."""
    return "reshape" if node.target == "view" else node.target


def _needs_pin(cut: Cut, sizes: Any) -> bool:
    """Whether a shape used whole belongs to a tensor that is cut."""
    return isinstance(sizes, Node) and _is_shape(sizes) and cut.is_cut(cut.label(sizes.args[0]))


def _entry_of(cut: Cut, sizes: Node, axis: int, label: Label) -> Any:
    """One entry of a shape that was used whole; the original's number where its own axis is cut."""
    owner = cut.label(sizes.args[0]) if sizes.args else None
    if owner is not None and axis < len(owner.shape) and cut.is_cut(owner, axis):
        return owner.shape[axis]
    return cut.call(operator.getitem, cut.env[sizes], axis)


def _scaled(cut: Cut, entry: Any, size: int, old: int) -> Any:
    """A computed entry times kept / all: it may hold other sizes, which stay free."""
    common = math.gcd(size, old)
    return cut.call(operator.floordiv, cut.call(operator.mul, entry, size // common), old // common)


def _unflatten(cut: Cut, node: Node) -> Any:
    label, source = cut.label(node), cut.label(first_argument(node))
    if label is None or source is None or not cut.is_cut(label):
        return None
    args = arguments(node, "input", "dim", "sizes")
    start = int(args["dim"]) % len(source.shape)
    sizes = args["sizes"]
    new = _follow(cut, [cut.new(s) for s in sizes], label, start)
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


def _split(cut: Cut, node: Node) -> Any:
    """chunk / split / tensor_split: pieces keep what is left of them."""
    source = cut.label(first_argument(node))
    if source is None:
        return None
    dim = constant(arguments(node, "input", "sections", "dim").get("dim", 0))
    axis = dim % len(source.shape)
    if not cut.is_cut(source, axis):
        return None
    parts = [v for v in pytree.tree_leaves(cut.analysis.flow.labels[node]) if isinstance(v, Label)]
    sizes = [cut.sizes(part)[axis] for part in parts]
    return cut.call(torch.split, cut.new(first_argument(node)), sizes, dim)


def _narrow(cut: Cut, node: Node) -> Any:
    source = cut.label(first_argument(node))
    args = arguments(node, "input", "dim", "start", "length")
    if source is None:
        return None
    axis = constant(args["dim"]) % len(source.shape)
    if not cut.is_cut(source, axis):
        return None
    kept = cut.kept(source, axis)
    start, length = constant(args["start"]), constant(args["length"])
    start += len(kept) if start < 0 else 0
    first = int(kept[:start].sum())
    return cut.call(
        torch.narrow,
        cut.new(first_argument(node)),
        constant(args["dim"]),
        first,
        int(kept[start : start + length].sum()),
    )


def _pad(cut: Cut, node: Node) -> Any:
    """Channels padded onto channels: as many as are kept of them."""
    args = arguments(node, "input", "pad", "mode", "value")
    label, source = cut.label(node), cut.label(args["input"])
    if label is None or source is None or not (cut.is_cut(label) or cut.is_cut(source)):
        return None
    written = list(args["pad"])
    amounts = pad_amounts(constant(written), len(label.shape))
    changed = [cut.new(w) for w in written]
    for axis, (before, after) in enumerate(amounts):
        if (before, after) == (0, 0) or axis not in source.varying:
            continue
        kept, inner = cut.kept(label, axis), cut.kept(source, axis)
        at = 2 * (len(label.shape) - 1 - axis)
        changed[at] = int(kept[:before].sum()) if before >= 0 else -int(inner[:-before].sum())
        changed[at + 1] = (
            int(kept[len(kept) - after :].sum()) if after >= 0 else -int(inner[after:].sum())
        )
    return cut.call(
        torch.nn.functional.pad,
        cut.new(args["input"]),
        changed,
        args.get("mode", "constant"),
        cut.new(args["value"]),
    )


def _squeeze(cut: Cut, node: Node) -> Any:
    """A channel axis that was longer than 1 is not squeezed away when one channel is left."""
    label = cut.label(first_argument(node))
    if label is None or not cut.is_cut(label):
        return None
    given = arguments(node, "input", "dim")["dim"]
    rank = len(label.shape)
    dims = range(rank) if given is None else [given] if isinstance(given, int) else given
    safe = tuple(d % rank for d in dims if not cut.is_cut(label, d % rank))
    return cut.call(torch.squeeze, cut.new(first_argument(node)), safe)


def _functional_conv(cut: Cut, node: Node) -> Any:
    """F.conv2d(..., groups=G) cut by whole groups."""
    weight = arguments(node, "input", "weight")["weight"]
    if not (isinstance(weight, Node) and weight.op == "get_attr"):
        return None
    order = ["input", "weight", "bias", "stride", "padding"]
    transposed = "transpose" in op_name(node)
    order += ["output_padding", "groups", "dilation"] if transposed else ["dilation", "groups"]
    args = arguments(node, *order)
    name = cut.analysis.traced.tensors.name(cut.analysis.traced.attribute(weight))
    groups = constant(args.get("groups", 1))
    left = _groups_left(cut, name or "", groups)
    if left == groups:
        return None
    kwargs = {k: cut.new(v) for k, v in args.values.items() if k not in ("input", "groups")}
    assert callable(node.target)
    return cut.graph.call_function(
        node.target, (cut.new(args["input"]),), {**kwargs, "groups": left}
    )


REWRITES: Mapping[str, Rewrite] = {
    "size": _size,
    "getitem": _getitem,
    "view": _view,
    "reshape": _view,
    "expand": _view,
    "broadcast_to": _view,
    "unflatten": _unflatten,
    "chunk": _split,
    "split": _split,
    "split_with_sizes": _split,
    "tensor_split": _split,
    "narrow": _narrow,
    "pad": _pad,
    "squeeze": _squeeze,
    **{f"conv{t}{d}d": _functional_conv for t in ("", "_transpose") for d in "123"},
}
