"""Functional layers: the number of groups follows the cut."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from fxprune.graph import arguments, constant, op_name
from fxprune.rewrites.base import Cut, rewrite


def groups_left(cut: Cut, weight: str, groups: int) -> int:
    """Groups left of a grouped convolution."""
    ledger = cut.analysis.flow.ledger
    if groups == 1 or not ledger.whole_groups.get(weight, False):
        return groups
    kept = cut.keep[cut.analysis.classes(ledger.slots[weight, 0].ids)]
    return int(kept.sum()) * groups // len(kept)


@rewrite(*(f"conv{t}{d}d" for t in ("", "_transpose") for d in "123"))
def functional_conv(cut: Cut, node: Node) -> Any:
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
    left = groups_left(cut, name or "", groups)
    if left == groups:
        return None
    kwargs = {k: cut.new(v) for k, v in args.values.items() if k not in ("input", "groups")}
    assert callable(node.target)
    return cut.graph.call_function(
        node.target, (cut.new(args["input"]),), {**kwargs, "groups": left}
    )


@rewrite("scaled_dot_product_attention")
def attention(cut: Cut, node: Node) -> Any:
    """Heads that lose dimensions keep the scale that they had."""
    args = arguments(node, "query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
    query = cut.label(args["query"])
    if query is None or args["scale"] is not None or not cut.is_cut(query, len(query.shape) - 1):
        return None
    kwargs = {**cut.new(dict(node.kwargs)), "scale": query.shape[-1] ** -0.5}
    assert callable(node.target)
    return cut.graph.call_function(node.target, cut.new(node.args), kwargs)
