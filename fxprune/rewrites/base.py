"""What a cut does to the nodes of a graph: the state of the rewriting, and the register of rewrites.

A rewrite is registered for the plain name of an operation, gets the cut and the original node, and
returns the new node (or number) in its place, or None where the node is copied as it is. Rewrites
make constants that name a channel count follow the cut.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from fxprune.graph import op_name, own_key
from fxprune.groups import Analysis, Array
from fxprune.labels import Label


@dataclass
class Cut:
    """A graph being rewritten: which classes stay, and the new node (or number) for each old one."""

    analysis: Analysis
    keep: Array  # bool [classes]
    graph: Graph
    env: dict[Node, Any]
    constants: dict[str, Tensor] = field(default_factory=dict)  # buffers that rewrites add

    def label(self, arg: Any) -> Label | None:
        """The label of an original node."""
        value = self.analysis.flow.labels.get(arg) if isinstance(arg, Node) else None
        return value if isinstance(value, Label) else None

    def kept(self, label: Label, axis: int) -> Array:
        """Which indices of `axis` stay: bool, of the axis' true length."""
        kept = self.keep[self.analysis.classes(label.ids)]
        stays = _along(kept, axis)
        for part in self._cut_parts(label):
            if part.shape[axis] > 1:
                stays = stays & _along(part, axis)
        return np.broadcast_to(stays, (label.shape[axis],))

    def _cut_parts(self, label: Label) -> list[Array]:
        """Of a tensor made of parameters: which elements each of their cut dimensions leaves."""
        ledger, found = self.analysis.flow.ledger, []
        for part in label.parts if label.uncut else ():
            slot = ledger.slots.get(part.key)
            ids = slot.ids if slot else ledger.made.get(part.key)
            if ids is not None:
                kept = self.keep[self.analysis.classes(ids)]
                if not kept.all():
                    index = part.index.numpy()
                    found.append(np.where(index >= 0, kept[index], True))
        return found

    def sizes(self, label: Label) -> list[int]:
        """The shape on the example input after the cut."""
        return [int(self.kept(label, d).sum()) for d in range(len(label.shape))]

    def is_cut(self, label: Label | None, axis: int | None = None) -> bool:
        """Whether a tensor (or one axis of it) loses anything."""
        if label is None or not label.shape or (label.uncut and not label.parts):
            return False
        if axis is not None:
            return not bool(self.kept(label, axis).all())
        if label.uncut:
            return bool(self._cut_parts(label))
        return not bool(self.keep[self.analysis.classes(label.ids)].all())

    def new(self, arg: Any) -> Any:
        """An argument in terms of the new graph."""
        return map_arg(arg, self.env.__getitem__)

    def call(self, function: Callable[..., Any], *args: Any) -> Node:
        """A new call_function node."""
        return self.graph.call_function(function, args)

    def constant(self, name: str, value: Tensor) -> Node:
        """A buffer of the new network that is no part of its state, and the node that reads it."""
        traced = self.analysis.traced
        while hasattr(traced.model, name) or name in self.constants:
            name += "_"
        device = next((t.device for t in traced.tensors.tensor.values()), value.device)
        self.constants[name] = value.to(device)
        return self.graph.get_attr(name)


def _along(kept: Array, axis: int) -> Array:
    """Which indices of one axis hold anything that stays."""
    return np.asarray(kept.any(axis=tuple(d for d in range(kept.ndim) if d != axis)))


Rewrite = Callable[[Cut, Node], Any]  # gives the new node or number, or None for an unchanged copy
REWRITES: dict[Any, Rewrite] = {}


def rewrite(*keys: Any) -> Callable[[Rewrite], Rewrite]:
    """Register a rewrite for functions and methods by plain name, a function, or a module class."""

    def register(function: Rewrite) -> Rewrite:
        for key in keys:
            if key in REWRITES:
                raise ValueError(f"two rewrites for {key}")
            REWRITES[key] = function
        return function

    return register


def rewrite_of(node: Node, module: nn.Module | None = None) -> Rewrite | None:
    """The rewrite of a call, by what it calls or by its plain name; of a module, by its class."""
    if module is not None:
        return REWRITES.get(type(module))
    if not node.op.startswith("call_"):
        return None
    own = REWRITES.get(own_key(node.target)) if node.op == "call_function" else None
    return own or REWRITES.get(op_name(node))
