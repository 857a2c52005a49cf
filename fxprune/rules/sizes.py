"""Sizes used as numbers are pinned to the original's; sizes given to views follow the cut."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.fx import Node

from fxprune.flow import Flow, Value, opaque, rule, uncut_like
from fxprune.graph import constant, op_name, value_of
from fxprune.labels import Label
from fxprune.rules.movement import move


@rule("dim", "ndimension", "is_floating_point", "is_contiguous", "get_device")
def about(flow: Flow, node: Node) -> Value:
    """Facts about a tensor that do not change with its channels."""
    return None


@rule("size", "getattr")
def size(flow: Flow, node: Node) -> Value:
    """Sizes are read one by one (and pinned), or given whole to a view; else the channels freeze."""
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
    if x is None or isinstance(value_of(node), int):
        return None
    for user in node.users:
        if not _size_is_safe(user, node, x):  # guard: whole shapes -> tests/test_groups.py -k shape
            flow.ledger.freeze(x.ids, user, "its shape is used as a whole")
    return None


def _size_is_safe(user: Node, sizes: Node, x: Label) -> bool:
    name = op_name(user)
    if name in ("view", "reshape", "expand"):
        return user.args[0] is not sizes
    if name != "getitem":
        return False
    index = constant(user.args[1])
    if isinstance(index, int):
        return True
    return isinstance(index, slice) and not set(range(len(x.shape))[index]) & set(x.varying)
