"""Tensors made from sizes, and copies of one entry: their channels have no identity of their own.

Each dimension has ids that no layer makes; they are cut as the channels that they meet.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from fxprune.flow import Flow, Value, rule
from fxprune.graph import value_of
from fxprune.labels import Label, Part, compact, uncut
from fxprune.rules.movement import move


def made(flow: Flow, node: Node, shape: Sequence[int], axes: Iterable[int]) -> tuple[Part, ...]:
    """Dimensions that the node makes, with ids of their own."""
    parts = []
    for d in axes:
        if shape[d] > 1:
            part = Part(
                f"%{node.name}",
                d,
                torch.arange(shape[d]).view([-1 if a == d else 1 for a in range(len(shape))]),
            )
            flow.ledger.made[part.key] = flow.ledger.fresh(shape[d])
            parts.append(part)
    return tuple(parts)


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
def create(flow: Flow, node: Node) -> Value:
    """Constants of a given size."""
    shape = tuple(value_of(node).shape)
    return Label(shape, uncut(shape).ids, made(flow, node, shape, range(len(shape))))


@rule("expand", "broadcast_to")
def expand(flow: Flow, node: Node) -> Value:
    """An axis of size 1 that becomes longer holds copies of one entry."""
    return _grown(flow, node, move(flow, node))


@rule("repeat", "tile")
def repeat(flow: Flow, node: Node) -> Value:
    """Copies of a tensor side by side."""
    x, shape = flow.first(node), tuple(value_of(node).shape)
    lead = len(shape) - len(x.shape)
    counts = [n // max(s, 1) for n, s in zip(shape, (1,) * lead + x.shape, strict=True)]

    def moved(ids: Tensor) -> Tensor:
        ids = ids[(None,) * lead]
        return compact(ids.repeat([c if ids.shape[d] > 1 else 1 for d, c in enumerate(counts)]))

    parts = tuple(Part(p.tensor, p.dim, moved(p.index)) for p in x.parts)
    return _grown(flow, node, Label(shape, moved(x.ids), parts))


def _grown(flow: Flow, node: Node, label: Value) -> Value:
    x = flow.first(node)
    if not isinstance(label, Label) or label.varying:
        return label
    lead = len(label.shape) - len(x.shape)
    one = [d for d, n in enumerate((1,) * lead + x.shape) if n == 1]
    return Label(
        label.shape, uncut(label.shape).ids, label.parts + made(flow, node, label.shape, one)
    )
