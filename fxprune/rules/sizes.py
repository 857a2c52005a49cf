"""Sizes used as numbers are pinned to the original's; sizes given to views follow the cut."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Node

from fxprune.flow import Flow, Value, opaque, rule, uncut_like
from fxprune.graph import op_name, value_of
from fxprune.rules.movement import move


@rule("dim", "ndimension", "is_floating_point", "is_contiguous", "get_device", "numel", "nelement")
def about(flow: Flow, node: Node) -> Value:
    """Facts about a tensor: they do not change with its channels, or are pinned."""
    return _understood(flow, node)


@rule("size", "getattr")
def size(flow: Flow, node: Node) -> Value:
    """Sizes are numbers, pinned to the original's; other attributes are tensors or say nothing."""
    x = flow.of(node.args[0])
    if op_name(node) == "getattr":
        source: Any = node.args[0]
        field_ = str(node.args[1])
        if field_ in ("T", "mT", "H", "mH"):
            return move(flow, node)
        value = flow.labels.get(source)
        if isinstance(value, tuple) and hasattr(value, field_):  # .values of a named tuple
            return getattr(value, field_)
        if field_ == "data":
            return x
        if isinstance(value_of(node), Tensor):
            return opaque(flow, node, f"fxprune has no rule for `.{field_}`")
        if field_ != "shape":
            return uncut_like(value_of(node))
    return _understood(flow, node)


def _understood(flow: Flow, node: Node) -> None:
    """Reading a size does not make a parameter stay as it is."""
    for label in flow.inputs(node):
        flow.ledger.claimed.update((*part.key, node) for part in label.parts)
