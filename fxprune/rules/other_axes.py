"""Pooling, reductions and softmax: channels stay when other axes are worked on, else they freeze."""

from __future__ import annotations

import re
from functools import lru_cache

from torch import Tensor, nn
from torch.fx import Node
from torch.utils import _pytree as pytree

from fxprune.flow import Flow, Value, opaque, rule, uncut_like
from fxprune.graph import arguments, constant, first_argument, op_name, value_of
from fxprune.labels import Label
from fxprune.rules.elementwise import elementwise


@lru_cache(maxsize=512)
def _spatial_rank(name: str) -> int | None:
    """2 for AvgPool2d and adaptive_avg_pool2d; None for what is no spatial operation."""
    found = re.fullmatch(
        r"(?:adaptive_|fractional_|lp_)?(?:max_|avg_)?pool([123])d"
        r"|(?:Adaptive|Fractional|LP)?(?:Max|Avg)?Pool([123])d"
        r"|(?:Zero|Constant|Reflection|Replication|Circular)Pad([123])d"
        r"|(?:adaptive_)?max_pool([123])d_with_indices",
        name,
    )
    return int(next(g for g in found.groups() if g)) if found else None


def spatial(flow: Flow, node: Node) -> Value:
    """Pooling, spatial padding, interpolation: channels stay, positions do not matter."""
    x = flow.of(first_argument(node))
    out = value_of(node)
    name = op_name(node) or type(flow.traced.module(node)).__name__
    if x is None:
        return opaque(flow, node, f"`{name}` of what is no tensor")
    rank = _spatial_rank(name) or len(x.shape) - 2
    kept = flow.ledger.complete(
        x, range(len(x.shape) - rank, len(x.shape)), node, f"`{name}` mixes positions of channels"
    )
    return pytree.tree_map(lambda v: Label(tuple(v.shape), kept.ids), out)  # and places, if asked


for _d in "123":
    for _name in ("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool", "LPPool"):
        rule(getattr(nn, f"{_name}{_d}d"))(spatial)
    for _name in ("ZeroPad", "ConstantPad", "ReflectionPad", "ReplicationPad", "CircularPad"):
        rule(getattr(nn, f"{_name}{_d}d"))(spatial)
    for _name in ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "lp_pool"):
        rule(f"{_name}{_d}d")(spatial)
    for _name in ("max_pool", "adaptive_max_pool"):
        rule(f"{_name}{_d}d_with_indices")(spatial)
rule("interpolate", "upsample")(spatial)
rule(nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d)(spatial)


@rule("mean", "sum", "amax", "amin", "max", "min", "prod", "std", "var", "norm", "logsumexp")
@rule("all", "any", "median", "nanmean", "nansum", "var_mean", "std_mean", "argmax", "argmin")
@rule("count_nonzero", "nanmedian", "mode", "kthvalue")
def reduction(flow: Flow, node: Node) -> Value:
    """Reducing other axes keeps the channels; reducing channels freezes them."""
    name = op_name(node)
    if name in ("max", "min") and len(flow.inputs(node)) > 1:
        return elementwise(flow, node)
    x = flow.of(first_argument(node))
    if x is None:
        return uncut_like(value_of(node))
    skip = ("input", "p") if name in ("norm", "kthvalue") else ("input",)
    order: tuple[str, ...] = ("dim", "keepdim")
    if name in ("var", "std", "var_mean", "std_mean"):
        bare = len(node.args) > 1 and isinstance(node.args[1], bool)
        order = ("unbiased",) if bare else ("dim", "unbiased", "keepdim")
    given = arguments(node, *skip, *order)
    dims = constant(given["dim"] if given["dim"] is not None else given["axis"])
    if dims is None and name in ("mode", "kthvalue"):
        dims = -1
    dims = [dims] if isinstance(dims, int) else list(dims or range(len(x.shape)))
    dims = [d % max(len(x.shape), 1) for d in dims]
    x = flow.ledger.complete(x, dims, node, f"`{name}` runs over the channels")
    keepdim = bool(given.get("keepdim", False))
    ids = x.ids
    for d in sorted(dims, reverse=True):
        ids = ids.narrow(d, 0, 1) if keepdim else ids.select(d, 0)
    return pytree.tree_map(
        lambda v: Label(tuple(v.shape), ids) if isinstance(v, Tensor) else None, value_of(node)
    )


@rule("softmax", "log_softmax", "softmin", "cumsum", "cumprod", "logcumsumexp")
@rule(nn.Softmax, nn.LogSoftmax, nn.Softmin)
def along_one_axis(flow: Flow, node: Node) -> Value:
    """Softmax and cumulative sums: the axis they run along must stay whole."""
    x = flow.first(node)
    if node.op == "call_module":
        name, dim = type(flow.traced.module(node)).__name__, flow.traced.module(node).dim
    else:
        name, dim = op_name(node), arguments(node, "input", "dim")["dim"]
    if not isinstance(dim, int):
        return opaque(flow, node, f"`{name}` without an axis")
    return flow.ledger.complete(x, [dim % len(x.shape)], node, f"`{name}` runs over the channels")


@rule("sort", "argsort", "msort", "topk", "cummax", "cummin", "diff")
def in_order(flow: Flow, node: Node) -> Value:
    """Sorting and its like: values and places keep the channels of the other axes."""
    x, name = flow.first(node), op_name(node)
    order = {"topk": ("k", "dim"), "diff": ("n", "dim")}.get(name, ("dim",))
    dim = 0 if name == "msort" else arguments(node, "input", *order).get("dim", -1)
    axis = constant(dim) % max(len(x.shape), 1)
    ids = flow.ledger.complete(x, [axis], node, f"`{name}` runs over the channels").ids
    return pytree.tree_map(lambda v: Label(tuple(v.shape), ids), value_of(node))


@rule("tril", "triu")
def triangle(flow: Flow, node: Node) -> Value:
    """Zeros by row and column: both axes must stay whole."""
    x = flow.first(node)
    axes = [len(x.shape) - 2, len(x.shape) - 1]
    return flow.ledger.complete(x, axes, node, f"`{op_name(node)}` goes by row and column")
