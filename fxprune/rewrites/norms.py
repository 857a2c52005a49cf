"""Norms over channels: the shape they normalise, or the number of their groups, follows the cut."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.fx import Node

from fxprune.graph import arguments, constant, first_argument, op_name
from fxprune.rewrites.base import Cut, rewrite
from fxprune.rules.norms import groups_attribute, norm_key, parameters_of, parameters_read


def norm_groups_left(cut: Cut, node: Node, own: tuple[str, ...], groups: int) -> int:
    """Groups left of the group norm that a node computes."""
    label = cut.label(first_argument(node))
    whole = cut.analysis.flow.ledger.whole_groups.get(norm_key(node, own), False)
    if label is None or not whole or not cut.is_cut(label, 1):
        return groups
    return cut.sizes(label)[1] * groups // label.shape[1]


def module_groups_left(cut: Cut, node: Node, module: nn.Module) -> int | None:
    """Groups left of a group norm layer; None for other layers."""
    attribute = groups_attribute(module)
    if attribute is None:
        return None
    own = parameters_of(cut.analysis.flow, module)
    return norm_groups_left(cut, node, own, int(getattr(module, attribute)))


@rewrite("group_norm")
def group_norm(cut: Cut, node: Node) -> Any:
    """F.group_norm(x, G) cut by whole groups."""
    args = arguments(node, "input", "num_groups", "weight", "bias", "eps")
    own = parameters_read(cut.analysis.flow, args["weight"], args["bias"]) or ()
    groups = int(constant(args["num_groups"]))
    left = norm_groups_left(cut, node, own, groups)
    return None if left == groups else _again(cut, node, args.values, "num_groups", left)


@rewrite("layer_norm", "rms_norm")
def layer_norm(cut: Cut, node: Node) -> Any:
    """F.layer_norm(x, (C,)): the axes that are cut are shorter."""
    order = ["input", "normalized_shape", "weight", "bias", "eps"]
    args = arguments(node, *(n for n in order if n != "bias" or op_name(node) == "layer_norm"))
    label = cut.label(args["input"])
    if label is None:
        return None
    count = len(constant(args["normalized_shape"]))
    axes = range(len(label.shape) - count, len(label.shape))
    if not any(cut.is_cut(label, axis) for axis in axes):
        return None
    sizes = cut.sizes(label)[len(label.shape) - count :]
    return _again(cut, node, args.values, "normalized_shape", sizes)


def _again(cut: Cut, node: Node, given: dict[str, Any], name: str, value: Any) -> Node:
    """The same call with one argument replaced."""
    kwargs = {k: cut.new(v) for k, v in given.items() if k not in ("input", name)}
    assert callable(node.target)
    return cut.graph.call_function(node.target, (cut.new(given["input"]), value), kwargs)
