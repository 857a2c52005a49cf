"""R1: remove channels along coupling groups.

Promise:  in eval mode the result equals the original whose removed inputs are zeroed; kept entries
          are bit for bit the original's; the input graph and model are untouched.
Rewrites: constants that name a channel count (views, splits, slices, pads) follow the cut; sizes
          used as numbers keep their original value, since the masked original has it too.
Refuses:  nothing: what cannot be cut was frozen by the analysis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.fx import Graph, Node

from fxprune.graph import first_argument, op_name, value_of
from fxprune.groups import Analysis, Array
from fxprune.labels import Label
from fxprune.modes import ModeCall
from fxprune.plan import Slice
from fxprune.rewrites import Cut, rewrite_of
from fxprune.rewrites.layers import groups_left
from fxprune.rewrites.norms import module_groups_left
from fxprune.rewrites.sizes import RESHAPES, reshaping
from fxprune.rules.per_channel import channel_axis
from fxprune.surgery import REFITS, Surgeon, refit


@dataclass(frozen=True)
class SliceReport:
    """slices: what was cut of each tensor. rewritten: nodes whose constants follow the cut."""

    slices: tuple[Slice, ...]
    rewritten: tuple[str, ...]


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
        rewrite = rewrite_of(node, traced.module(node) if node.op == "call_module" else None)
        new = rewrite(cut, node) if rewrite else None
        if new is not None:
            rewritten.append(node.name)
        if node in traced.mode_flags:
            new = _mode_call(cut, node, new, root)
        elif new is None:
            if node.op == "call_module":
                _layer(cut, node, surgeon, root)
            elif node.op == "get_attr":
                value = traced.attribute(node)
                root[str(node.target)] = (
                    surgeon.tensor(value) if isinstance(value, Tensor) else value
                )
            new = cut.graph.node_copy(node, cut.env.__getitem__)
            if (
                op_name(node) in RESHAPES and slices
            ):  # guard: view strides -> tests/test_law.py -k stride
                new.target = reshaping(node)
            kept = ("where", "is_wrapped")  # the latter: torch.fx.wrap, for unpickling
            new.meta = {key: node.meta[key] for key in kept if key in node.meta}
            if isinstance(value_of(node), Tensor):
                new.meta["rank"] = value_of(node).dim()
        cut.env[node] = new
    root.update(cut.constants)
    _drop_unused(traced.graph, cut, root)
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
    if type(module) in REFITS:
        REFITS[type(module)](new, tuple(cut.sizes(label)) if label is not None else ())
        return
    channels = None if label is None else _channels(cut, module, label)
    groups = _groups(cut, node, module)
    refit(new, {} if groups is None else {new: groups}, channels)


def _channels(cut: Cut, module: nn.Module, label: Label) -> int | None:
    """The channels that reach a norm."""
    axis = channel_axis(module, len(label.shape))
    return cut.sizes(label)[axis] if len(label.shape) > axis >= 0 else None


def _groups(cut: Cut, node: Node, module: nn.Module) -> int | None:
    """Groups left of a convolution or norm; None for layers without groups."""
    if isinstance(module, nn.modules.conv._ConvNd):
        name = cut.analysis.traced.tensors.name(module.weight) or ""
        return groups_left(cut, name, module.groups)
    return module_groups_left(cut, node, module)


def _mode_call(cut: Cut, node: Node, new: Any, root: dict[str, Any]) -> Node:
    """A call that differs between the modes becomes a module that follows `training`.

    new: the call as it was rewritten, or None.
    """
    name = f"mode_{node.name}"
    while hasattr(cut.analysis.traced.model, name) or name in root:
        name += "_"
    call = ModeCall(node.target, cut.analysis.traced.mode_flags[node])  # type: ignore[arg-type]
    call.train(cut.analysis.traced.model.training)
    root[name] = call
    args, kwargs = cut.new(node.args), cut.new(node.kwargs)
    if isinstance(new, Node):
        args, kwargs = new.args, dict(new.kwargs)
        cut.graph.erase_node(new)
    return cut.graph.call_module(name, args, kwargs)


def _drop_unused(old: Graph, cut: Cut, root: dict[str, Any]) -> None:
    """Remove what rewriting left without a reader: size queries, views, indices."""
    unread = {cut.env[node] for node in old.nodes if not node.users}
    for node in reversed(cut.graph.nodes):
        name = getattr(node.target, "__name__", node.target)  # as written: `mul_` is another thing
        spare = node.op == "get_attr" or (op_name(node) != "" and name in _SPARE)
        if spare and not node.users and node not in unread:
            cut.graph.erase_node(node)
            if node.op == "get_attr" and not any(n.target == node.target for n in cut.graph.nodes):
                del root[str(node.target)]


_SPARE = {
    "size", "getattr", "getitem", "mul", "floordiv", "numel", "contiguous", "view", "reshape",
    "flatten", "unflatten", "transpose", "permute", "movedim", "swapaxes", "to", "long",
}  # fmt: skip
